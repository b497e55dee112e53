"""Tar shards read in place: an index of their members, and random access to the bytes.

Nothing is ever extracted, so a member's name is only a key and cannot reach the file system.
Only regular files of allowed types and sizes enter the index; links, devices, sparse files and
names that climb out of the archive are left out, with the reason. Of a shard in a bucket only the
requested byte ranges are fetched.

Format: POSIX.1-1988 ustar, with pax and GNU long names, uncompressed.
"""

import functools
import os
import tarfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vadapter.errors import DataError
from vadapter.io import storage

MAX_MEMBER_BYTES = 256 << 20
_BLOCK = 512
_HEADER_ERRORS = (tarfile.TarError, OSError, ValueError, ArithmeticError, LookupError)


class _Handle:
    """An open file that is closed when the last reference to it is dropped."""

    fd = -1

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self):
        if self.fd >= 0:
            os.close(self.fd)


@functools.lru_cache(maxsize=128)
def _handle(path: str, size: int, mtime_ns: int) -> _Handle:
    """Return the one open file of a shard's version; reads by offset make it safe to share."""
    del size, mtime_ns  # part of the key: a file that replaces another is opened again
    return _Handle(path)


class Shard(NamedTuple):
    """Bytes of one tar file by position. Holds no open file: pickle, fork and threads are safe."""

    path: str
    size: int  # of the file in bytes when it was indexed
    mtime_ns: int  # its modification time then, see `storage.facts`

    def read(self, offset: int, size: int) -> bytes:
        """Return the `size` bytes at `offset`.

        Raises:
          DataError: the file is missing, unreadable, or has changed since it was indexed.
        """
        try:
            if storage.remote(self.path):
                return storage.read_object(self.path, self.mtime_ns, offset, offset + size)
            handle = _handle(*self)
            data = os.pread(handle.fd, size, offset)
            now = os.fstat(handle.fd)
        except OSError as error:
            if storage.remote(self.path) and isinstance(error, FileNotFoundError):
                problem = "missing or changed since it was indexed; restart to use it"
            else:
                problem = f"cannot be read ({error}); restore the shard"
            raise DataError(f"{self.path}: {problem}") from error
        if (now.st_size, now.st_mtime_ns) != self[1:] or len(data) != size:
            raise DataError(f"{self.path}: changed since it was indexed; restart to use it")
        return data


class TarIndex(NamedTuple):
    """The members of one shard."""

    shard: Shard
    members: dict[str, tuple[int, int]]  # name -> (offset, size) in bytes, in their order
    skipped: dict[str, str]  # name -> why this member is not in `members`

    def read(self, name: str) -> bytes:
        """Return the content of the member `name`; KeyError if it is not in the index."""
        return self.shard.read(*self.members[name])


def scan(
    path: str | Path, suffixes: Collection[str], *, max_bytes: int = MAX_MEMBER_BYTES
) -> TarIndex:
    """Index an uncompressed tar file by reading its headers only.

    Members of more than `max_bytes`, and those whose suffix is not one of `suffixes`, in lower case
    (such as ".jpg"; case is ignored in names), are left out.

    Raises:
      DataError: not a plain tar file, truncated, corrupt between members, or a duplicate name.
    """
    path = storage.as_path(path)
    if not path.is_file():  # also keeps a FIFO from blocking the open
        raise DataError(f"{path}: no such file; check the path and the name of the split")
    facts = storage.facts(path)
    members, skipped = {}, {}
    try:
        with (
            path.open("rb") as file,
            tarfile.open(None, "r:", file, encoding="utf-8", errors="surrogateescape") as archive,
        ):
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore  # tarfile keeps 1 kB per member
                if member.isdir():
                    continue
                if reason := _refusal(member, suffixes, max_bytes):
                    skipped[member.name] = reason
                elif member.name in members:
                    raise DataError(f"{path}: contains {member.name!r} twice; write it again")
                elif member.offset_data + member.size > facts["size"]:
                    raise DataError(f"{path}: ends inside {member.name!r}; copy the shard again")
                else:
                    members[member.name] = (member.offset_data, member.size)
            end = archive.offset
    except (*_HEADER_ERRORS, RecursionError) as error:
        raise DataError(
            f"{path}: not a readable tar file ({error}); random access needs an intact, "
            "uncompressed tar (decompress .tar.gz first)"
        ) from error
    # tarfile takes a corrupt header for the end of the archive; the true end is zeros.
    if not _ends_in_zeros(path, end):
        raise DataError(
            f"{path}: no end mark at byte {end}, so members may be missing; copy the shard again "
            "(or write one archive where several were concatenated)"
        )
    return TarIndex(Shard(str(path), **facts), members, skipped)


def _refusal(member: tarfile.TarInfo, suffixes: Collection[str], max_bytes: int) -> str:
    """Return why a member is left out of the index, or ""."""
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
        return "not a regular file"
    if not member.name.isprintable():  # control characters, and bytes that are not UTF-8
        return "its name is not printable text"
    return file_refusal(member.name, member.size, suffixes, max_bytes)


def file_refusal(name: str, size: int, suffixes: Collection[str], max_bytes: int) -> str:
    """Return why a file of an archive is left out of the index, judged by name and size, or ""."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        return "its name climbs out of the archive"
    if path.suffix.lower() not in suffixes:
        return f"files of type {path.suffix or '(none)'} are not read"
    return f"{size} bytes, more than the {max_bytes} allowed" if size > max_bytes else ""


def _ends_in_zeros(path: Path, end: int) -> bool:
    """Return whether the file continues at `end` with at least one block of zeros and no more."""
    length = 0
    with path.open("rb") as file:
        file.seek(end)
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                return False
            length += len(chunk)
    return length >= _BLOCK
