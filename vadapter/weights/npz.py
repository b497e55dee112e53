"""A careful reader of .npz archives.

A weights file may come from anywhere. It is never unpickled, and no tensor is read before the sizes
that it declares are checked.
"""

import collections
import io
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vadapter.weights.files import naming, require_file

_MAX_HEADER = 2**16 + 16  # bytes; numpy writes longer ones only for records
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def read_npz(path: Path, *, max_bytes: int) -> dict[str, np.ndarray]:
    """Read every array of an .npz archive, which `numpy.savez` or `savez_compressed` wrote.

    Returns:
      Name to array, in the archive's order, dtypes as stored (bool, integer or float).

    Raises:
      CheckpointError: the file is missing, corrupt, larger than `max_bytes` once decompressed, or
        holds anything but plain arrays, such as a pickled object.
    """
    return _read_members(path, max_bytes, _read_npy)


def read_npz_headers(path: Path, *, max_bytes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of every array of an .npz archive, reading headers only."""

    def header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> jax.ShapeDtypeStruct:
        _, shape, dtype = _read_header(archive, member, _MAX_HEADER)
        return jax.ShapeDtypeStruct(shape, dtype)

    return _read_members(path, max_bytes, header)


def _read_members(
    path: Path, max_bytes: int, read: Callable[[zipfile.ZipFile, zipfile.ZipInfo], Any]
) -> dict[str, Any]:
    require_file(path)
    with naming(path), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        total = sum(m.file_size for m in members)
        if total > max_bytes:
            raise ValueError(f"it holds {total} bytes decompressed, more than {max_bytes}")
        names = [m.filename.removesuffix(".npy") for m in members]
        if repeated := [name for name, n in collections.Counter(names).items() if n > 1]:
            raise ValueError(f"it holds {repeated} more than once")
        return {name: read(archive, member) for name, member in zip(names, members, strict=True)}


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Return one array of the archive; raise ValueError if it is not what its header says."""
    data, _, _ = _read_header(archive, member, member.file_size)
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)


def _read_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int
) -> tuple[io.BytesIO, tuple[int, ...], np.dtype]:
    """Return the first `limit` bytes of an array, its shape and its dtype."""
    name = member.filename
    if not name.endswith(".npy"):
        raise ValueError(f"member {name!r} is not an array")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"member {name!r} is compressed in a way that numpy does not write")
    with archive.open(member) as stream:  # decompresses no more than `limit`
        data = io.BytesIO(stream.read(min(limit, member.file_size)))
    version = np.lib.format.read_magic(data)
    if version not in _HEADERS:
        raise ValueError(f"member {name!r} has format version {version}, which is unknown")
    shape, _, dtype = _HEADERS[version](data)
    if dtype.kind not in "biuf":
        raise ValueError(f"member {name!r} holds {dtype}, not numbers; objects are never unpickled")
    # Checked before numpy allocates what the header declares.
    declared, present = math.prod(shape) * dtype.itemsize, member.file_size - data.tell()
    if declared != present or min(shape, default=0) < 0:
        raise ValueError(f"member {name!r} declares {dtype}{list(shape)} but has {present} bytes")
    return data, shape, dtype
