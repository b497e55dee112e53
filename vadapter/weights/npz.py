"""Reading public checkpoints: a careful .npz reader and a strict assignment of names.

A weights file may come from anywhere. It is never unpickled, and no tensor is read before the sizes
it announces have been checked. Every tensor of the file and every parameter of the model must be
accounted for; nothing is dropped, filled in or cast on the quiet.
"""

import collections
import io
import math
import zipfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from flax import traverse_util

from vadapter.errors import CheckpointError

# (stored, wanted): the casts `assign` makes by itself. They lose nothing.
_WIDENINGS = {(np.dtype(np.float16), np.dtype(np.float32))}
_MAX_HEADER = 2**16 + 16  # bytes; numpy writes a longer one for records alone
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def require_file(path: Path) -> Path:
    """Returns `path` if it is a file.

    Raises:
      CheckpointError: it is not; says where it was expected and what to set.
    """
    if path.is_file():
        return path
    raise CheckpointError(
        f"No weights file {path.name!r} in {path.parent}"
        f"{'' if path.parent.is_dir() else ' (the folder does not exist)'}. Put the file there, or "
        "set the weights path of the configuration (VADAPTER_DATA for the standard data folder) to "
        "where it lies."
    )


def read_npz(path: Path, *, max_bytes: int) -> dict[str, np.ndarray]:
    """Reads every array of an .npz archive.

    Args:
      path: the archive, as written by `numpy.savez` or `numpy.savez_compressed`.
      max_bytes: the most the archive may hold once decompressed.

    Returns:
      Name to array, in the archive's order, dtypes as stored (bool, integer or float).

    Raises:
      CheckpointError: the file is missing, damaged, larger than `max_bytes`, or holds anything but
        plain arrays (a pickled object, say).
    """
    return _read_members(path, max_bytes, _read_npy)


def read_npz_headers(path: Path, *, max_bytes: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every array of an .npz archive, none of which is read; as `read_npz`."""

    def header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> jax.ShapeDtypeStruct:
        _, shape, dtype = _read_header(archive, member, _MAX_HEADER)
        return jax.ShapeDtypeStruct(shape, dtype)

    return _read_members(path, max_bytes, header)


def _read_members(
    path: Path, max_bytes: int, read: Callable[[zipfile.ZipFile, zipfile.ZipInfo], Any]
) -> dict[str, Any]:
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            total = sum(m.file_size for m in members)
            if total > max_bytes:
                raise ValueError(f"it holds {total} bytes decompressed, more than {max_bytes}")
            names = [m.filename.removesuffix(".npy") for m in members]
            doubled = [name for name, n in collections.Counter(names).items() if n > 1]
            if doubled:
                raise ValueError(f"it holds {doubled} more than once")
            return {
                name: read(archive, member) for name, member in zip(names, members, strict=True)
            }
    except Exception as e:  # whatever a truncated, encrypted or crafted archive provokes
        raise CheckpointError(
            f"Cannot read the weights file {path}: {e}. Fetch it again, or point to another."
        ) from e


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """One array of the archive; ValueError if it is not what its header says."""
    data, _, _ = _read_header(archive, member, member.file_size)
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)


def _read_header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int
) -> tuple[io.BytesIO, tuple[int, ...], np.dtype]:
    """The first `limit` bytes of an array, its shape and its dtype; ValueError as `_read_npy`."""
    name = member.filename
    if not name.endswith(".npy"):
        raise ValueError(f"member {name!r} is not an array")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"member {name!r} is compressed in a way numpy does not write")
    with archive.open(member) as stream:  # reads no further than asked, whatever is packed in it
        data = io.BytesIO(stream.read(min(limit, member.file_size)))
    version = np.lib.format.read_magic(data)
    if version not in _HEADERS:
        raise ValueError(f"member {name!r} has the unknown format version {version}")
    shape, _, dtype = _HEADERS[version](data)
    if dtype.kind not in "biuf":
        raise ValueError(f"member {name!r} holds {dtype}, not numbers; objects are never unpickled")
    # Checked before numpy allocates what the header asks for.
    announced, present = math.prod(shape) * dtype.itemsize, member.file_size - data.tell()
    if announced != present or min(shape, default=0) < 0:
        raise ValueError(f"member {name!r} announces {dtype}{list(shape)} but has {present} bytes")
    return data, shape, dtype


def assign(
    params_abstract: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    name_table: Mapping[str, str],
    *,
    ignore: Collection[str] = (),
) -> dict[str, Any]:
    """Puts the tensors of a file into the parameter tree of a model, strictly.

    Args:
      params_abstract: nested dict whose leaves have `.shape` and `.dtype` (`jax.eval_shape`).
      tensors: name in the file to array.
      name_table: name in the file to path in the tree, parts joined by "/".
      ignore: names in the file that are left out on purpose.

    Returns:
      A tree like `params_abstract` of numpy arrays. float16 is widened where float32 is wanted;
      no other cast is made.

    Raises:
      CheckpointError: a parameter without a tensor, a tensor without a parameter, or another shape
        or dtype. The message names all of them.
      ValueError: `name_table` sends two names to one path.
    """
    leaves = account(params_abstract, tensors, name_table, ignore=ignore)
    arrays = {path: tensors[name].astype(to, copy=False) for path, (name, to) in leaves.items()}
    return traverse_util.unflatten_dict(arrays, sep="/")


def account(
    params_abstract: Mapping[str, Any],
    tensors: Mapping[str, Any],
    name_table: Mapping[str, str],
    *,
    ignore: Collection[str] = (),
) -> dict[str, tuple[str, np.dtype]]:
    """What `assign` puts where: path in the tree -> name in the file, and the dtype wanted.

    Arguments and errors are those of `assign`; of the tensors `.shape` and `.dtype` suffice.
    """
    wanted = traverse_util.flatten_dict(dict(params_abstract), sep="/")
    sources = {path: name for name, path in name_table.items()}
    if len(sources) != len(name_table):
        doubled = [p for p, n in collections.Counter(name_table.values()).items() if n > 1]
        raise ValueError(f"name_table sends several names to {doubled}")

    ignored = [name for name in tensors if name in ignore]
    missing = [
        f"{path} (in the file: {sources.get(path, 'not in the name table')})"
        for path in wanted
        if sources.get(path) not in tensors
    ]
    unexpected = [
        f"{name} {tensors[name].dtype}{list(tensors[name].shape)}"
        for name in tensors
        if name not in ignore and name_table.get(name) not in wanted
    ]
    leaves, mismatched = {}, []
    for path, leaf in wanted.items():
        name = sources.get(path)
        if name is None or name not in tensors:
            continue
        tensor, dtype = tensors[name], np.dtype(leaf.dtype)
        castable = tensor.dtype == dtype or (tensor.dtype, dtype) in _WIDENINGS
        if tuple(tensor.shape) != tuple(leaf.shape) or not castable:
            mismatched.append(
                f"{path}: model {dtype}{list(leaf.shape)}, "
                f"file {tensor.dtype}{list(tensor.shape)} ({name})"
            )
            continue
        leaves[path] = name, dtype

    if missing or unexpected or mismatched:
        report = (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
        lines = [f"The weights do not fit the model: {len(leaves)} parameters matched."]
        lines += [f"  {kind}: {entry}" for kind, entries in report for entry in entries]
        lines.append("Choose the configuration that belongs to these weights, or other weights.")
        raise CheckpointError("\n".join(lines))
    logging.info(
        "Weights: %d matched, 0 missing, 0 unexpected, %d left out on purpose %s",
        len(leaves),
        len(ignored),
        ignored,
    )
    return leaves
