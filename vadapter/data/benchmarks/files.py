"""The official files: side by side, in their folders, or in archives, which are read in place.

Annotations are JSON, JSON lines or CSV; images and clips are found by name.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vadapter.data.benchmarks.benchmark import Benchmark, File, MediaSet
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.data.shards import tar, zips
from vadapter.errors import DataError

_MAX_TEXT = 2 << 30  # bytes; the largest official annotation file has 0.4 GB
_MEDIA = IMAGE_SUFFIXES | CLIP_SUFFIXES


class ArchivedMedia(NamedTuple):
    """An image or clip in an archive.

    Attributes:
      shard: the archive.
      name: name of the member.
      position: what the index says about the member; identifies the content.
    """

    shard: tar.Shard | zips.ZipShard
    name: str
    position: tuple[Any, ...]

    def read(self) -> bytes:
        """Return the content, uncompressed. Raises DataError if it is corrupt."""
        if isinstance(self.shard, zips.ZipShard):
            return self.shard.read(self.name)
        return self.shard.read(*self.position)


def locate(folder: Path, file: File, split: str) -> tuple[Path, str] | None:
    """Return (path, "") of an annotation file, (archive, its name in it), or None if missing."""
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
    """Return the location of an annotation file, for messages, and its text.

    Raises:
      DataError: it is missing (names its official page), unreadable or not UTF-8.
    """
    located = locate(folder, file, split)
    if located is None:
        raise DataError(missing_file(folder, file, split))
    path, member = located
    location = f"{path}: {member}" if member else str(path)
    try:
        if member:
            index = zips.scan(path, {Path(member).suffix}, max_bytes=_MAX_TEXT)
            data = index.shard.read(member)
        else:
            data = path.read_bytes()
        return location, data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 ({error})"
    except OSError as error:
        problem = f"cannot be read ({error})"
    raise DataError(f"{location}: {problem}; download it again: {file.page}")


def read_json(folder: Path, file: File, split: str) -> tuple[str, Any]:
    """Return the location and the parsed JSON of an annotation file, as `read_text`.

    Raises:
      DataError: as `read_text`, or it is not JSON.
    """
    location, text = read_text(folder, file, split)
    try:
        return location, json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{location}: not JSON ({error}); download it again: {file.page}"
        ) from error


def read_csv(folder: Path, file: File, split: str) -> tuple[str, list[dict[str, Any]]]:
    """Return the location of an annotation file, and its rows as column -> cell, as `read_text`.

    Raises:
      DataError: as `read_text`, or it is not CSV.
    """
    location, text = read_text(folder, file, split)
    try:
        return location, list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise DataError(f"{location}: not CSV ({error}); download it again: {file.page}") from error


@contextlib.contextmanager
def official_format(location: str) -> Iterator[None]:
    """Turn errors of a reader in the block into a DataError that names the file."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{location}: not in the official format ({problem}); download the official file again"
        ) from error


def missing_file(folder: Path, file: File, split: str) -> str:
    """Return what to do about an annotation file that is missing."""
    archives = f" (or {', '.join(file.archives)} with it)" if file.archives else ""
    return (
        f"{folder}: no {' or '.join(file.names(split))}{archives}; put it there, from {file.page}"
    )


def missing_media(folder: Path, media_set: MediaSet, split: str) -> str:
    """Return what to do about images or clips that are missing."""
    patterns = (*media_set.folders, *media_set.archives)
    names = [pattern.format(split=media_set.splits[split]) for pattern in patterns]
    return f"{folder}: no {' or '.join(names)}; put it there, from {media_set.page}"


def find_media(benchmark: Benchmark, folder: Path, split: str) -> dict[str, Path | ArchivedMedia]:
    """Return all images or clips of a split that are present, by file name without suffix.

    Raises:
      DataError: a set of them is missing, or an archive is corrupt.
    """
    media: dict[str, Path | ArchivedMedia] = {}
    for media_set in media_sets(benchmark, split):
        holders = find_holders(folder, media_set, split)
        if not holders:
            raise DataError(missing_media(folder, media_set, split))
        for path in holders:
            if path.is_dir():
                with os.scandir(path) as entries:
                    # Sorted: of two files with one stem every machine takes the same one.
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if Path(entry.name).suffix.lower() in _MEDIA and entry.is_file():
                            media.setdefault(Path(entry.name).stem, Path(entry.path))
            else:
                index = (zips if path.suffix.lower() == ".zip" else tar).scan(path, _MEDIA)
                for name, position in index.members.items():
                    archived = ArchivedMedia(index.shard, name, position)
                    media.setdefault(PurePosixPath(name).stem, archived)
    return media


def media_sets(benchmark: Benchmark, split: str) -> list[MediaSet]:
    """Return the sets of images or clips that a split needs."""
    return [media_set for media_set in benchmark.media_sets if split in media_set.splits]


def find_holders(folder: Path, media_set: MediaSet, split: str) -> list[Path]:
    """Return the folders and archives of a set of images or clips that are present."""
    name = media_set.splits[split]
    folders = [folder / pattern.format(split=name) for pattern in media_set.folders]
    patterns = [pattern.format(split=name) for pattern in media_set.archives]
    archives = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    return [path for path in folders if path.is_dir()] + archives


def is_present(benchmark: Benchmark, folder: Path, split: str) -> bool:
    """Return whether all annotation files of a split and all its sets of media are present."""
    files = [file for file in benchmark.files if split in file.splits]
    return all(locate(folder, file, split) for file in files) and all(
        find_holders(folder, media_set, split) for media_set in media_sets(benchmark, split)
    )
