"""What one shard holds, as an index keeps it.

A tar's members are its files; its texts are those that lie in it beside the media, as webdataset
and img2dataset write them: `key.jpg` (or .png, .webp, .mp4, .avi, .webm, .gif) with `key.txt` (one
caption) or `key.json` (a row as in `annotation_tables`; img2dataset's has the key "caption" among
many others). The key is the name to its first dot. Of a parquet file the members are its row
groups, with the number of their first row in the place of the offset, and of their rows in that of
the size.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from vadapter.data.annotations import annotation_tables
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.data.shards import tar
from vadapter.errors import DataError

MEDIA = IMAGE_SUFFIXES | CLIP_SUFFIXES
_KEPT = 100  # reasons a shard; the others are counted


@dataclasses.dataclass
class Scan:
    """One shard.

    Attributes:
      name: its path, relative to the folder.
      size, mtime_ns: of the file; another of them is another file.
      sha256: of all its bytes, "" where they were not read.
      members: (name, offset, size), in the order of the shard.
      skipped: name -> why this member is not among them; some of them.
      skips: how many there are.
      pairs: (the media's place in `members`, or -1; JSON of [key, captions, questions, fault]).
        The texts of a pair with a fault are empty: it keeps its place, and is masked.
      suffixes: those of the pairs' media.
      bad: how many pairs have a fault; first_bad: the first of them.
      fault: why it has no pairs at all, or none that can be told apart; "" if it has.
      digest: the sha256 of members and pairs.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str = ""
    members: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)
    skips: int = 0
    pairs: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    suffixes: list[str] = dataclasses.field(default_factory=list)
    bad: int = 0
    first_bad: str = ""
    fault: str = ""
    digest: str = ""


def scan(folder: Path, name: str) -> Scan:
    """Reads the headers of a shard, and the texts in it.

    Raises:
      DataError: missing, torn or damaged, no shard at all, or a name twice.
    """
    made = SCANNERS[PurePosixPath(name).suffix](folder / name, name)
    made.digest = hashlib.sha256(json.dumps([made.members, made.pairs]).encode()).hexdigest()
    return made


def _scan_tar(path: Path, name: str) -> Scan:
    index = tar.scan(path, MEDIA | {".txt", ".json"})
    made = Scan(
        name,
        index.shard.size,
        index.shard.mtime_ns,
        members=[(member, *span) for member, span in index.members.items()],
        skipped=dict(list(index.skipped.items())[:_KEPT]),
        skips=len(index.skipped),
    )
    _pair(made, index, str(path))
    return made


def _pair(made: Scan, index: tar.TarIndex, path: str) -> None:
    groups: dict[str, dict[str, str]] = {}  # key -> {"media" | ".txt" | ".json": member}
    for name in index.members:
        folder, slash, base = name.rpartition("/")
        key = folder + slash + base.split(".")[0]
        suffix = PurePosixPath(name).suffix.lower()
        slot = "media" if suffix in MEDIA else suffix
        if groups.setdefault(key, {}).setdefault(slot, name) != name:
            made.fault = f"{path}: {name!r} is the second {slot} of {key!r}; keep one"
            return
    if groups and all(group.keys() == {"media"} for group in groups.values()):
        made.fault = _half(path, *next(iter(groups.items())))  # not worth an entry each
        return
    place = {name: number for number, name in enumerate(index.members)}
    for key, group in groups.items():
        captions, qa, fault = _words(index, path, key, group)
        if fault:
            made.bad += 1
            made.first_bad = made.first_bad or fault
        media = place[group["media"]] if "media" in group else -1
        made.pairs.append((media, json.dumps([key, captions, qa, fault])))
    names = (PurePosixPath(group["media"]) for group in groups.values() if "media" in group)
    made.suffixes = sorted({name.suffix.lower() for name in names})


def _words(index: tar.TarIndex, path: str, key: str, group: dict[str, str]) -> Any:
    text = group.get(".txt", group.get(".json", ""))
    if not text or "media" not in group:
        return (), (), _half(path, key, group)
    where = f"{path}: {text}"
    try:
        if index.members[text][1] > annotation_tables.MAX_TEXT_BYTES:
            raise DataError(f"{where}: a text has at most {annotation_tables.MAX_TEXT_BYTES} bytes")
        return *annotation_tables.texts(where, _row(index.read(text), where, text)), ""
    except DataError as error:
        return (), (), str(error)


def _half(path: str, key: str, group: dict[str, str]) -> str:
    return (
        f"{path}: {key!r} has only {', '.join(group.values())}; add the missing half, or put the "
        "texts beside the shards, in captions.jsonl or qa.jsonl"
    )


def _row(data: bytes, where: str, name: str) -> dict[str, Any]:
    if name.lower().endswith(".json"):
        return annotation_tables.parse(data, where)
    try:
        return {"caption": data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); write the shard again") from error


def _scan_parquet(path: Path, name: str) -> Scan:
    from vadapter.data.shards.parquet_rows import row_groups

    status = path.stat() if path.is_file() else None
    if status is None:
        raise DataError(f"{path}: no such file; check the path")
    members, first = [], 0
    for number, rows in enumerate(row_groups(path)):
        members.append((f"{name}/{number}", first, rows))
        first += rows
    return Scan(name, status.st_size, status.st_mtime_ns, members=members)


SCANNERS: dict[str, Callable[[Path, str], Scan]] = {
    ".tar": _scan_tar,
    ".parquet": _scan_parquet,
}
