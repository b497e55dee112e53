"""Zip archives read in place, as `shards.tar` reads tars: an index, and random access by name.

Nothing is ever extracted. Members that are neither stored nor deflated, encrypted ones and names
that climb out of the archive are left out of the index, with the reason.
"""

import functools
import os
import threading
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from vadapter.data.shards.tar import MAX_MEMBER_BYTES, file_refusal
from vadapter.errors import DataError
from vadapter.io import storage

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What zipfile raises for members that it cannot read.
_CORRUPT = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, KeyError)


@functools.lru_cache(maxsize=32)
def _archive(
    path: str, size: int, mtime_ns: int, process: int
) -> tuple[zipfile.ZipFile, threading.Lock]:
    """Return an archive, opened once per version and process, and the lock that guards it.

    A forked process shares its parent's file offset, and ZipFile's count of readers is not
    thread-safe: hence an archive per process, and one reader at a time.
    """
    del size, mtime_ns, process
    return zipfile.ZipFile(path), threading.Lock()


class ZipShard(NamedTuple):
    """Members of one zip archive by name. The fields are those of `tar.Shard`; as safe to share."""

    path: str
    size: int
    mtime_ns: int

    def read(self, name: str) -> bytes:
        """Return the content of the member `name`.

        Raises:
          DataError: the archive cannot be read or has changed since it was indexed, or the member
            is corrupt.
        """
        try:
            status = os.stat(self.path)
            if (status.st_size, status.st_mtime_ns) != self[1:]:
                raise DataError(f"{self.path}: changed since it was indexed; restart to index it")
            archive, lock = _archive(*self, os.getpid())
            with lock, archive.open(name) as member:
                size = archive.getinfo(name).file_size
                data = member.read(size + 1)  # bounded: a stream may unpack to more than it claims
            if len(data) != size:
                raise zipfile.BadZipFile(f"{len(data)} bytes instead of {size}")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error}); restore it") from error
        except _CORRUPT as error:
            raise DataError(
                f"{self.path}: member {name!r} is corrupt ({error}); download the archive again"
            ) from error
        return data


class ZipIndex(NamedTuple):
    """The members of an archive, as `tar.TarIndex`."""

    shard: ZipShard
    # name -> (offset of its header, compressed size, size, deflated, CRC-32)
    members: dict[str, tuple[int, int, int, bool, int]]
    skipped: dict[str, str]


def scan(path: Path, suffixes: Collection[str], *, max_bytes: int = MAX_MEMBER_BYTES) -> ZipIndex:
    """Index a zip archive by reading its directory only; the arguments are those of `tar.scan`.

    Raises:
      DataError: not a zip archive, or truncated.
    """
    try:
        facts = storage.facts(path)
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(
            f"{path}: not a readable zip archive ({error}); download it again"
        ) from error
    members, skipped = {}, {}
    for info in infos:
        if reason := _refusal(info, suffixes, max_bytes):
            skipped[info.filename] = reason
        else:
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            position = info.header_offset, info.compress_size, info.file_size, deflated, info.CRC
            members[info.filename] = position
    return ZipIndex(ZipShard(str(path), **facts), members, skipped)


def _refusal(info: zipfile.ZipInfo, suffixes: Collection[str], max_bytes: int) -> str:
    """Return why a member is left out of the index, or ""."""
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in _METHODS:
        return f"compression method {info.compress_type} is not read"
    return file_refusal(info.filename, info.file_size, suffixes, max_bytes)
