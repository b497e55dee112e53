"""Reading safetensors checkpoints, one file or many, by slices.

A checkpoint may come from anywhere and may be larger than memory. The `safetensors` library checks
each header: offsets that overlap, leave holes or do not fit the shapes are its to find. Here stand
the checks that it leaves out, the index over shards, and reading: from the file straight into the
array, because a memory map counts as resident and dies of a truncated file. Nothing is unpickled.

Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vadapter.errors import CheckpointError
from vadapter.weights import npz

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 4 * 2**20  # some 40 000 tensors in a file, which a second is enough to judge
_MAX_INDEX = 16 * 2**20  # some 150 000 tensors
_BLOCK = 16 * 2**20  # bytes held beside the result while a slice is cut out of rows
_DTYPES = {
    **{f"I{8 * n}": np.dtype(f"i{n}") for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": np.dtype(f"u{n}") for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
    "BOOL": np.dtype(np.bool_),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
_LOOKALIKES = {  # first bytes of what is often found under the name of a weights file
    b"<": "it is a web page, a login or license page perhaps",
    b"version https://git-lfs": "it is a Git LFS pointer (`git lfs pull` fetches the weights)",
    b"PK": "it is a zip archive, as torch and numpy write them",
    b"\x80": "it is a pickle, which is never opened",
}
_FOREIGN = {  # suffix: what transformers must be told to convert such a file
    **dict.fromkeys([".bin", ".pt", ".pth", ".ckpt", ".pkl"], ""),
    ".msgpack": ", from_flax=True",
    ".h5": ", from_tf=True",
}
# The class is taken from config.json: AutoModel would leave the head of a language model out.
_CONVERT = (
    "import sys, transformers as t; a, b = sys.argv[1:]; "
    "m = getattr(t, t.AutoConfig.from_pretrained(a).architectures[0]); "
    "m.from_pretrained(a{told}).save_pretrained(b, safe_serialization=True)"
)
# Of a folder that open_clip alone describes, which is what makes its file a model of that library.
_OPEN_CLIP = "open_clip_config.json"
_CONVERT_OPEN_CLIP = (
    "import os, shutil, sys, open_clip.factory as o, safetensors.torch as s; a, b = sys.argv[1:]; "
    "w = {k: v.contiguous() for k, v in o.load_state_dict(a).items()}; os.makedirs(b); "
    "s.save_file(w, os.path.join(b, 'open_clip_model.safetensors')); "
    f"shutil.copy(os.path.join(os.path.dirname(a), '{_OPEN_CLIP}'), b)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a checkpoint says about one tensor; `start` is its first byte in `file`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    start: int


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """An open checkpoint: the tensors it holds, none of them read yet.

    No file stays open and none is mapped, so there is nothing to close, and threads may share it.

    Attributes:
      path: what was opened, for messages.
      tensors: name to shape, dtype and file.
      files: the files that hold them, each with its size and time of change.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: Mapping[Path, tuple[int, int]]

    @classmethod
    def open(cls, path: Path) -> "TensorFiles":
        """Reads and checks the headers of a checkpoint.

        Args:
          path: a .safetensors file, or a folder with model.safetensors.index.json and its shards,
            with model.safetensors, or with one .safetensors file under any name. Links are
            followed, as in the cache of the hub; shards are only looked for in the folder.

        Raises:
          CheckpointError: nothing to read there, a format that is never opened (pickles, say), a
            damaged file, or shards that are not what the index says. Names the file.
        """
        tensors, files = {}, {}
        with blaming(path):
            for file, listed in _shards(path).items():
                with blaming(file):
                    found, files[file] = _read_header(file)
                    if listed is not None and (odd := found.keys() ^ listed):
                        how = "lacks" if min(odd) in listed else "holds"
                        raise ValueError(f"it {how} tensor {min(odd)!r}, against {_INDEX}")
                    tensors |= found
        return cls(path, tensors, files)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Reads a tensor or a part of it.

        A slice of the first axis costs the bytes it holds. A slice of a later axis costs the rows
        it touches, which pass through memory 16 MiB at a time.

        Args:
          name: one of `tensors`.
          index: slices of step 1 for the leading axes, as numpy would take them; all by default.

        Returns:
          A new array, `tensor[index]`, of the dtype stored.

        Raises:
          CheckpointError: no such tensor, or the file was changed or damaged since `open`.
          ValueError: `index` has more slices than the tensor has axes, or other steps.
        """
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r}. Choose the configuration that belongs to "
                "these weights, or other weights."
            )
        info = self.tensors[name]
        bounds = _bounds(info.shape, index or ())
        out = np.empty([stop - start for start, stop in bounds], info.dtype)
        with self._reading(info.file) as f:
            if out.size:
                _fill(out, f, info.start, info.shape, bounds)
            if info.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
                raise ValueError(f"tensor {name!r} of booleans holds other bytes than 0 and 1")
        return out

    def digest(self) -> str:
        """The sha256, in hex, of the files' bytes one after the other, in the order of their names.

        Raises:
          CheckpointError: a file was changed since `open`.
        """
        whole = hashlib.sha256()
        for file in self.files:
            with self._reading(file) as f:
                hashlib.file_digest(f, lambda: whole)
        return whole.hexdigest()

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[BufferedReader]:
        with blaming(file), file.open("rb") as f:
            if _stamp(f) != self.files[file]:
                raise ValueError("it has changed since its header was read")
            yield f


@contextlib.contextmanager
def blaming(path: Path) -> Iterator[None]:
    """Turns whatever a damaged or crafted file provokes into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        # A message may quote the file: names of megabytes, control characters.
        what = "".join(c if c.isprintable() else "?" for c in str(e)[:400])
        raise CheckpointError(
            f"Cannot read the weights {path}: {what}. Fetch it again, or point to another."
        ) from e


def _shards(path: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and the tensors that the index, if there is one, names in each."""
    if not path.is_dir():
        _refuse_foreign([npz.require_file(path)])
        return {path: None}
    if (path / _INDEX).is_file():
        with blaming(path / _INDEX):
            return _read_index(path / _INDEX)
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" and p.is_file())
    if path / _SINGLE in files:
        return {path / _SINGLE: None}
    if len(files) > 1:
        raise ValueError(
            f"it holds {len(files)} .safetensors files ({files[0].name}, {files[1].name}, …) and "
            f"no {_INDEX} that joins them; add it, or name one file"
        )
    if not files:
        _refuse_foreign(sorted(path.iterdir()))
        raise ValueError(f"it holds neither {_SINGLE} nor {_INDEX}")
    return {files[0]: None}


def _refuse_foreign(files: list[Path]) -> None:
    """Refuses, by their names alone, files in formats that run code or need another framework."""
    told = {f: _FOREIGN[f.suffix.lower()] for f in files if f.suffix.lower() in _FOREIGN}
    if not told:
        return
    file = min(told, key=lambda f: (told[f], f))
    folder = file.absolute().parent
    library, script, source = "transformers", _CONVERT.format(told=told[file]), folder
    if told[file]:
        library = "transformers<5"
    elif (folder / _OPEN_CLIP).is_file() and not (folder / "config.json").is_file():
        library, script, source = "open_clip_torch", _CONVERT_OPEN_CLIP, file.absolute()
    raise CheckpointError(
        f"The weights {file} are not opened: only .safetensors is read, as other formats can run "
        f"code. Convert them where torch and {library} are installed, if you trust the file:\n  "
        + shlex.join(["python", "-c", script, str(source), f"{folder}-safetensors"])
        + "\nThen copy the tokenizer and preprocessor files into the new folder and point to it."
    )


def _read_index(path: Path) -> dict[Path, set[str] | None]:
    """The shards, each a file in the folder of the index, and their tensors; else ValueError."""
    with path.open("rb") as f:
        if _stamp(f)[0] > _MAX_INDEX:
            raise ValueError(f"it has {_stamp(f)[0]} bytes, more than {_MAX_INDEX}")
        data = f.read()
    recognize(data[:64])
    weight_map = _parse(data).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map from tensors to files")
    shards = {}
    for name, shard in weight_map.items():
        # A name, not a path: the index of a stranger decides which files are opened.
        if not re.fullmatch(r"[^/\\:]+\.safetensors", str(shard)):
            raise ValueError(f"it names {shard!r}, which is not the name of a shard in its folder")
        shards.setdefault(shard, set()).add(name)
    if missing := sorted(s for s in shards if not (path.parent / s).is_file()):
        raise ValueError(
            f"{len(missing)} of its {len(shards)} shards are not in the folder: {missing[:3]}; "
            "the download is not complete"
        )
    if (path.parent / _SINGLE).is_file() and _SINGLE not in shards:
        raise ValueError(f"{_SINGLE} lies beside it and is no shard of it; remove one of the two")
    return {path.parent / shard: shards[shard] for shard in sorted(shards)}


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], tuple[int, int]]:
    """The tensors of one file and its stamp; whatever is wrong raises some Exception."""
    with path.open("rb") as f:
        stamp = _stamp(f)
        head = f.read(64) if stamp[0] else b""  # what has no size need not end, or come at all
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8:
            raise ValueError(f"it has {len(head)} bytes, too few for a safetensors file")
        # Before the library: it takes seconds for what it still accepts, 100 MB.
        if length > min(stamp[0] - 8, _MAX_HEADER):
            recognize(head)
            raise ValueError(
                f"it announces a header of {length} bytes; the file has {stamp[0]}, and headers "
                f"of more than {_MAX_HEADER} are not read"
            )
        f.seek(8)
        header = f.read(length)
    try:
        with safe_open(path, framework="numpy"):  # offsets, shapes, dtypes and size must agree
            pass
    except Exception as e:
        raise ValueError(f"it is cut short or damaged; safetensors says: {e}") from e
    entries = _parse(header)
    entries.pop("__metadata__", None)
    if not entries:
        raise ValueError("it holds no tensors")
    tensors = {}
    for name, entry in entries.items():
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name!r} holds {entry['dtype']}, which is not read here")
        # A size of 0 hides any other number. numpy makes no such array, nor one of 65 axes.
        if len(shape) > 64 or math.prod(max(n, 1) for n in shape) >= 2**59:
            raise ValueError(f"tensor {name!r} has an absurd shape")
        tensors[name] = TensorInfo(shape, dtype, path, 8 + length + entry["data_offsets"][0])
    return tensors, stamp


def recognize(head: bytes) -> None:
    """ValueError if the first bytes of a file are those of a well-known other kind."""
    for start, what in _LOOKALIKES.items():
        if head.lstrip().startswith(start):
            raise ValueError(what)


def _parse(data: bytes) -> dict[str, Any]:
    """A JSON object, in which no name may come twice: one of the two would win on the quiet."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) != len(pairs):
            names = sorted(name for name, _ in pairs)
            doubled = next(a for a, b in itertools.pairwise(names) if a == b)
            raise ValueError(f"it names {doubled!r} more than once")
        return found

    parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(parsed, dict):
        raise ValueError("it does not hold a JSON object")
    return parsed


def _stamp(f: BufferedReader) -> tuple[int, int]:
    """Size in bytes and time of the last change in ns."""
    stat = os.fstat(f.fileno())
    return stat.st_size, stat.st_mtime_ns


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """Start and stop on every axis, within the shape."""
    index += (slice(None),) * (len(shape) - len(index))
    if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
        raise ValueError(f"{index} is not one slice of step 1 for each axis of {list(shape)}")
    limits = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in limits]


def _fill(
    out: np.ndarray,
    f: BufferedReader,
    offset: int,
    shape: tuple[int, ...],
    bounds: list[tuple[int, int]],
) -> None:
    """Reads the part within `bounds` of the tensor of `shape` that begins at byte `offset`."""
    row = math.prod(shape[1:]) * out.itemsize
    start, stop = bounds[0] if shape else (0, 1)
    if bounds[1:] == [(0, n) for n in shape[1:]]:  # one piece of the file
        f.seek(offset + start * row)
        # Through bytes: bfloat16 and its like have no buffer of their own.
        if f.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
            raise ValueError("it ends within a tensor")
    elif row > _BLOCK:
        for i in range(start, stop):
            _fill(out[i - start], f, offset + i * row, shape[1:], bounds[1:])
    else:
        inner = tuple(slice(*b) for b in bounds[1:])
        block = np.empty((min(_BLOCK // row, stop - start), *shape[1:]), out.dtype)
        for i in range(start, stop, len(block)):
            rows = block[: stop - i]
            _fill(rows, f, offset + i * row, rows.shape, [(0, n) for n in rows.shape])
            out[i - start : i - start + len(rows)] = rows[(slice(None), *inner)]
