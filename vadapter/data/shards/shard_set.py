"""Sets of shards: their files, their contents, and whether an index still matches them.

Without an index the shards are scanned whenever a source is built. With one, written by
`vadapter data index FOLDER` (see `index`), only the sizes and times of the files are checked. Both
give the same source, with the same fingerprint.
"""

import collections
import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.data.shards import mmap_table, tar
from vadapter.data.shards.mmap_table import Columns, Strings
from vadapter.data.shards.shard_scan import Scan, scan
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

INDEX = "index.vadapter"  # file name of an index, beside the shards
VERSION = 1
_FACTS = ("name", "size", "mtime_ns", "sha256", "skipped", "skips", "suffixes", "bad",
          "first_bad", "fault", "digest")  # fmt: skip
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(folder: Path, suffix: str, split: str | None, pattern: str | None) -> list[str]:
    """Return the names of the shards of a split, or of a pattern, in order.

    Args:
      folder: folder of the shards.
      suffix: ".tar" or ".parquet".
      split: shards `<split>-NNN` or `<split>-NNN-of-NNN`; a missing number is an error.
      pattern: instead of a split, a glob, which matches existing files; or a range such as
        `{00000..00099}.tar`, all of which must exist.

    Raises:
      ConfigError: neither split nor pattern.
      DataError: no shards, or one is missing.
    """
    if pattern is not None:
        return _matching(folder, pattern)
    if split is None:
        raise ConfigError(f"{folder}: name the split, or the shards by a pattern such as *{suffix}")
    named = re.compile(rf"{re.escape(split)}-(\d+)(?:-of-(\d+))?(?:-[0-9a-f]+)?{suffix}")
    found = sorted(
        (int(match[1]), int(match[2] or 0), path.name)
        for path in folder.glob(f"*{suffix}")
        if (match := named.fullmatch(path.name))
    )
    if not found:
        there = {re.split(r"-\d+\b", path.name)[0] for path in folder.glob(f"*-*{suffix}")}
        raise DataError(
            f"{folder}: no shards {split}-NNN{suffix}; "
            + (f"splits in the folder: {', '.join(sorted(there))}" if there else "check the path")
        )
    numbers = collections.Counter(number for number, _, _ in found)
    first = min(found[0][0], 1)
    for number in range(first, max(found[-1][0] + 1, first + found[0][1])):
        if numbers[number] != 1:
            raise DataError(
                f"{folder}: shard number {number} of {split!r} is "
                f"{'duplicated' if numbers[number] else 'missing'} ({len(found)} exist); "
                "restore it, or select shards by a pattern"
            )
    return [name for _, _, name in found]


def _matching(folder: Path, pattern: str) -> list[str]:
    if ".." in Path(re.sub(_RANGE, "", pattern)).parts or Path(pattern).is_absolute():
        raise ConfigError(f"{pattern!r} leaves the folder; use a pattern inside {folder}")
    names = []
    for name in _expand(pattern):
        if any(letter in name for letter in "*?["):
            names += sorted(path.relative_to(folder).as_posix() for path in folder.glob(name))
        else:
            names.append(name)
    if not names:
        raise DataError(f"{folder}: no shards {pattern}; check the path")
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"{folder}: no shard {lost[0]} ({len(lost)} of {len(names)} are missing); restore it"
        )
    return names


def _expand(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern with ranges."""
    if not (match := _RANGE.search(pattern)):
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(
            f"{pattern[: match.start()]}{number:0{len(match[1])}d}{pattern[match.end() :]}"
        )


def assemble(scans: Iterable[Scan]) -> tuple[Columns, list[dict[str, Any]]]:
    """Return (columns, facts of each shard) of scanned shards; the iterable is read once."""
    facts, arrays, before = [], [], 0
    for shard in scans:
        names = [name.encode() for name, _, _ in shard.members]
        spans = np.array([span for _, *span in shard.members], np.int64).reshape(-1, 2)
        packed = Strings.pack(names)
        texts = Strings.pack(text.encode() for _, text in shard.pairs)
        arrays.append({
            "names": packed.data, "name_ends": packed.ends, "hashes": _hashes(names),
            "offsets": spans[:, 0], "sizes": spans[:, 1],
            "media": np.array([before + m if m >= 0 else m for m, _ in shard.pairs], np.int64),
            "texts": texts.data, "text_ends": texts.ends,
        })  # fmt: skip
        counts = {"members": len(names), "pairs": len(shard.pairs)}
        facts.append({key: getattr(shard, key) for key in _FACTS} | counts)
        before += len(names)
    joined = {key: np.concatenate([a[key] for a in arrays]) for key in arrays[0]} if arrays else {}
    _shift(joined, "name_ends", [len(a["names"]) for a in arrays], [f["members"] for f in facts])
    _shift(joined, "text_ends", [len(a["texts"]) for a in arrays], [f["pairs"] for f in facts])
    return joined, facts


def _shift(joined: Columns, key: str, lengths: list[int], counts: list[int]) -> None:
    """Turn ends relative to each shard into ends relative to the first, in place."""
    if joined:
        joined[key] += np.repeat(np.cumsum([0, *lengths[:-1]]), counts)


def _hashes(names: Sequence[bytes]) -> np.ndarray:
    joined = b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names)
    return np.frombuffer(joined, "<u8").astype(np.uint64)


@dataclasses.dataclass
class ShardSet:
    """Shards of a folder and their contents.

    Attributes:
      folder: folder of the shards.
      facts: the fields of each shard's `Scan`, with the numbers of its members and pairs.
      rows: for each shard, the rows of its first member and of its first pair in `columns`.
      columns: columns of the index or of the scans.
      index: the index file, None if the shards were scanned.
    """

    folder: Path
    facts: list[dict[str, Any]]
    rows: list[tuple[int, int]]
    columns: Columns
    index: Path | None = None

    def __post_init__(self):
        self.names = Strings(self.columns["names"], self.columns["name_ends"])
        self.texts = Strings(self.columns["texts"], self.columns["text_ends"])
        self.shards = [
            tar.Shard(str(self.folder / f["name"]), f["size"], f["mtime_ns"]) for f in self.facts
        ]
        # Sorted by first row, to find the shard of a member; of shards with one start all but the
        # last are empty.
        starts = np.array([first for first, _ in self.rows], np.int64)
        self._order = np.lexsort(([f["members"] for f in self.facts], starts))
        self._starts = starts[self._order]

    def __getstate__(self) -> dict[str, Any]:
        kept = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return kept | ({"columns": {}} if self.index else {})  # a worker maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        if index := state["index"]:
            state["columns"], _ = mmap_table.read(index, verify=False)
        self.__init__(**state)

    def members(self) -> np.ndarray:
        """Return the rows of all members, i64[n], in the order of the shards."""
        return _ranges((first, f["members"]) for (first, _), f in self._both())

    def pairs(self) -> np.ndarray:
        """Return the rows of all pairs, i64[n], in the order of the shards."""
        return _ranges((first, f["pairs"]) for (_, first), f in self._both())

    def media(self, pair: int) -> int:
        """Return the row of the member with a pair's media, -1 if it has none."""
        return int(self.columns["media"][pair])

    def name(self, member: int) -> str:
        """Return the name of a member."""
        return self.names[member].decode()

    def span(self, member: int) -> tuple[int, int, int]:
        """Return (number of the shard, offset, size) of a member."""
        shard = int(self._order[np.searchsorted(self._starts, member, "right") - 1])
        return shard, int(self.columns["offsets"][member]), int(self.columns["sizes"][member])

    def read(self, member: int) -> bytes:
        """Return the bytes of a member.

        Raises:
          DataError: the shard is missing or has changed.
        """
        shard, offset, size = self.span(member)
        return self.shards[shard].read(offset, size)

    def find(self, names: Sequence[str]) -> list[int]:
        """Return the row of each name's member, -1 where there is none."""
        rows = self.members()
        hashes = self.columns["hashes"][rows]
        order = np.argsort(hashes, kind="stable")
        sought = [name.encode() for name in names]
        places = np.searchsorted(hashes[order], _hashes(sought))
        return [
            self._at(rows[order[place : place + 8]], name)
            for place, name in zip(places, sought, strict=True)
        ]

    def _at(self, candidates: np.ndarray, name: bytes) -> int:
        return next((int(row) for row in candidates if self.names[row] == name), -1)

    def require_unique(self) -> None:
        """Raises DataError if two members have one name."""
        rows = self.members()
        order = np.argsort(self.columns["hashes"][rows], kind="stable")
        hashes = self.columns["hashes"][rows][order]
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            one, two = sorted(int(row) for row in rows[order[place : place + 2]])
            if self.names[one] == self.names[two]:
                first, second = (self.shards[self.span(row)[0]].path for row in (one, two))
                raise DataError(
                    f"{second}: {self.name(one)!r} is in {first} too; give each example one name"
                )

    def _both(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        return zip(self.rows, self.facts, strict=True)


def _ranges(pieces: Iterable[tuple[int, int]]) -> np.ndarray:
    return np.concatenate(
        [np.zeros(0, np.int64), *(np.arange(first, first + n) for first, n in pieces)]
    )


def open_shards(folder: Path, names: list[str], index: str | Path | None) -> ShardSet:
    """Return shards of a folder, from its index if there is one.

    Args:
      folder: folder of the shards.
      names: names of the shards, relative to the folder.
      index: the index file; if None, `index.vadapter` in the folder, and the shards are scanned if
        it does not exist.

    Raises:
      DataError: an unreadable shard, or an index that does not match the shards.
    """
    path = storage.as_path(index) if index else folder / INDEX
    if not index and not path.is_file():
        columns, facts = assemble(scan(folder, name) for name in names)
        return ShardSet(folder, facts, _firsts(facts), columns)
    columns, metadata = mmap_table.read(path)
    remedy = f"run `vadapter data index {folder}{f' --out {path}' if index else ''}`"
    if metadata.get("version") != VERSION:
        raise DataError(f"{path}: written by another version; {remedy}")
    facts = metadata["shards"]
    indexed = {fact["name"]: (fact, row) for fact, row in zip(facts, _firsts(facts), strict=True)}
    for name in names:
        if name not in indexed:
            raise DataError(f"{path}: has no shard {name}; {remedy}")
        if (change := differs(folder / name, indexed[name][0])) is not None:
            raise DataError(f"{path}: does not match {folder / name}, {change}; {remedy}")
    chosen = [indexed[name] for name in names]
    return ShardSet(folder, [f for f, _ in chosen], [r for _, r in chosen], columns, path)


def differs(path: Path, fact: dict[str, Any]) -> str | None:
    """Return how the size or time of a file differs from its facts, None if they agree.

    Args:
      path: the file.
      fact: its "size" and "mtime_ns" when it was indexed.
    """
    if not path.is_file():
        return "which is missing"
    now = storage.facts(path)
    if now["size"] != fact["size"]:
        return f"which has {now['size']} bytes and had {fact['size']}"
    if now["mtime_ns"] != fact["mtime_ns"]:
        return "which was modified since"
    return None


def _firsts(facts: list[dict[str, Any]]) -> list[tuple[int, int]]:
    members = itertools.accumulate((f["members"] for f in facts), initial=0)
    pairs = itertools.accumulate((f["pairs"] for f in facts), initial=0)
    return list(zip(members, pairs, strict=True))[: len(facts)]
