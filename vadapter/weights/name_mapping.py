"""How a family of public checkpoints names its tensors, and how a tensor of theirs becomes ours.

A table maps our module to theirs; the leaves follow: `kernel`, `scale` and `embedding` are their
`weight`, `bias` is `bias`. Layers, which lie apart there, are stacked here, and a linear layer's
`weight` [out, in] is our `kernel` [in, out].

    Table(layers="model.layers.{}.", modules={"attn/q": "self_attn.q_proj", "norm": "model.norm"})
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from vadapter.errors import CheckpointError
from vadapter.weights.safetensors import TensorFiles

BLOCKS = "stack/blocks/"
_ALIGNMENT = 64  # bytes, of XLA's arrays
_STRIP = 64  # columns
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Part:
    """One of several projections that lie in one tensor, along its outputs.

    Attributes:
      module: theirs.
      index, count: which of how many.
      by_head: the outputs are grouped by head first: [heads, count, K] (GPT-NeoX).
    """

    module: str
    index: int
    count: int
    by_head: bool = False


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution over square patches [D, C, p, p], which is our linear layer [p·p·C, D]."""

    module: str


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries or keys whose rotated pairs lie side by side, (2i, 2i + 1) of each head.

    Ours are (i, K/2 + i). Source: the conversion of Llama's first weights in transformers.
    """

    module: str


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Learned vectors under a name of their own, of any shape that holds them: ours are [1, n, D].

    Attributes:
      name: theirs, whole.
      grid: how many of the first vectors are not places in a square grid; a grid of another size
        is resampled, with or without antialiasing. None: there is no grid.
    """

    name: str
    grid: int | None = None
    antialias: bool = False


Theirs = str | Part | Patches | Pairs | Tokens


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one family.

    Attributes:
      modules: our module's path (within a layer for those of the stack) -> theirs.
      layers: what their names of layer {} begin with.
      prefixes: what all names may begin with, depending on who saved the checkpoint.
      transposed: the linear layers of the stack are stored [out, in]; GPT-2's are [in, out].
      ignored: patterns of tensors that a checkpoint may have and nobody needs.
      optional: a part of ours -> the pattern of tensors that only it needs.
    """

    modules: Mapping[str, Theirs]
    layers: str
    prefixes: tuple[str, ...] = ("",)
    transposed: bool = True
    ignored: tuple[str, ...] = ()
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __or__(self, other: Mapping[str, Theirs]) -> "Table":
        """The same with some modules renamed."""
        return dataclasses.replace(self, modules={**self.modules, **other})

    def source(self, path: str, shape: Sequence[int]) -> "Source | None":
        """Where our leaf comes from; None if the family has no such module.

        Args:
          path: of the leaf, `stack/blocks/attn/q/kernel`.
          shape: of the leaf.
        """
        inside = path.startswith(BLOCKS)
        own = path.removeprefix(BLOCKS)
        module, _, leaf = own.rpartition("/")
        theirs = self.modules.get(own, self.modules.get(module))
        if isinstance(theirs, Tokens):
            name = theirs.name
        elif theirs is None or (own not in self.modules and leaf not in _LEAVES):
            return None
        else:
            name = theirs if isinstance(theirs, str) else theirs.module
            if own not in self.modules:  # else a leaf under a name of its own
                name = f"{name}.{_LEAVES[leaf]}"
        names = tuple(f"{self.layers.format(i)}{name}" for i in range(shape[0])) if inside else ()
        turned = leaf == "kernel" and (self.transposed or not inside)
        return Source(names or (name,), tuple(shape), inside, turned, theirs)

    def unneeded(self, names: Sequence[str], used: set[str]) -> list[str]:
        """The tensors of a checkpoint that are neither used nor may be left out."""
        pattern = re.compile("|".join(self.ignored) or r"(?!)")
        return [name for name in names if name not in used and not pattern.search(name)]


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that one leaf of ours is made of.

    Attributes:
      names: theirs, one a layer if `stacked`, else one.
      shape: ours.
      turned: theirs is transposed; theirs: how else it differs.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    turned: bool
    theirs: Theirs

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a tensor of theirs of this shape is what our leaf is made of."""
        if isinstance(self.theirs, Tokens):
            same = int(np.prod(shape)) == int(np.prod(self.shape))
            return shape[-1] == self.shape[-1] and (same or self.theirs.grid is not None)
        return tuple(shape) == self.expected

    @property
    def expected(self) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        shape = self.shape[self.stacked :]
        if isinstance(self.theirs, Patches) and len(shape) == 2:
            side = math.isqrt(shape[0] // 3)
            return (shape[1], 3, side, side)
        if isinstance(self.theirs, Part):
            shape = (*shape[:-1], shape[-1] * self.theirs.count)
        return shape[::-1] if self.turned else shape

    def read(
        self,
        files: TensorFiles,
        names: Sequence[str],
        index: tuple[slice, ...],
        head_dim: int,
        dtype: np.dtype,
    ) -> np.ndarray:
        """A piece of our leaf, from the files' tensors of these names.

        No more is held beside the result than one of their tensors.

        Args:
          names: `self.names`, with their prefix.
          index: slices of our leaf, as a sharding asks for them.
          head_dim: K, for parts that are grouped by head.
          dtype: of the result.
        """
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = _aligned([len(r) for r in ranges], np.dtype(dtype))
        layers = ranges[0] if self.stacked else [0]
        for piece, i in zip(out if self.stacked else out[None], layers, strict=True):
            _copy(piece, self._one(files, names[i], index[self.stacked :], head_dim))
        return out

    def _one(
        self, files: TensorFiles, name: str, index: tuple[slice, ...], head_dim: int
    ) -> np.ndarray:
        whole, theirs = self.shape[self.stacked :], self.theirs
        if isinstance(theirs, Tokens):
            return _tokens(files.read(name), self.shape, theirs)[index]
        if isinstance(theirs, Patches) and len(whole) == 2:
            return files.read(name).transpose(2, 3, 1, 0).reshape(whole)[index]
        if isinstance(theirs, Pairs):
            start, stop, _ = index[-1].indices(whole[-1])
            heads = slice(start // head_dim, -(-stop // head_dim))  # all those it touches
            outputs = slice(heads.start * head_dim, heads.stop * head_dim)
            plain = dataclasses.replace(self, theirs=theirs.module)
            pairs = plain._one(files, name, (*index[:-1], outputs), head_dim)
            shape = (*pairs.shape[:-1], heads.stop - heads.start, head_dim // 2, 2)
            halves = pairs.reshape(shape).swapaxes(-1, -2).reshape(pairs.shape)
            return halves[..., start - outputs.start : stop - outputs.start]
        if isinstance(theirs, Part) and theirs.by_head:
            # The outputs of one projection are not contiguous: all are read.
            tensor = files.read(name)
            tensor = tensor.reshape(-1, theirs.count, head_dim, *tensor.shape[1:])[:, theirs.index]
            tensor = tensor.reshape(-1, *tensor.shape[2:])
            return (tensor.T if self.turned else tensor)[index]
        bounds = [s.indices(n)[:2] for s, n in zip(index, whole, strict=True)]
        if isinstance(theirs, Part):
            a, b = bounds[-1]
            bounds[-1] = (a + theirs.index * whole[-1], b + theirs.index * whole[-1])
        slices = tuple(slice(a, b) for a, b in bounds)
        return files.read(name, slices[::-1]).T if self.turned else files.read(name, slices)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """A new array that a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    room = np.empty(size + _ALIGNMENT, np.uint8)
    start = -room.ctypes.data % _ALIGNMENT
    return room[start : start + size].view(dtype).reshape(shape)


def _copy(out: np.ndarray, tensor: np.ndarray) -> None:
    """`out[...] = tensor`, several times as fast where a matrix is transposed.

    It goes in strips through a small buffer, whose rows are padded: at a power of two apart they
    would drive each other out of the cache.
    """
    if tensor.ndim != 2 or tensor.flags.c_contiguous:
        out[...] = tensor
        return
    rows, columns = tensor.shape
    buffer = np.empty((_STRIP, rows + _STRIP // 2), out.dtype)
    for i in range(0, columns, _STRIP):
        strip = buffer[: min(_STRIP, columns - i), :rows]
        strip[...] = tensor[:, i : i + _STRIP].T
        out[:, i : i + _STRIP] = strip.T


def _tokens(tensor: np.ndarray, shape: Sequence[int], theirs: Tokens) -> np.ndarray:
    """Vectors as [1, n, D], their grid resampled where ours has another size."""
    tensor, front = tensor.reshape(1, -1, shape[-1]), theirs.grid
    if tensor.shape == tuple(shape) or front is None:
        return tensor
    old, new = (math.isqrt(n - front) for n in (tensor.shape[1], shape[1]))
    if front + old * old != tensor.shape[1]:
        raise CheckpointError(f"{theirs.name}: its {tensor.shape[1] - front} places are no square")
    grid = tensor[0, front:].astype(np.float32).reshape(old, old, -1)
    weights = bicubic(old, new, antialias=theirs.antialias)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid).reshape(1, new * new, -1)
    return np.concatenate([tensor[:, :front].astype(np.float32), grid], axis=1)


def bicubic(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Weights f32[new, old] of cubic convolution.

    What transformers' ViTs resample their position grids with (`torch.nn.functional.interpolate`,
    mode "bicubic", align_corners False): a = -0.75 and edges repeated, or with antialiasing
    a = -0.5, a kernel as wide as the step between places, and weights that sum to one.
    """
    scale = old / new
    stretch = max(scale, 1.0) if antialias else 1.0
    a, reach = -0.5 if antialias else -0.75, math.ceil(2 * stretch)
    weights = np.zeros((new, old), np.float64)
    for row in range(new):
        place = (row + 0.5) * scale - 0.5
        for k in range(math.floor(place) - reach + 1, math.floor(place) + reach + 1):
            inside = 0 <= k < old
            if inside or not antialias:
                weights[row, min(max(k, 0), old - 1)] += _cubic(abs(place - k) / stretch, a)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _cubic(t: float, a: float) -> float:
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a if t < 2 else 0.0
