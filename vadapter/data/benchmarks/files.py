"""The official files where they lie: beside each other, in their folders, or in their archives.

Nothing is extracted. Annotations are JSON, JSON lines or CSV; images and clips are found by name.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vadapter.data.benchmarks.benchmark import Benchmark, File, Place
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.data.shards import tar, zips
from vadapter.errors import DataError

_MAX_TEXT = 2 << 30  # the largest official annotation file has 0.4 GB
_MEDIA = IMAGE_SUFFIXES | CLIP_SUFFIXES


class Stored(NamedTuple):
    """An image or clip in an archive."""

    shard: tar.Shard
    place: Any  # of tar: (offset, size); of zip: zips.Member

    def read(self) -> bytes:
        """Its content, as it was before it was archived. Raises DataError if it is damaged."""
        if isinstance(self.place, zips.Member):
            return zips.read(self.shard, self.place)
        return self.shard.read(*self.place)


def locate(folder: Path, file: File, split: str) -> tuple[Path, str] | None:
    """Where an annotation file lies: (path, "") or (archive, its name in it); None if nowhere."""
    for name in file.names(split):
        for inner in ("", *file.folders):
            if (path := folder / inner / name).is_file():
                return path, ""
        for pattern in file.archives:
            for path in sorted(folder.glob(pattern)):
                index = zips.scan(path, {Path(name).suffix}, max_bytes=_MAX_TEXT)
                for member in index.members:
                    if member.rpartition("/")[2] == name:
                        return path, member
    return None


def read_text(folder: Path, file: File, split: str) -> tuple[str, str]:
    """An annotation file: where it lies, for messages, and its text.

    Raises:
      DataError: it is missing (names its official page), unreadable or not UTF-8.
    """
    found = locate(folder, file, split)
    if found is None:
        raise DataError(missing(folder, file, split))
    path, member = found
    where = f"{path}: {member}" if member else str(path)
    try:
        if member:
            index = zips.scan(path, {Path(member).suffix}, max_bytes=_MAX_TEXT)
            data = zips.read(index.shard, index.members[member])
        else:
            data = path.read_bytes()
        return where, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); get it again: {file.page}") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read ({error}); get it again: {file.page}") from error


def missing(folder: Path, file: File, split: str) -> str:
    """What to do about an annotation file that is nowhere."""
    inside = f" (or {', '.join(file.archives)} with it)" if file.archives else ""
    return f"{folder}: no {' or '.join(file.names(split))}{inside}; put it there, from {file.page}"


def read_json(folder: Path, file: File, split: str) -> tuple[str, Any]:
    """As `read_text`, parsed. DataError too if it is not JSON."""
    where, text = read_text(folder, file, split)
    try:
        return where, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); get it again: {file.page}") from error


def read_csv(folder: Path, file: File, split: str) -> tuple[str, list[dict[str, Any]]]:
    """As `read_text`, as rows by the names of the columns."""
    where, text = read_text(folder, file, split)
    try:
        return where, list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{where}: not CSV ({error}); get it again: {file.page}") from error


@contextlib.contextmanager
def official(where: str) -> Iterator[None]:
    """Turns what a reader trips over into a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{where}: not in the official format ({what}); get the official file again"
        ) from error


def find_media(benchmark: Benchmark, folder: Path, split: str) -> dict[str, Path | Stored]:
    """All images or clips that are there for a split, by the name of the file without suffix.

    Raises:
      DataError: a set of them is nowhere, or an archive is damaged.
    """
    found: dict[str, Path | Stored] = {}
    for place in places(benchmark, split):
        paths = holders(folder, place, split)
        if not paths:
            raise DataError(no_media(folder, place, split))
        for path in paths:
            if path.is_dir():
                with os.scandir(path) as entries:
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if Path(entry.name).suffix.lower() in _MEDIA and entry.is_file():
                            found.setdefault(Path(entry.name).stem, Path(entry.path))
            else:
                index = (zips if path.suffix.lower() == ".zip" else tar).scan(path, _MEDIA)
                for name, at in index.members.items():
                    found.setdefault(PurePosixPath(name).stem, Stored(index.shard, at))
    return found


def places(benchmark: Benchmark, split: str) -> list[Place]:
    """The sets of images or clips that a split needs."""
    return [place for place in benchmark.places if split in place.splits]


def holders(folder: Path, place: Place, split: str) -> list[Path]:
    """The folders and archives of a set of images or clips that are there."""
    of = place.splits[split]
    inner = [folder / name.format(split=of) for name in place.folders]
    patterns = [pattern.format(split=of) for pattern in place.archives]
    found = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in inner if path.is_dir()] + found


def is_there(benchmark: Benchmark, folder: Path, split: str) -> bool:
    """Whether all annotation files of a split are there, and all sets of its images or clips."""
    files = [file for file in benchmark.files if split in file.splits]
    return all(locate(folder, file, split) for file in files) and all(
        holders(folder, place, split) for place in places(benchmark, split)
    )


def no_media(folder: Path, place: Place, split: str) -> str:
    """What to do about images or clips that are nowhere."""
    names = [name.format(split=place.splits[split]) for name in (*place.folders, *place.archives)]
    return f"{folder}: no {' or '.join(names)}; put it there, from {place.page}"
