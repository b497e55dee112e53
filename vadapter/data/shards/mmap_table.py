"""Millions of small records as a few arrays, in memory or mapped from one file.

A Python object takes some hundred bytes and must be pickled for every worker; a column takes the
bytes of its values, and workers share a mapped file.

File: the safetensors layout (u64 length, JSON header, data), so that any safetensors reader opens
it; the header holds the table's metadata and the SHA-256 of everything.
"""

import hashlib
import json
from collections.abc import Mapping
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

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = int(self.ends[index - 1]) if index else 0
        return self.data[start : int(self.ends[index])].tobytes()


def write(path: Path, columns: Columns, metadata: Mapping[str, Any]) -> None:
    """Write a file of columns (u8, u64 or i64, of one dimension) and JSON values, atomically."""
    text = json.dumps(metadata)  # kept as text, since the digest is of these exact bytes
    header = {"sha256": _digest(columns, text), "words": text}
    with storage.replacing(path) as file:
        # One key: safetensors does not keep the order of several.
        save_file(columns, file, metadata={"index": json.dumps(header)})


def read(path: Path, *, verify: bool = True) -> tuple[Columns, dict[str, Any]]:
    """Return (columns, metadata) of a file; the columns are memory-mapped.

    A file in a bucket is first copied to a cache on this machine's disk. To `verify` the digest
    reads the file once.

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
        data = np.memmap(copy, np.uint8, "r")[8 + length :]
        columns = {name: _column(data, entry) for name, entry in header.items()}
        if verify and _digest(columns, stored["words"]) != stored["sha256"]:
            raise ValueError("SHA-256 mismatch")
        metadata = json.loads(stored["words"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path}: not a readable index ({error}); remove it") from error
    return columns, metadata


def _digest(columns: Columns, text: str) -> str:
    """Return the SHA-256 (hex) of the columns' names and contents and of the metadata."""
    total = hashlib.sha256(text.encode())
    for name in sorted(columns):
        total.update(name.encode())
        total.update(np.ascontiguousarray(columns[name]).view(np.uint8).data)
    return total.hexdigest()


def _column(data: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    (start, end), (count,) = entry["data_offsets"], entry["shape"]
    column = data[start:end].view(_DTYPES[entry["dtype"]])
    if start < 0 or len(column) != count:
        raise ValueError("truncated, or the length of a column contradicts the header")
    return column
