"""The official files: side by side, in their folders, or in archives, which are read in place.

Annotations are JSON, CSV or text; images and clips are found by name.
"""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from vadapter.data.benchmarks.benchmark import Benchmark, File, MediaSet
from vadapter.data.media.images import MEDIA_SUFFIXES
from vadapter.data.shards import tar, zips
from vadapter.errors import DataError

_MAX_TEXT = 2 << 30  # bytes; the largest official annotation file has 0.4 GB


class ArchivedFile(NamedTuple):
    """A file in an archive."""

    shard: tar.Shard | zips.ZipShard
    name: str
    position: tuple[Any, ...]  # what the index says about the member; identifies the content

    def __str__(self) -> str:
        return f"{self.shard.path}: {self.name}"

    def read_bytes(self) -> bytes:
        """Return the content, uncompressed. Raises DataError if it is corrupt."""
        if isinstance(self.shard, zips.ZipShard):
            return self.shard.read(self.name)
        return self.shard.read(*self.position)


Stored = Path | ArchivedFile


def locate(folder: Path, file: File, split: str) -> Stored | None:
    """Return where an annotation file is stored, None if it is missing."""
    for name in file.names(split):
        for inner in ("", *file.folders):
            if (path := folder / inner / name).is_file():
                return path
        for pattern in file.archives:
            for path in sorted(folder.glob(pattern)):
                index = zips.scan(path, {Path(name).suffix}, max_bytes=_MAX_TEXT)
                for member, position in index.members.items():
                    if member.rpartition("/")[2] == name:
                        return ArchivedFile(index.shard, member, position)
    return None


def _csv_rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


_PARSERS: dict[str, Callable[[str], Any]] = {".csv": _csv_rows, ".txt": _lines}


@contextlib.contextmanager
def opened(folder: Path, file: File, split: str) -> Iterator[tuple[str, Any]]:
    """Yield the location of an annotation file, for messages, and its content.

    The content is a list of rows {column: cell} for .csv, a list of the stripped lines that are not
    blank for .txt, and otherwise the parsed JSON.

    Raises:
      DataError: the file is missing, unreadable, not UTF-8 or not in its format (names its official
        page), or its content raises an error in the block.
    """
    if (stored := locate(folder, file, split)) is None:
        raise DataError(missing_file(folder, file, split))
    suffix = Path(str(stored)).suffix
    try:
        content = _PARSERS.get(suffix, json.loads)(stored.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        kind = "UTF-8" if isinstance(error, UnicodeDecodeError) else suffix[1:].upper()
        problem = "cannot be read" if isinstance(error, OSError) else f"not {kind}"
        raise DataError(f"{stored}: {problem} ({error}); download it again: {file.page}") from error
    try:
        yield str(stored), content
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{stored}: not in the official format ({problem}); download the official file again"
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


def find_media(benchmark: Benchmark, folder: Path, split: str) -> dict[str, Stored]:
    """Return all images or clips of a split that are present, by file name without suffix.

    Raises:
      DataError: a set of them is missing, or an archive is corrupt.
    """
    media: dict[str, Stored] = {}
    for media_set in media_sets(benchmark, split):
        holders = find_holders(folder, media_set, split)
        if not holders:
            raise DataError(missing_media(folder, media_set, split))
        for path in holders:
            if path.is_dir():
                with os.scandir(path) as entries:
                    # Sorted: of two files with one stem every machine takes the same one.
                    for entry in sorted(entries, key=lambda entry: entry.name):
                        if Path(entry.name).suffix.lower() in MEDIA_SUFFIXES and entry.is_file():
                            media.setdefault(Path(entry.name).stem, Path(entry.path))
            else:
                index = (zips if path.suffix.lower() == ".zip" else tar).scan(path, MEDIA_SUFFIXES)
                for name, position in index.members.items():
                    archived = ArchivedFile(index.shard, name, position)
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
