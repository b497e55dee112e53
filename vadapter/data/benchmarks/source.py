"""A split of a benchmark as a data source, straight from the official files."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from vadapter.config import nearest
from vadapter.data.benchmarks.benchmark import Benchmark, Record
from vadapter.data.benchmarks.files import Stored, find_media
from vadapter.data.example import Example, Source
from vadapter.errors import ConfigError, DataError

_NOUNS = {"image": "images", "clip": "clips", "caption": "captions", "question": "questions"}


class NothingHere(DataError):  # noqa: N818 - a property of a copy
    """The files are as they should be, but no image or clip of this split is among them."""


class BenchmarkSource(Source):
    """One split; an example is an image or clip with its captions or all questions about it.

    Whatever has no image or clip here (videos disappear) is left out, and the split is then
    partial: `official` is False and `note` says what it has.

    Args:
      benchmark: a row of `registry.BENCHMARKS`.
      directory: holds the official files under their official names.
      split: the benchmark's default if "".

    Attributes:
      kind: "image" or "clip".
      official: it is the complete official split; only then may its score be called official.
      note: what differs from the official split, "" if nothing does.
      missing: the images or clips that the annotation files name and that are not here.

    Raises:
      ConfigError: no split of that name.
      DataError: a file is missing or not in the official format; `NothingHere` if no image or
        clip is here.
    """

    def __init__(self, benchmark: Benchmark, directory: str | Path, split: str = ""):
        directory = Path(directory)
        split = split or benchmark.split
        records = list(check(benchmark, directory, split))
        media = find_media(benchmark, directory, split)
        self.kind: str = benchmark.media
        self.missing = tuple(record.media for record in records if record.media not in media)
        self._records = [record for record in records if record.media in media]
        self._media = [media[record.media] for record in self._records]
        if not self._records:
            raise NothingHere(
                f"{directory}: none of the {len(records):,} {_NOUNS[self.kind]} of "
                f"{benchmark.name} {split} is here, such as {self.missing[0]}; get them from "
                f"{benchmark.places[0].page}"
            )
        self.note = _differences(benchmark, split, self._records, self.missing)
        self.official = not self.note
        self._digest = _digest(self.kind, self._records, self._media)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        stored = self._media[index]
        media = stored.read() if isinstance(stored, Stored) else stored
        record = self._records[index]
        return Example(record.id, media, record.captions, record.qa)

    def text_only(self, index: int) -> Example:
        """The example without its image or clip."""
        record = self._records[index]
        return Example(record.id, None, record.captions, record.qa)

    def fingerprint(self) -> str:
        """Of names, sizes and texts; not of the pixels, nor of where the folder is."""
        return self._digest


def check(benchmark: Benchmark, directory: Path, split: str) -> Iterator[Record]:
    """The records of a split, once it is clear that each has its texts, and its ids are unique.

    Texts stay as they are, blank ones too, since the official scorers keep them; but a caption or
    an answer has to be there. Questions for prompts may lack answers.

    Raises:
      ConfigError: no split of that name.
      DataError: the folder or a file is missing, a file is not in the official format or says
        nothing, an id stands there twice, a text is none, or all that an image or a question
        has are blank.
    """
    if split not in benchmark.splits:
        raise ConfigError(
            f"benchmark {benchmark.name!r}: no split {split!r}{nearest(split, benchmark.splits)}; "
            f"there are {', '.join(benchmark.splits)}"
        )
    if not directory.is_dir():
        raise DataError(
            f"{directory}: no such folder; it holds the official files of {benchmark.name}, from "
            f"{benchmark.homepage}; `vadapter data doctor {benchmark.name}` lists them"
        )
    where = f"{directory}: {benchmark.name} {split}"
    answered = benchmark.splits[split].each != 0
    seen: tuple[set[str], set[str]] = (set(), set())  # images or clips, questions
    for record in benchmark.read(directory, split):
        _once(record.id, seen[0], f"{where}: {benchmark.media}")
        if benchmark.task == "caption":
            _texts(record.captions, f"{where}: {record.id}", "caption")
        for question in record.qa:
            _once(question.id, seen[1], f"{where}: question")
            _texts((question.text,), f"{where}: question {question.id}", "text", blank=True)
            spared = not answered or split == benchmark.training
            _texts(question.answers, f"{where}: question {question.id}", "answer", blank=spared)
        yield record
    if not seen[0]:
        raise DataError(f"{where}: nothing in it; get the official files again")


def _once(name: str, seen: set[str], where: str) -> None:
    if name in seen:
        raise DataError(f"{where} {name} stands there twice; get the official files again")
    seen.add(name)


def _texts(values: tuple[str, ...], where: str, what: str, *, blank: bool = False) -> None:
    for value in values:
        if not isinstance(value, str):
            raise DataError(f"{where} has the {what} {value!r:.60}; get the official files again")
    if not blank and not any(value.strip() for value in values):
        raise DataError(f"{where} has no {what}; get the official files again")


def _differences(
    benchmark: Benchmark, split: str, records: list[Record], missing: tuple[str, ...]
) -> str:
    """How what is here differs from the official split, "" if it does not."""
    media, texts, each = benchmark.splits[split]
    noun, nouns = _NOUNS[benchmark.media], _NOUNS[benchmark.task]
    if benchmark.task == "caption":
        having, what = [len(record.captions) for record in records], (noun, "captions")
        found = sum(having)
    else:
        having = [len(question.answers) for record in records for question in record.qa]
        what, found = (nouns, "answers"), len(having)
    parts = []
    if (len(records), found) != (media, texts):
        parts.append(f"{len(records):,} of {media:,} {noun} and {found:,} of {texts:,} {nouns}")
    if missing:
        parts.append(f"{len(missing):,} {noun} named but not here, such as {missing[0]}")
    if each and (odd := sum(n != each for n in having)):
        parts.append(f"{odd:,} {what[0]} without exactly {each} {what[1]}")
    if not parts:
        return ""
    return f"not the complete official {benchmark.name} {split} split: {'; '.join(parts)}"


def _digest(kind: str, records: list[Record], media: list[Path | Stored]) -> str:
    digest = hashlib.sha256(kind.encode())
    for record, at in zip(records, media, strict=True):
        position = at.place if isinstance(at, Stored) else at.stat().st_size
        digest.update(json.dumps((record, position)).encode())
    return digest.hexdigest()
