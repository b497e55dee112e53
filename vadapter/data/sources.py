"""The data sets of plain files.

`CaptionTars` reads tar shards, `ImageFolder` a folder of images or clips; both take captions and
questions from JSON lines such as

  {"image": "dog.jpg", "captions": ["a dog runs", "a brown dog"], "split": "train"}
  {"image": "dog.jpg", "question": "what runs?", "answer": "dog", "split": "train"}

whose keys `vadapter.data.tables` explains. Names, sizes and texts are checked when a source is
built, the pixels when they are decoded.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from vadapter.data import tables, tar
from vadapter.data.example import Example
from vadapter.data.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.errors import DataError

_MEDIA = IMAGE_SUFFIXES | CLIP_SUFFIXES
_TABLES = ("captions.jsonl", "qa.jsonl")

Span = tuple[int, int, int]  # shard, offset, size


class CaptionTars:
    """Images or clips in tar shards named `<split>-NNN.tar`, with captions, questions or both.

    The texts come from captions.jsonl and qa.jsonl beside the shards. Where there is neither, they
    come from the shards, as webdataset writes them: `key.jpg` beside `key.txt` (one caption) or
    `key.json` (a row as above, without the image). All questions about an image are one example.

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
        paths = [folder / name for name in _TABLES if (folder / name).is_file()]
        if paths:
            rows = (row for path in paths for row in tables.read_rows(path, split))
            texts = tables.gather(_check_members(rows, spans, skipped, self._shards))
            names = list(texts)
        else:
            texts, names = _pairs(spans, self._shards)
        self._examples = [Example(key, None, *both) for key, both in texts.items()]
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
        texts = tables.gather(_check_files(tables.read_rows(table, split), folder))
        if not texts:
            raise DataError(f"{table}: 0 usable examples in split {split!r}; check its rows")
        self.kind = _kind(list(texts), str(table))
        self._examples = [Example(name, folder / name, *both) for name, both in texts.items()]
        sizes = [(folder / name).stat().st_size for name in texts]
        self._digest = _digest(self.kind, self._examples, sizes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def fingerprint(self) -> str:
        """Of names, sizes and texts; not of the pixels, nor of where the folder is."""
        return self._digest


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


def _check_members(
    rows: Iterable[tables.Row],
    spans: dict[str, Span],
    skipped: dict[str, str],
    shards: list[tar.Shard],
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, row in rows:
        name = tables.media_name(where, row)
        if name not in spans:
            why = skipped.get(name, f"no member of that name in {len(shards)} shards")
            raise DataError(f"{where}: {name!r} cannot be read: {why}")
        shard = Path(shards[spans[name][0]].path).name
        if row.get("shard", shard) != shard:
            raise DataError(f"{where}: {name!r} is in {shard}, not in {row['shard']!r}")
        yield where, name, row


def _check_files(
    rows: Iterable[tables.Row], folder: Path
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, row in rows:
        name = tables.media_name(where, row)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DataError(f"{where}: {name!r} leaves the folder; use names inside {folder}")
        if not (folder / name).is_file():
            raise DataError(f"{where}: no file {folder / name}; add it or remove the row")
        yield where, name, row


def _pairs(
    spans: dict[str, Span], shards: list[tar.Shard]
) -> tuple[dict[str, tables.Texts], list[str]]:
    """Texts that lie in the shards, under the key of their image: its name to the first dot.

    Returns:
      The texts of each key, and the member that holds its media, in the same order.
    """
    groups: dict[str, dict[str, str]] = {}  # key -> {"media" | ".txt" | ".json": member}
    for name in spans:
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.split(".")[0]
        suffix = PurePosixPath(name).suffix.lower()
        slot = "media" if suffix in _MEDIA else suffix
        if groups.setdefault(key, {}).setdefault(slot, name) != name:
            path = shards[spans[name][0]].path
            raise DataError(f"{path}: {name!r} is the second {slot} of {key!r}; keep one")
    texts = {}
    for key, group in groups.items():
        text = group.get(".txt", group.get(".json", ""))
        shard, offset, size = spans[text or group["media"]]
        where = f"{shards[shard].path}: {text or key}"
        if not text or "media" not in group:
            raise DataError(
                f"{where}: {key!r} has only {', '.join(group.values())}; add the missing half, "
                f"or put the texts beside the shards, in {' or '.join(_TABLES)}"
            )
        if size > tables.MAX_TEXT_BYTES:
            raise DataError(f"{where}: {size} bytes; a text has at most {tables.MAX_TEXT_BYTES}")
        data = shards[shard].read(offset, size)
        texts[key] = tables.texts(where, _pair_row(data, where, text))
    return texts, [group["media"] for group in groups.values()]


def _pair_row(data: bytes, where: str, name: str) -> dict[str, Any]:
    if name.lower().endswith(".json"):
        return tables.parse(data, where)
    try:
        return {"caption": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); write the shard again") from error


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
