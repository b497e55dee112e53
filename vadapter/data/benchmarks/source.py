"""A split of a benchmark as a data source, read straight from the official files."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from vadapter.config import require_one_of
from vadapter.data.benchmarks.benchmark import Benchmark, Record
from vadapter.data.benchmarks.files import ArchivedFile, find_media
from vadapter.data.benchmarks.table import find_benchmark
from vadapter.data.example import Example, Question, Source
from vadapter.data.sources.common import digest_of
from vadapter.errors import ConfigError, DataError

_AGAIN = "download the official files again"


class NoMediaError(DataError):
    """The annotation files are valid, but no image or clip of the split is present."""


class BenchmarkSource(Source):
    """One split; an example is an image or clip with its captions or all questions about it.

    `folder` has the official files under their official names; a split of "" is the benchmark's
    default. Records whose image or clip is missing (videos disappear) are left out, and the split
    is then partial: `official` is False and `note` says how it differs.

    Attributes:
      official: whether it is the complete official split; only then its score is official.
      note: how it differs from the official split, "" if it does not.
      missing: images or clips that the annotation files name and that are missing.

    Raises:
      ConfigError: no split of that name.
      DataError: a file is missing, empty or not in the official format, an id is listed twice, a
        text is not a string, or all texts of an image or question are blank; `NoMediaError` if all
        images or clips are missing.
    """

    def __init__(self, benchmark: Benchmark, folder: str | Path, split: str = ""):
        folder = Path(folder)
        split = split or benchmark.default_split
        records = list(_checked_records(benchmark, folder, split))
        media = find_media(benchmark, folder, split)
        self.kind: str = benchmark.media
        self.missing = tuple(record.media for record in records if record.media not in media)
        self._records = [record for record in records if record.media in media]
        self._media = [media[record.media] for record in self._records]
        if not self._records:
            raise NoMediaError(
                f"{folder}: none of the {len(records):,} {self.kind}s of {benchmark.name} "
                f"{split} is here, such as {self.missing[0]}; download them from "
                f"{benchmark.media_sets[0].page}"
            )
        self.note = _differences(benchmark, split, self._records, self.missing)
        self.official = not self.note
        # Of names, sizes and texts, but neither of the pixels nor of the folder.
        positions = [
            stored.position if isinstance(stored, ArchivedFile) else stored.stat().st_size
            for stored in self._media
        ]
        self._digest = digest_of(self.kind, zip(self._records, positions, strict=True))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        media = self._media[index]
        if isinstance(media, ArchivedFile):
            media = media.read_bytes()
        return dataclasses.replace(self.text_only(index), media=media)

    def text_only(self, index: int) -> Example:
        """Return the example without its image or clip."""
        id_, _, captions, qa = self._records[index]
        return Example(id_, None, captions, qa)


def open_benchmark(name: str, folder: str | Path, split: str = "") -> BenchmarkSource:
    """Return a split of the benchmark `name`, see `BenchmarkSource`.

    Raises:
      ConfigError: no benchmark or split of that name.
      DataError: a file is missing, or not in the official format.
    """
    return BenchmarkSource(find_benchmark(name), folder, split)


def training_questions(name: str, folder: str | Path) -> list[Question]:
    """Return the questions of the training split with their answers, in the order of the files.

    Only annotation files are read: neither images nor clips have to be present. A question that
    most annotators left without an answer is left out.

    Raises:
      ConfigError: no benchmark of that name, or one without training questions.
      DataError: a file is missing, or not in the official format.
    """
    benchmark = find_benchmark(name)
    if not benchmark.training:
        raise ConfigError(f"benchmark {name!r}: a {benchmark.task} benchmark has no questions")
    records = _checked_records(benchmark, Path(folder), benchmark.training)
    return [question for record in records for question in record.qa if question.answer.strip()]


def _checked_records(benchmark: Benchmark, folder: Path, split: str) -> Iterator[Record]:
    """Yield the records of a split, each checked for its texts and for a unique id.

    Texts stay unchanged, blank ones too, since the official scorers keep them; but one caption or
    answer at least has to have a word. Questions for prompts may lack answers.
    """
    require_one_of(f"benchmark {benchmark.name!r}: split {split!r}", split, benchmark.splits)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; download the official files of {benchmark.name} to it, "
            f"from {benchmark.homepage}; `vadapter data doctor {benchmark.name}` lists them"
        )
    location = f"{folder}: {benchmark.name} {split}"
    blank_answers = benchmark.splits[split].per_item == 0 or split == benchmark.training
    seen: set[tuple[str, str]] = set()
    for record in benchmark.reader(folder, split, *benchmark.files):
        _require_new(benchmark.media, record.id, seen, location)
        if benchmark.task == "caption":
            _require_texts(record.captions, "caption", f"{location}: {record.id}")
        for question in record.qa:
            _require_new("question", question.id, seen, location)
            name = f"{location}: question {question.id}"
            _require_texts((question.text,), "text", name, blank=True)
            _require_texts(question.answers, "answer", name, blank=blank_answers)
        yield record
    if not seen:
        raise DataError(f"{location}: no records; {_AGAIN}")


def _require_new(kind: str, id_: str, seen: set[tuple[str, str]], location: str) -> None:
    if (kind, id_) in seen:
        raise DataError(f"{location}: {kind} {id_} is listed twice; {_AGAIN}")
    seen.add((kind, id_))


def _require_texts(
    values: tuple[str, ...], kind: str, location: str, *, blank: bool = False
) -> None:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{location} has the {kind} {value!r:.60}; {_AGAIN}")
    if not blank and not any(value.strip() for value in values):
        raise DataError(f"{location} has no {kind}; {_AGAIN}")


def _differences(
    benchmark: Benchmark, split: str, records: list[Record], missing: tuple[str, ...]
) -> str:
    """Return how the records differ from the official split, "" if they do not."""
    media, texts, per_item = benchmark.splits[split]
    noun, nouns = f"{benchmark.media}s", f"{benchmark.task}s"
    if benchmark.task == "caption":
        sizes, items, annotations = [len(record.captions) for record in records], noun, "captions"
        total = sum(sizes)
    else:
        sizes = [len(question.answers) for record in records for question in record.qa]
        items, annotations, total = nouns, "answers", len(sizes)
    parts = []
    if (len(records), total) != (media, texts):
        parts.append(f"{len(records):,} of {media:,} {noun} and {total:,} of {texts:,} {nouns}")
    if missing:
        parts.append(f"{len(missing):,} {noun} named but not here, such as {missing[0]}")
    if per_item and (odd := sum(size != per_item for size in sizes)):
        parts.append(f"{odd:,} {items} without exactly {per_item} {annotations}")
    if not parts:
        return ""
    return f"not the complete official {benchmark.name} {split} split: {'; '.join(parts)}"
