"""Millions of small records as a few arrays, in memory or mapped from one file.

A Python object takes some hundred bytes and must be pickled for every worker; a column takes the
bytes of its values, and workers share a mapped file.

File: the safetensors layout (u64 length, JSON header, data), so that any safetensors reader opens
it; the header holds the table's metadata and the SHA-256 of everything.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vadapter.errors import DataError
from vadapter.io import storage

_DTYPES = {"U8": np.uint8, "U64": np.uint64, "I64": np.int64}
_MAX_HEADER = 256 << 20

Columns = dict[str, np.ndarray]


class Strings:
    """n concatenated byte strings: the data u8[sum of lengths], and the end of each, i64[n]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    @classmethod
    def pack(cls, items: Iterable[bytes]) -> "Strings":
        """Return byte strings as columns; the iterable is read once."""
        data, ends = bytearray(), []
        for item in items:
            data += item
            ends.append(len(data))
        return cls(np.frombuffer(bytes(data), np.uint8), np.array(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes()


def write(path: Path, columns: Columns, metadata: Mapping[str, Any]) -> None:
    """Write a file of columns atomically, so that a killed process leaves no part of one.

    Args:
      columns: u8, u64 or i64 arrays of one dimension.
      metadata: JSON values.
    """
    with storage.written_locally(path) as file:
        _write(file, columns, metadata)


def _write(path: Path, columns: Columns, metadata: Mapping[str, Any]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.new")
    words = json.dumps(metadata)
    # "words" is the metadata as text, since the digest is of these exact bytes.
    header = {"sha256": digest(columns, words), "words": words}
    try:
        # One key: safetensors does not keep the order of several.
        save_file(columns, part, metadata={"index": json.dumps(header)})
        with open(part, "r+b") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, *, verify: bool = True) -> tuple[Columns, dict[str, Any]]:
    """Return (columns, metadata) of a file; the columns are memory-mapped.

    A file in a bucket is first copied to a cache on this machine's disk.

    Args:
      path: the file.
      verify: compare the digest, which reads the file once.

    Raises:
      DataError: missing, of another format, truncated or corrupt.
    """
    try:
        copy = storage.local_copy(path)
        with copy.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        stored = json.loads(header.pop("__metadata__")["index"])
        columns = {
            name: _map(copy, _DTYPES[entry["dtype"]], 8 + length, entry)
            for name, entry in header.items()
        }
        if verify and digest(columns, stored["words"]) != stored["sha256"]:
            raise ValueError("SHA-256 mismatch")
        metadata = json.loads(stored["words"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a readable index ({error}); remove it") from error
    return columns, metadata


def digest(columns: Columns, words: str) -> str:
    """Return the SHA-256 (hex) of the columns' names and contents and of the metadata."""
    total = hashlib.sha256(words.encode())
    for name in sorted(columns):
        total.update(name.encode())
        total.update(np.ascontiguousarray(columns[name]).view(np.uint8).data)
    return total.hexdigest()


def _map(path: Path, dtype: Any, base: int, entry: dict[str, Any]) -> np.ndarray:
    start, end = entry["data_offsets"]
    (count,) = entry["shape"]
    if end - start != count * np.dtype(dtype).itemsize or start < 0:
        raise ValueError("the length of a column contradicts the header")
    if not count:  # an empty file region cannot be mapped
        return np.zeros(0, dtype)
    if base + end > path.stat().st_size:
        raise ValueError("truncated")
    return np.memmap(path, dtype, "r", base + start, (count,))
