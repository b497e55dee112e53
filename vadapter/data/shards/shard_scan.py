"""The contents of one shard, as an index stores them.

The members of a tar are its files. Its texts may be stored beside the media, as webdataset and
img2dataset write them: `key.jpg` (or .png, .webp, .mp4, .avi, .webm, .gif) with `key.txt` (one
caption) or `key.json` (a row as in `annotation_tables`; that of img2dataset has the key "caption"
among many others). The key is the name up to its first dot.

The members of a parquet file are its row groups; the number of the first row takes the place of the
offset, the number of rows that of the size.
"""

import dataclasses
import hashlib
import itertools
import json
from pathlib import Path, PurePosixPath
from typing import Any

from vadapter.data import annotation_tables
from vadapter.data.media.images import MEDIA_SUFFIXES
from vadapter.data.shards import tar
from vadapter.errors import DataError
from vadapter.io import storage

_MAX_REASONS = 100  # per shard; the others are only counted


@dataclasses.dataclass
class Scan:
    """The scan of one shard."""

    name: str  # its path, relative to the folder
    size: int
    mtime_ns: int  # if it or `size` differs, it is another file
    sha256: str = ""  # of all its bytes, "" where they were not read
    # (name, offset, size), in the order of the shard
    members: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    # name -> why the member is not in `members`, at most `_MAX_REASONS` of `skips`
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    skips: int = 0
    # (index of the media in `members`, or -1; JSON of [key, captions, questions, fault]). The texts
    # of a pair with a fault are empty: it keeps its place, and is masked.
    pairs: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    suffixes: list[str] = dataclasses.field(default_factory=list)  # of the pairs' media
    bad: int = 0  # number of pairs with a fault
    first_bad: str = ""  # the first such fault
    fault: str = ""  # why the shard has no pairs, or ambiguous ones; "" if it has pairs
    digest: str = ""  # the SHA-256 of members and pairs


def scan(folder: Path, name: str) -> Scan:
    """Read the headers of a shard, and the texts in it.

    Raises:
      DataError: missing, truncated or corrupt, not a shard, or a duplicate name.
    """
    result = SCANNERS[PurePosixPath(name).suffix](folder / name, name)
    result.digest = hashlib.sha256(json.dumps([result.members, result.pairs]).encode()).hexdigest()
    return result


def _scan_tar(path: Path, name: str) -> Scan:
    index = tar.scan(path, MEDIA_SUFFIXES | {".txt", ".json"})
    result = Scan(name, index.shard.size, index.shard.mtime_ns, skips=len(index.skipped))
    result.members = [(member, *span) for member, span in index.members.items()]
    result.skipped = dict(itertools.islice(index.skipped.items(), _MAX_REASONS))
    _pair(result, index, str(path))
    return result


def _pair(result: Scan, index: tar.TarIndex, path: str) -> None:
    groups: dict[str, dict[str, str]] = {}  # key -> {"media" | ".txt" | ".json": member}
    for name in index.members:
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.split(".")[0]
        suffix = PurePosixPath(name).suffix.lower()
        slot = "media" if suffix in MEDIA_SUFFIXES else suffix
        if groups.setdefault(key, {}).setdefault(slot, name) != name:
            result.fault = f"{path}: {name!r} is a second {slot} of {key!r}; keep one"
            return
    if groups and all(group.keys() == {"media"} for group in groups.values()):
        result.fault = _missing_half(path, *next(iter(groups.items())))  # images alone: no entries
        return
    rows = {name: row for row, name in enumerate(index.members)}
    for key, group in groups.items():
        captions, qa, fault = _texts(index, path, key, group)
        if fault:
            result.bad += 1
            result.first_bad = result.first_bad or fault
        row = rows[group["media"]] if "media" in group else -1
        result.pairs.append((row, json.dumps([key, captions, qa, fault])))
    media = (PurePosixPath(group["media"]) for group in groups.values() if "media" in group)
    result.suffixes = sorted({name.suffix.lower() for name in media})


def _texts(index: tar.TarIndex, path: str, key: str, group: dict[str, str]) -> Any:
    """Return (captions, questions, fault) of a pair."""
    name = group.get(".txt", group.get(".json", ""))
    if not name or "media" not in group:
        return (), (), _missing_half(path, key, group)
    location = f"{path}: {name}"
    try:
        if index.members[name][1] > annotation_tables.MAX_TEXT_BYTES:
            raise DataError(f"{location}: longer than {annotation_tables.MAX_TEXT_BYTES} bytes")
        data = index.read(name)
        if name.lower().endswith(".json"):
            row = annotation_tables.parse(data, location)
        else:
            row = {"caption": data.decode("utf-8-sig")}
        return *annotation_tables.texts(location, row), ""
    except UnicodeDecodeError as error:
        return (), (), f"{location}: not UTF-8 ({error}); write the shard again"
    except DataError as error:
        return (), (), str(error)


def _missing_half(path: str, key: str, group: dict[str, str]) -> str:
    return (
        f"{path}: {key!r} has only {', '.join(group.values())}; add the missing half, or put the "
        "texts beside the shards, in captions.jsonl or qa.jsonl"
    )


def _scan_parquet(path: Path, name: str) -> Scan:
    from vadapter.data.shards.parquet_rows import row_groups

    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    facts, first = storage.facts(path), 0
    result = Scan(name, facts["size"], facts["mtime_ns"])
    for number, rows in enumerate(row_groups(path)):
        result.members.append((f"{name}/{number}", first, rows))
        first += rows
    return result


SCANNERS = {".tar": _scan_tar, ".parquet": _scan_parquet}
