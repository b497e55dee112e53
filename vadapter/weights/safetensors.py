"""Reading of safetensors checkpoints, one file or many, by slices.

A checkpoint may come from anywhere and may be larger than memory. The `safetensors` library checks
each header for offsets that overlap, leave holes or do not fit the shapes. This module adds the
checks that the library leaves out, the index over shards, and reads from the file straight into the
array: pages of a memory map count as resident, and a map of a truncated file kills the process.
Nothing is unpickled.

Format: https://github.com/huggingface/safetensors#format
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import safe_open

from vadapter.errors import CheckpointError
from vadapter.weights.files import Stamp, naming, reject_lookalikes, require_file, sha256, stamp

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 4 * 2**20  # some 40,000 tensors in a file, checked within a second
_MAX_INDEX = 16 * 2**20  # some 150,000 tensors
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
# Suffix: arguments of `from_pretrained` that convert such a file.
PICKLES: tuple[str, ...] = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FOREIGN: dict[str, str] = dict.fromkeys(PICKLES, "")
_FOREIGN |= {".msgpack": ", from_flax=True", ".h5": ", from_tf=True"}
# The class comes from config.json, as AutoModel would drop the head of a language model.
CONVERT = (
    "import sys, transformers as t; a, b = sys.argv[1:]; "
    "m = getattr(t, t.AutoConfig.from_pretrained(a).architectures[0]); "
    "m.from_pretrained(a{options}).save_pretrained(b, safe_serialization=True)"
)
# A folder with this file and no config.json holds a model of open_clip.
_OPEN_CLIP = "open_clip_config.json"
_CONVERT_OPEN_CLIP = (
    "import os, shutil, sys, open_clip.factory as o, safetensors.torch as s; a, b = sys.argv[1:]; "
    "w = {k: v.contiguous() for k, v in o.load_state_dict(a).items()}; os.makedirs(b); "
    "s.save_file(w, os.path.join(b, 'open_clip_model.safetensors')); "
    f"shutil.copy(os.path.join(os.path.dirname(a), '{_OPEN_CLIP}'), b)"
)


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its checkpoint describes it; `start` is its first byte in `file`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path
    start: int


@dataclasses.dataclass(frozen=True)
class TensorFiles:
    """The tensors of a checkpoint, none of which is read yet.

    No file stays open and none is mapped, so there is nothing to close, and threads may share it.

    Attributes:
      path: what was opened, for messages.
      files: the files that hold the tensors, each with its stamp at the time.
      block: bytes held beside the result while a slice is cut out of rows.
      expected: the SHA-256 (hex) that the files must have; "": any.
      part: these are the tensors of one part of the checkpoint, and no others are read.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    files: Mapping[Path, Stamp]
    block: int = 16 * 2**20
    expected: str = ""
    part: bool = False

    @classmethod
    def open(cls, path: Path, rename: Callable[[str], str | None] | None = None) -> "TensorFiles":
        """Read and check the headers of a checkpoint.

        With `rename`, from the name of a tensor to another or None, only the tensors that it names
        are there, under these names, and shards that hold no such tensor may be missing.

        It is a .safetensors file, or a folder with model.safetensors.index.json and its shards,
        with model.safetensors, or with one .safetensors file under any name. Links are followed,
        as in the cache of the hub; shards must be in the folder.

        Raises:
          CheckpointError: no checkpoint, a format that is never loaded (pickles), a corrupt file,
            or shards that do not match the index. Names the file.
        """
        tensors, files = {}, {}
        with naming(path):
            for file, listed in _shards(path, rename).items():
                with naming(file):
                    header, files[file] = _read_header(file)
                    if listed is not None and (odd := header.keys() ^ listed):
                        verb = "lacks" if min(odd) in listed else "holds"
                        raise ValueError(f"it {verb} tensor {min(odd)!r}, contrary to {_INDEX}")
                    tensors |= header
            if rename is not None:
                tensors = _renamed(tensors, rename)
                files = {file: files[file] for file in {t.file: None for t in tensors.values()}}
        return cls(path, tensors, files, part=rename is not None)

    def renamed(self, rename: Callable[[str], str | None]) -> "TensorFiles":
        """Return the same files with those tensors alone that `rename` names, see `open`."""
        with naming(self.path):
            return dataclasses.replace(self, tensors=_renamed(self.tensors, rename))

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        """Return `tensor[index]`, a new array in the dtype stored, without reading the rest.

        A slice of the first axis reads its own bytes only. A slice of a later axis reads the rows
        it touches, `block` bytes at a time.

        `index` has slices of step 1 for the leading axes, as in numpy; None: everything.

        Raises:
          CheckpointError: there is no such tensor, the file changed since `open`, or a number that
            is read is infinite or not a number.
          ValueError: `index` has more slices than the tensor has axes, or other steps.
        """
        info, bounds = self._part(name, index)
        out = np.empty([stop - start for start, stop in bounds], info.dtype)
        with self._reading(info.file) as f:
            _read(out, f, name, info, bounds, self.block)
        return out

    def blocks(self, name: str, index: tuple[slice, ...], size: int) -> Iterator[np.ndarray]:
        """Yield the rows of `tensor[index]` in order, some at a time, in an array that is reused.

        For copying: what is read at once stays in a processor's cache. A block has `size` bytes at
        most, or one row. Arguments and errors as in `read`; the tensor has an axis at least.
        """
        info, bounds = self._part(name, index)
        (start, stop), *rest = bounds
        shape = [b - a for a, b in rest]
        rows = max(1, size // max(1, math.prod(shape) * info.dtype.itemsize))
        buffer = np.empty((min(rows, stop - start), *shape), info.dtype)
        with self._reading(info.file) as f:
            for i in range(start, stop, rows):
                block = buffer[: stop - i]
                _read(block, f, name, info, [(i, i + len(block)), *rest], self.block)
                yield block

    def _part(
        self, name: str, index: tuple[slice, ...] | None
    ) -> tuple[TensorInfo, list[tuple[int, int]]]:
        """Return a tensor, and start and stop of `index` on every axis."""
        if name not in self.tensors:
            raise CheckpointError(
                f"{self.path} holds no tensor {name!r}. Use the configuration that belongs to "
                "these weights, or other weights."
            )
        return (info := self.tensors[name]), _bounds(info.shape, index or ())

    def equal(self, a: str, b: str) -> bool:
        """Return whether two tensors are equal, bit by bit; holds some `block` bytes of each."""
        info, other = self.tensors[a], self.tensors[b]
        if (info.shape, info.dtype) != (other.shape, other.dtype):
            return False
        blocks = zip(*(self.blocks(name, (), self.block) for name in (a, b)), strict=True)
        return all(one.tobytes() == other.tobytes() for one, other in blocks)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the concatenated files; they must be as when opened.

        Of a `part` that of its tensors alone, by their names, dtypes, shapes and bytes.

        Raises:
          CheckpointError: the files have changed, or are not those that are expected.
        """

        if self.part:
            return self._digest_of_tensors()

        def opened() -> Iterator[BufferedReader]:
            for file in self.files:
                with self._reading(file) as f:
                    yield f

        digest = sha256(opened())
        if self.expected not in ("", digest):
            raise CheckpointError(
                f"The weights {self.path} are corrupt: their SHA-256 is {digest[:12]}…, not "
                f"{self.expected[:12]}…. Export them again or, if they are part of vadapter, "
                "reinstall it: pip install --force-reinstall vadapter"
            )
        return digest

    def _digest_of_tensors(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            info = self.tensors[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            left = math.prod(info.shape) * info.dtype.itemsize
            with self._reading(info.file) as f:
                f.seek(info.start)
                while left:
                    if not (block := f.read(min(left, self.block))):
                        raise ValueError("it ends within a tensor")
                    digest.update(block)
                    left -= len(block)
        return digest.hexdigest()

    @contextlib.contextmanager
    def _reading(self, file: Path) -> Iterator[BufferedReader]:
        with naming(file), file.open("rb") as f:
            if stamp(f) != self.files[file]:
                raise ValueError("it has changed since its header was read")
            yield f


def _renamed(
    tensors: Mapping[str, TensorInfo], rename: Callable[[str], str | None]
) -> dict[str, TensorInfo]:
    """Return the tensors that `rename` names; ValueError if two get one name, or none has."""
    named: dict[str, str] = {}
    for name in tensors:
        if (new := rename(name)) is None:
            continue
        if new in named:
            raise ValueError(f"{named[new]!r} and {name!r} are one tensor of this part")
        named[new] = name
    if not named:
        first = min(tensors)
        raise ValueError(f"it holds no tensor of this part; its first is {first!r}")
    return {new: tensors[name] for new, name in named.items()}


# dtype -> integers of its size with and without sign, and the bits of +inf and -inf. Everything
# from there on is infinite or not a number, so that integers are compared, at memory speed.
_INFINITIES = {
    "float16": (np.dtype("<i2"), np.dtype("<u2"), 0x7C00, 0xFC00),
    "bfloat16": (np.dtype("<i2"), np.dtype("<u2"), 0x7F80, 0xFF80),
    "float32": (np.dtype("<i4"), np.dtype("<u4"), 0x7F80_0000, 0xFF80_0000),
    "float64": (np.dtype("<i8"), np.dtype("<u8"), 0x7FF0 << 48, 0xFFF0 << 48),
}
_CHECKED = 2**18  # numbers at once, which stay in a processor's cache


def _require_finite(name: str, tensor: np.ndarray) -> None:
    """Raise ValueError if a contiguous tensor holds an infinity or something that is no number."""
    if tensor.dtype.name not in _INFINITIES:
        return
    signed, unsigned, positive, negative = _INFINITIES[tensor.dtype.name]
    flat = tensor.reshape(-1)
    for i in range(0, flat.size, _CHECKED):
        part = flat[i : i + _CHECKED]
        if part.view(signed).max() >= positive or part.view(unsigned).max() >= negative:
            raise ValueError(
                f"tensor {name!r} holds numbers that are infinite or no numbers; a model with such "
                "weights computes nothing: download it again, or give another checkpoint"
            )


def _shards(
    path: Path, rename: Callable[[str], str | None] | None = None
) -> dict[Path, set[str] | None]:
    """Return the files of a checkpoint, and the tensors of each according to the index, if any."""
    if not path.is_dir():
        _refuse_foreign([require_file(path)])
        return {path: None}
    if (path / _INDEX).is_file():
        with naming(path / _INDEX):
            return _read_index(path / _INDEX, rename)
    files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" and p.is_file())
    if path / _SINGLE in files:
        return {path / _SINGLE: None}
    if len(files) > 1:
        raise ValueError(
            f"it holds {len(files)} .safetensors files ({files[0].name}, {files[1].name}, …) and "
            f"no {_INDEX} that joins them; add the index, or name one file"
        )
    if not files:
        _refuse_foreign(sorted(path.iterdir()))
        raise ValueError(f"it holds neither {_SINGLE} nor {_INDEX}")
    return {files[0]: None}


def _refuse_foreign(files: list[Path]) -> None:
    """Raise if a file is, by its name, in a format that can run code or needs another framework."""
    options = {f: _FOREIGN[f.suffix.lower()] for f in files if f.suffix.lower() in _FOREIGN}
    if not options:
        return
    file = min(options, key=lambda f: (options[f], f))
    folder = file.absolute().parent
    library, script, source = "transformers", CONVERT.format(options=options[file]), folder
    if options[file]:
        library = "transformers<5"
    elif (folder / _OPEN_CLIP).is_file() and not (folder / "config.json").is_file():
        library, script, source = "open_clip_torch", _CONVERT_OPEN_CLIP, file.absolute()
    raise CheckpointError(
        f"The weights {file} are not loaded: only .safetensors is supported, as other formats can "
        f"run code. If you trust the file, convert it where torch and {library} are installed:\n  "
        + shlex.join(["python", "-c", script, str(source), f"{folder}-safetensors"])
        + "\nThen copy the tokenizer and preprocessor files into the new folder and use that."
    )


def _read_index(
    path: Path, rename: Callable[[str], str | None] | None = None
) -> dict[Path, set[str] | None]:
    """Return the shards, each a file in the folder of the index, and their tensors.

    With `rename` those alone that hold a tensor that it names.
    """
    with path.open("rb") as f:
        if stamp(f)[0] > _MAX_INDEX:
            raise ValueError(f"it has {stamp(f)[0]} bytes, more than {_MAX_INDEX}")
        data = f.read()
    reject_lookalikes(data[:64])
    weight_map = _parse(data).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError("it has no weight_map from tensors to files")
    shards = {}
    for name, shard in weight_map.items():
        # A name, not a path: the index decides which files are opened, and it is not trusted.
        if not re.fullmatch(r"[^/\\:]+\.safetensors", str(shard)):
            raise ValueError(f"it names {shard!r}, which is not the name of a shard in its folder")
        shards.setdefault(shard, set()).add(name)
    if rename is not None:
        shards = {s: names for s, names in shards.items() if any(map(rename, names))} or shards
    if missing := sorted(s for s in shards if not (path.parent / s).is_file()):
        raise ValueError(
            f"{len(missing)} of its {len(shards)} shards are not in the folder: {missing[:3]}; "
            "the download is not complete"
        )
    if (path.parent / _SINGLE).is_file() and _SINGLE not in shards:
        raise ValueError(
            f"{_SINGLE} is in its folder but not one of its shards; remove one of them"
        )
    return {path.parent / shard: shards[shard] for shard in sorted(shards)}


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], Stamp]:
    """Return the tensors of one file, and its stamp; raise any Exception if something is wrong."""
    with path.open("rb") as f:
        size, _ = read_at = stamp(f)
        head = f.read(64) if size else b""  # a pipe has no size, and might block forever
        length = int.from_bytes(head[:8], "little")
        if len(head) < 8:
            raise ValueError(f"it has {len(head)} bytes, too few for a safetensors file")
        # Checked before the library, which takes seconds for headers that it accepts (100 MB).
        if length > min(size - 8, _MAX_HEADER):
            reject_lookalikes(head)
            raise ValueError(
                f"it declares a header of {length} bytes, but the file has {size}, and at most "
                f"{_MAX_HEADER} are supported"
            )
        f.seek(8)
        header = f.read(length)
    try:
        with safe_open(path, framework="numpy"):  # offsets, shapes, dtypes and size must agree
            pass
    except Exception as e:
        raise ValueError(f"it is truncated or corrupt; safetensors says: {e}") from e
    entries = _parse(header)
    entries.pop("__metadata__", None)
    if not entries:
        raise ValueError("it holds no tensors")
    tensors = {}
    for name, entry in entries.items():
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']}, which is not supported")
        # Numbers of any size may hide beside a 0. numpy creates no such array, nor one of 65 axes.
        if len(shape) > 64 or math.prod(max(n, 1) for n in shape) >= 2**59:
            raise ValueError(f"tensor {name!r} has an invalid shape")
        tensors[name] = TensorInfo(shape, dtype, path, 8 + length + entry["data_offsets"][0])
    return tensors, read_at


def _parse(data: bytes) -> dict[str, Any]:
    """Return a JSON object, in which no name may occur twice: one would silently be dropped."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(entries := dict(pairs)) != len(pairs):
            names = sorted(name for name, _ in pairs)
            doubled = next(a for a, b in itertools.pairwise(names) if a == b)
            raise ValueError(f"it names {doubled!r} more than once")
        return entries

    parsed = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    if not isinstance(parsed, dict):
        raise ValueError("it is not a JSON object")
    return parsed


def _bounds(shape: tuple[int, ...], index: tuple[slice, ...]) -> list[tuple[int, int]]:
    """Return start and stop on every axis, within the shape."""
    index += (slice(None),) * (len(shape) - len(index))
    if len(index) > len(shape) or any(s.step not in (None, 1) for s in index):
        raise ValueError(f"{index} is not one slice of step 1 for each axis of {list(shape)}")
    limits = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    return [(start, max(start, stop)) for start, stop in limits]


def _read(
    out: np.ndarray, f: BufferedReader, name: str, info: TensorInfo,
    bounds: list[tuple[int, int]], block_bytes: int,
) -> None:  # fmt: skip
    """Read the part of a tensor within `bounds`; ValueError if it holds what is no number."""
    if out.size:
        _fill(out, f, info.start, info.shape, bounds, block_bytes)
    _require_finite(name, out)
    if info.dtype == np.bool_ and out.view(np.uint8).max(initial=0) > 1:
        raise ValueError(f"tensor {name!r} of booleans holds bytes other than 0 and 1")


def _fill(
    out: np.ndarray, f: BufferedReader, offset: int, shape: tuple[int, ...],
    bounds: list[tuple[int, int]], block_bytes: int,
) -> None:  # fmt: skip
    """Read the part within `bounds` of the tensor of `shape` that begins at byte `offset`."""
    row = math.prod(shape[1:]) * out.itemsize
    start, stop = bounds[0] if shape else (0, 1)
    if bounds[1:] == [(0, n) for n in shape[1:]]:  # one piece of the file
        f.seek(offset + start * row)
        # As bytes, because bfloat16 and float8 have no buffer protocol.
        if f.readinto(out.reshape(-1).view(np.uint8).data) != out.nbytes:
            raise ValueError("it ends within a tensor")
    elif row > block_bytes:
        for i in range(start, stop):
            _fill(out[i - start], f, offset + i * row, shape[1:], bounds[1:], block_bytes)
    else:
        inner = tuple(slice(*b) for b in bounds[1:])
        block = np.empty((min(block_bytes // row, stop - start), *shape[1:]), out.dtype)
        for i in range(start, stop, len(block)):
            rows = block[: stop - i]
            _fill(rows, f, offset + i * row, rows.shape, [(0, n) for n in rows.shape], block_bytes)
            out[i - start : i - start + len(rows)] = rows[(slice(None), *inner)]
