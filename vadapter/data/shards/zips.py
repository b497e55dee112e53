"""Zip archives read in place, as `shards.tar` reads tars: an index, and random access.

Nothing is ever extracted. Members that are neither stored nor deflated, encrypted ones and names
that climb out of the archive are left out, with the reason.

Format: PKWARE APPNOTE 6.3.10, with zip64; one volume.
"""

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vadapter.data.shards.tar import MAX_MEMBER_BYTES, Shard
from vadapter.errors import DataError

_HEADER = struct.Struct("<4s22xHH")  # signature, lengths of the name and of the extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Member(NamedTuple):
    """Where the content of a member lies, in bytes, and how to check it."""

    header: int
    packed: int
    size: int
    deflated: bool
    crc: int


@dataclasses.dataclass(frozen=True)
class ZipIndex:
    """What one archive holds: its members by name, and why others are not among them."""

    shard: Shard
    members: dict[str, Member]
    skipped: dict[str, str]


def scan(
    path: str | Path, suffixes: Collection[str], *, max_bytes: int = MAX_MEMBER_BYTES
) -> ZipIndex:
    """Indexes a zip archive by reading its directory only.

    Args:
      path: the archive.
      suffixes: the allowed endings, lower case, such as ".jpg"; names are compared in lower case.
      max_bytes: a larger member is left out.

    Raises:
      DataError: not a zip archive, or cut short.
    """
    path = Path(path)
    try:
        status = path.stat()
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable zip archive ({error}); get it again") from error
    members, skipped = {}, {}
    for info in infos:
        if info.is_dir():
            continue
        if reason := _refusal(info, suffixes, max_bytes):
            skipped[info.filename] = reason
        else:
            deflated = info.compress_type == zipfile.ZIP_DEFLATED
            members[info.filename] = Member(
                info.header_offset, info.compress_size, info.file_size, deflated, info.CRC
            )
    return ZipIndex(Shard(str(path), status.st_size, status.st_mtime_ns), members, skipped)


def read(shard: Shard, member: Member) -> bytes:
    """The content of a member.

    Raises:
      DataError: the archive has changed since it was indexed, or the member is damaged.
    """
    signature, name, extra = _HEADER.unpack(shard.read(member.header, _HEADER.size))
    if signature != b"PK\x03\x04":
        raise DataError(f"{shard.path}: no member at byte {member.header}; get the archive again")
    data = shard.read(member.header + _HEADER.size + name + extra, member.packed)
    try:
        if member.deflated:
            # Never more than the directory says, whatever the stream would grow to.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    except zlib.error as error:
        raise DataError(
            f"{shard.path}: the member at byte {member.header} is damaged ({error}); "
            "get the archive again"
        ) from error
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise DataError(
            f"{shard.path}: the member at byte {member.header} is damaged (its checksum differs); "
            "get the archive again"
        )
    return data


def _refusal(info: zipfile.ZipInfo, suffixes: Collection[str], max_bytes: int) -> str:
    """Why a member stays out of the index, or ""."""
    name = PurePosixPath(info.filename)
    if name.is_absolute() or ".." in name.parts:
        return "its name climbs out of the archive"
    if name.suffix.lower() not in suffixes:
        return f"files of type {name.suffix or '(none)'} are not read"
    if info.flag_bits & 0x1:
        return "encrypted"
    if info.compress_type not in _METHODS:
        return f"compression method {info.compress_type} is not read"
    if info.file_size > max_bytes:
        return f"{info.file_size} bytes, more than the {max_bytes} allowed"
    return ""
