"""What a data set yields, what the input pipeline asks of one, and the data sets of plain files.

`CaptionTars` reads tar shards, `ImageFolder` a folder of images or clips; both take captions and
questions from JSON lines such as

  {"image": "dog.jpg", "captions": ["a dog runs", "a brown dog"], "split": "train"}
  {"image": "dog.jpg", "question": "what runs?", "answer": "dog", "split": "train"}

with the keys image (or clip, or video), captions (or caption), question, answer (may be left out
where it is not public), kind of question, shard, and split (a row without one is in every split).
Everything is checked when a source is built, the pixels when they are decoded.

Dimension legend: F frames, H height, W width.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from vadapter.data import tar
from vadapter.data.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.errors import DataError

_MEDIA = IMAGE_SUFFIXES | CLIP_SUFFIXES
_MAX_TEXT_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Example:
    """One record of any source.

    Attributes:
      id: unique in its source, for example the file name.
      media: an encoded image or clip as bytes, raw frames u8[F,H,W,3], the path of a clip or an
        image, or None where there is only text.
      captions: independent descriptions of the media.
      qa: (question, answer, question kind) triples about the media; the kind may be "", and so
        may the answer where it is not public.
      pieces: one language-modelling document, as the pieces that are tokenised separately and
        concatenated.
    """

    id: str
    media: bytes | np.ndarray | Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[tuple[str, str, str], ...] = ()
    pieces: tuple[str, ...] = ()


class Source(Protocol):
    """A data set with random access: picklable, and cheap to construct again in a worker.

    Attributes:
      kind: "image" (one frame), "clip" (several frames) or "text".
    """

    kind: str

    def __len__(self) -> int:
        """The number of examples, at least one."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, in 0..len-1; its media is not decoded yet."""
        ...

    def fingerprint(self) -> str:
        """A sha256 in hex of what the source yields, so that a resumed run can compare."""
        ...


class CaptionTars:
    """Images or clips in tar shards named `<split>-NNN.tar`, with captions, questions or both.

    The texts come from the *.jsonl files beside the shards. Where there is none, they come from
    the shards, as webdataset writes them: `key.jpg` beside `key.txt` (one caption) or `key.json`
    (a row as above, without the image). All questions about one image form one example.

    Shards are read in place. The index stays in memory, about 1 kB an example.

    Args:
      folder: the folder of shards.
      split: which shards, and which rows.

    Raises:
      DataError: no shards, no rows, a row whose image no shard holds, an unusable text.
    """

    def __init__(self, folder: str | Path, split: str):
        folder = Path(folder)
        self._shards, spans, skipped = _scan_all(folder, split)
        tables = sorted(folder.glob("*.jsonl"))
        if tables:
            rows = (row for table in tables for row in _rows(table, split))
            self._examples = _gather(_check_members(rows, spans, skipped, self._shards))
            names = [example.id for example in self._examples]
        else:
            self._examples, names = _gather_pairs(spans, self._shards)
        if not self._examples:
            raise DataError(f"{folder}: 0 usable examples in split {split!r}; check its rows")
        self._spans = [spans[name] for name in names]
        self.kind = _kind(names, str(folder))
        self._digest = _digest(self.kind, self._examples, self._spans)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        shard, offset, size = self._spans[index]
        return dataclasses.replace(
            self._examples[index], media=self._shards[shard].read(offset, size)
        )

    def fingerprint(self) -> str:
        """Of names, positions, sizes and texts; not of the pixels, nor of where the folder is."""
        return self._digest


class ImageFolder:
    """Images or clips as single files, with captions or questions in one JSON lines file.

    Args:
      table: the JSON lines file.
      folder: what the names in it are relative to; the folder of `table` if None.
      split: keep the rows of this split; all of them if None.

    Raises:
      DataError: no rows, a file that is missing or lies outside the folder, an unusable text.
    """

    def __init__(
        self, table: str | Path, folder: str | Path | None = None, *, split: str | None = None
    ):
        table = Path(table)
        folder = table.parent if folder is None else Path(folder)
        examples = _gather(_check_files(_rows(table, split), folder))
        if not examples:
            raise DataError(f"{table}: 0 usable examples in split {split!r}; check its rows")
        self.kind = _kind([example.id for example in examples], str(table))
        self._examples = [dataclasses.replace(e, media=folder / e.id) for e in examples]
        sizes = [(folder / example.id).stat().st_size for example in examples]
        self._digest = _digest(self.kind, examples, sizes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def fingerprint(self) -> str:
        """Of names, sizes and texts; not of the pixels, nor of where the folder is."""
        return self._digest


Span = tuple[int, int, int]  # shard, offset, size
Row = tuple[str, dict[str, Any]]  # "file, line n", the parsed line


def _scan_all(folder: Path, split: str) -> tuple[list[tar.Shard], dict[str, Span], dict[str, str]]:
    """The shards of a split, where each member lies, and why others were left out."""
    named = re.compile(rf"{re.escape(split)}-\d+\.tar")
    paths = sorted(path for path in folder.glob("*.tar") if named.fullmatch(path.name))
    if not paths:
        there = sorted({path.name.rsplit("-", 1)[0] for path in folder.glob("*-*.tar")})
        raise DataError(
            f"{folder}: no shards {split}-NNN.tar; "
            + (f"splits there: {', '.join(there)}" if there else "check the path")
        )
    shards, spans, skipped = [], {}, {}
    for path in paths:
        index = tar.scan(path, _MEDIA | {".txt", ".json"})
        for name, (offset, size) in index.members.items():
            if name in spans:
                other = shards[spans[name][0]].path
                raise DataError(f"{path}: {name!r} is in {other} too; give each example one name")
            spans[name] = (len(shards), offset, size)
        skipped.update(index.skipped)
        shards.append(index.shard)
    return shards, spans, skipped


def _rows(path: Path, split: str | None) -> Iterator[Row]:
    """The rows of a JSON lines file that belong to a split."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    seen = set()
    with path.open("rb") as file:
        for number in range(1, 1 << 62):
            line = file.readline(_MAX_TEXT_BYTES)
            if not line:
                break
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            row = _parse(line, where)
            seen.add(row.get("split"))
            if split is None or row.get("split", split) == split:
                yield where, row
    if not seen:
        raise DataError(f"{path}: no rows; the file is empty")
    if split is not None and not seen & {split, None}:
        there = ", ".join(sorted(map(str, seen)))
        raise DataError(f"{path}: no rows of split {split!r}; splits there: {there}")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, got {type(row).__name__}")
    return row


def _name(where: str, row: dict[str, Any]) -> str:
    for key in ("image", "clip", "video"):
        if key in row:
            return _text(row[key], f"{where}: {key}")
    raise DataError(f"{where}: none of the keys image, clip, video; it has {', '.join(row)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a text is expected, got {value!r:.60}; mend or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a character ({error}); mend it") from error
    return value


def _texts(where: str, row: dict[str, Any]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """The captions and the questions of one row."""
    captions = row.get("captions", row.get("caption", []))
    captions = captions if isinstance(captions, list) else [captions]
    captions = [_text(caption, f"{where}: caption") for caption in captions]
    qa = []
    if "question" in row:
        question = _text(row["question"], f"{where}: question")
        answer = _text(row["answer"], f"{where}: answer") if "answer" in row else ""
        qa = [(question, answer, str(row.get("kind", "")))]
    if not captions and not qa:
        raise DataError(f"{where}: no captions and no question; add one or remove the row")
    return captions, qa


def _gather(rows: Iterable[tuple[str, str, dict[str, Any]]]) -> list[Example]:
    """One example a name, in order of first appearance, from (where, name, row)."""
    captions: dict[str, list[str]] = {}
    qa: dict[str, list[tuple[str, str, str]]] = {}
    first: dict[str, str] = {}  # where the captions of a name stood
    for where, name, row in rows:
        new_captions, new_qa = _texts(where, row)
        if new_captions and name in first:
            raise DataError(
                f"{where}: {name!r} has captions already ({first[name]}); "
                "put all captions of an image into one row"
            )
        if new_captions:
            first[name] = where
        captions.setdefault(name, []).extend(new_captions)
        qa.setdefault(name, []).extend(new_qa)
    return [Example(name, captions=tuple(captions[name]), qa=tuple(qa[name])) for name in captions]


def _check_members(
    rows: Iterable[Row], spans: dict[str, Span], skipped: dict[str, str], shards: list[tar.Shard]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, row in rows:
        name = _name(where, row)
        if name not in spans:
            why = skipped.get(name, f"no member of that name in {len(shards)} shards")
            raise DataError(f"{where}: {name!r} cannot be read: {why}")
        shard = Path(shards[spans[name][0]].path).name
        if row.get("shard", shard) != shard:
            raise DataError(f"{where}: {name!r} is in {shard}, not in {row['shard']!r}")
        yield where, name, row


def _check_files(rows: Iterable[Row], folder: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, row in rows:
        name = _name(where, row)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DataError(f"{where}: {name!r} leaves the folder; use names inside {folder}")
        if not (folder / name).is_file():
            raise DataError(f"{where}: no file {folder / name}; add it or remove the row")
        yield where, name, row


def _gather_pairs(
    spans: dict[str, Span], shards: list[tar.Shard]
) -> tuple[list[Example], list[str]]:
    """Examples whose text lies in the shard, under the same key up to the first full stop."""
    groups: dict[str, dict[str, str]] = {}  # key -> {"media" | ".txt" | ".json": name}
    for name in spans:
        folder, _, base = name.rpartition("/")
        key = f"{folder}/{base.split('.')[0]}".lstrip("/")
        suffix = PurePosixPath(name).suffix.lower()
        slot = suffix if suffix in (".txt", ".json") else "media"
        if groups.setdefault(key, {}).setdefault(slot, name) != name:
            path = shards[spans[name][0]].path
            raise DataError(f"{path}: {name!r} is the second {slot} of {key!r}; keep one")
    examples, names = [], []
    for key, group in groups.items():
        anywhere = spans[next(iter(group.values()))]
        where = f"{shards[anywhere[0]].path}: {key!r}"
        text = group.get(".txt", group.get(".json"))
        if "media" not in group or text is None:
            raise DataError(f"{where} has only {', '.join(group.values())}; image and text needed")
        shard, offset, size = spans[text]
        if size > _MAX_TEXT_BYTES:
            raise DataError(f"{where}: its text has {size} bytes; at most {_MAX_TEXT_BYTES}")
        data = shards[shard].read(offset, size)
        if text == group.get(".txt"):
            try:
                row = {"caption": data.decode("utf-8-sig")}
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {text} is not UTF-8; write the shard again") from error
        else:
            row = _parse(data, where)
        captions, qa = _texts(where, row)
        examples.append(Example(key, captions=tuple(captions), qa=tuple(qa)))
        names.append(group["media"])
    return examples, names


def _kind(names: list[str], where: str) -> str:
    """What all of the names are; a batch holds one kind, and so does a source."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if unknown := suffixes - _MEDIA:
        raise DataError(
            f"{where}: files of type {', '.join(sorted(unknown))} are neither images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) nor clips ({', '.join(sorted(CLIP_SUFFIXES))})"
        )
    if suffixes & CLIP_SUFFIXES and suffixes & IMAGE_SUFFIXES:
        raise DataError(f"{where}: images and clips mixed; split them into two sources")
    return "clip" if suffixes & CLIP_SUFFIXES else "image"


def _digest(kind: str, examples: list[Example], positions: Iterable[Any]) -> str:
    digest = hashlib.sha256(kind.encode())
    for example, position in zip(examples, positions, strict=True):
        row = (example.id, position, example.captions, example.qa)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
