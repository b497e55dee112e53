"""Sets of shards: their files, their contents, and whether an index still matches them.

Without an index the shards are scanned whenever a source is built. With one, written by
`vadapter data index FOLDER` (see `index`), only the sizes and times of the files are checked. Both
give the same source, with the same fingerprint.
"""

import array
import collections
import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(folder: Path, suffix: str, split: str | None, pattern: str | None) -> list[str]:
    """Return the names of the shards of a split, or of a pattern, in order.

    Args:
      folder, suffix: of the shards; the suffix is ".tar" or ".parquet".
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
    shards = sorted(
        (int(match[1]), int(match[2] or 0), path.name)
        for path in folder.glob(f"*{suffix}")
        if (match := named.fullmatch(path.name))
    )
    if not shards:
        splits = {re.split(r"-\d+\b", path.name)[0] for path in folder.glob(f"*-*{suffix}")}
        hint = f"splits in the folder: {', '.join(sorted(splits))}" if splits else "check the path"
        raise DataError(f"{folder}: no shards {split}-NNN{suffix}; {hint}")
    numbers = collections.Counter(number for number, _, _ in shards)
    first = min(shards[0][0], 1)
    for number in range(first, max(shards[-1][0] + 1, first + shards[0][1])):
        if numbers[number] != 1:
            raise DataError(
                f"{folder}: shard number {number} of {split!r} is "
                f"{'duplicated' if numbers[number] else 'missing'} ({len(shards)} exist); "
                "restore it, or select shards by a pattern"
            )
    return [name for _, _, name in shards]


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
    if missing := [name for name in names if not (folder / name).is_file()]:
        count = f"{len(missing)} of {len(names)}"
        raise DataError(f"{folder}: no shard {missing[0]} ({count} are missing); restore it")
    return names


def _expand(pattern: str) -> Iterator[str]:
    """Yield the names of a pattern with ranges."""
    if not (match := _RANGE.search(pattern)):
        yield pattern
        return
    before, after = pattern[: match.start()], pattern[match.end() :]
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _expand(f"{before}{number:0{len(match[1])}d}{after}")


def assemble(scans: Iterable[Scan]) -> tuple[Columns, list[dict[str, Any]]]:
    """Return (columns, facts of each shard) of scanned shards; the iterable is read once."""
    names, hashes, texts = bytearray(), bytearray(), bytearray()
    name_ends, offsets, sizes, media, text_ends = (array.array("q") for _ in range(5))
    facts = []
    for shard in scans:
        before = len(sizes)
        for name, offset, size in shard.members:
            names += name.encode()
            hashes += _hash(name)
            name_ends.append(len(names))
            offsets.append(offset)
            sizes.append(size)
        for row, text in shard.pairs:
            texts += text.encode()
            text_ends.append(len(texts))
            media.append(before + row if row >= 0 else -1)
        counts = {"members": len(shard.members), "pairs": len(shard.pairs)}
        facts.append({k: v for k, v in vars(shard).items() if k not in counts} | counts)
    columns = {
        "names": np.frombuffer(names, np.uint8), "name_ends": np.frombuffer(name_ends, np.int64),
        "hashes": np.frombuffer(hashes, "<u8").astype(np.uint64),
        "offsets": np.frombuffer(offsets, np.int64), "sizes": np.frombuffer(sizes, np.int64),
        "texts": np.frombuffer(texts, np.uint8), "text_ends": np.frombuffer(text_ends, np.int64),
        "media": np.frombuffer(media, np.int64),
    }  # fmt: skip
    return columns, facts


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=8).digest()


@dataclasses.dataclass
class ShardSet:
    """Shards of a folder and their contents."""

    folder: Path
    # The fields of each shard's `Scan`, with the numbers of its "members" and "pairs" and their
    # first rows in `columns`, "first_member" and "first_pair".
    facts: list[dict[str, Any]]
    columns: Columns
    index: Path | None = None  # None if the shards were scanned

    def __post_init__(self):
        self.names = Strings(self.columns["names"], self.columns["name_ends"])
        self.texts = Strings(self.columns["texts"], self.columns["text_ends"])
        self.shards = [
            tar.Shard(str(self.folder / f["name"]), f["size"], f["mtime_ns"]) for f in self.facts
        ]
        # Sorted by first row, to find the shard of a member; of shards with one start all but the
        # last are empty.
        starts = np.array([f["first_member"] for f in self.facts], np.int64)
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
        return self._rows("first_member", "members")

    def pairs(self) -> np.ndarray:
        """Return the rows of all pairs, i64[n], in the order of the shards."""
        return self._rows("first_pair", "pairs")

    def _rows(self, first: str, count: str) -> np.ndarray:
        ranges = (np.arange(f[first], f[first] + f[count]) for f in self.facts)
        return np.concatenate([np.zeros(0, np.int64), *ranges])

    def name(self, member: int) -> str:
        """Return the name of a member."""
        return self.names[member].decode()

    def span(self, member: int) -> tuple[int, int, int]:
        """Return (number of the shard, offset, size) of a member."""
        shard = int(self._order[np.searchsorted(self._starts, member, "right") - 1])
        return shard, int(self.columns["offsets"][member]), int(self.columns["sizes"][member])

    def read(self, member: int) -> bytes:
        """Return the bytes of a member. Raises DataError if its shard is missing or has changed."""
        shard, offset, size = self.span(member)
        return self.shards[shard].read(offset, size)

    def find(self, names: Sequence[str]) -> list[int]:
        """Return the row of each name's member, -1 where there is none."""
        rows, hashes = self._by_hash()
        sought = np.frombuffer(b"".join(map(_hash, names)), "<u8")
        members = []
        for name, first in zip(names, np.searchsorted(hashes, sought), strict=True):
            # No more than a few names share a hash.
            same = (int(row) for row in rows[first : first + 8] if self.name(row) == name)
            members.append(next(same, -1))
        return members

    def require_unique(self) -> None:
        """Raise DataError if two members have one name."""
        rows, hashes = self._by_hash()
        for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
            one, two = sorted(int(row) for row in rows[place : place + 2])
            if self.names[one] == self.names[two]:
                first, second = (self.shards[self.span(row)[0]].path for row in (one, two))
                raise DataError(
                    f"{second}: {self.name(one)!r} is in {first} too; give each example one name"
                )

    def _by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of all members and the hashes of their names, sorted by hash."""
        rows = self.members()
        hashes = self.columns["hashes"][rows]
        order = np.argsort(hashes, kind="stable")
        return rows[order], hashes[order]


def open_shards(folder: Path, names: list[str], index: str | Path | None) -> ShardSet:
    """Return the shards `names` of a folder, from its index if there is one.

    If `index` is None, it is `index.vadapter` in the folder, or the shards are scanned.

    Raises:
      DataError: an unreadable shard, or an index that does not match the shards.
    """
    path = storage.as_path(index) if index else folder / INDEX
    if not index and not path.is_file():
        columns, facts = assemble(scan(folder, name) for name in names)
        return ShardSet(folder, list(_with_first_rows(facts)), columns)
    columns, metadata = mmap_table.read(path)
    remedy = f"run `vadapter data index {folder}{f' --out {path}' if index else ''}`"
    if metadata.get("version") != VERSION:
        raise DataError(f"{path}: written by another version; {remedy}")
    indexed = {fact["name"]: fact for fact in _with_first_rows(metadata["shards"])}
    for name in names:
        if name not in indexed:
            raise DataError(f"{path}: has no shard {name}; {remedy}")
        if change := differs(folder / name, indexed[name]):
            raise DataError(f"{path}: does not match {folder / name}, {change}; {remedy}")
    return ShardSet(folder, [indexed[name] for name in names], columns, path)


def differs(path: Path, fact: Mapping[str, Any]) -> str:
    """Return how a file's size or time differs from the indexed "size" and "mtime_ns", or ""."""
    if not path.is_file():
        return "which is missing"
    now = storage.facts(path)
    if now["size"] != fact["size"]:
        return f"which has {now['size']} bytes and had {fact['size']}"
    return "which was modified since" if now["mtime_ns"] != fact["mtime_ns"] else ""


def _with_first_rows(facts: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the facts of shards with the rows of their first member and pair."""
    member = pair = 0
    for fact in facts:
        yield fact | {"first_member": member, "first_pair": pair}
        member += fact["members"]
        pair += fact["pairs"]
