"""How public checkpoints name their tensors, and how tensors of theirs become parameters of ours.

A family's table maps our modules to theirs; the leaves follow: `kernel`, `scale` and `embedding`
are their `weight`, `bias` is `bias`. Layers, which are tensors of their own there, are stacked
here, all of them or, where kinds of layers alternate, those of a kind; and a linear layer's
`weight` [out, in] is our `kernel` [in, out].

    Table(layers="model.layers.{}.", modules={"attn/q": "self_attn.q_proj", "norm": "model.norm"})
"""

import collections
import dataclasses
import math
import mmap
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from absl import logging

from vadapter.errors import CheckpointError
from vadapter.models.paths import flatten, nest
from vadapter.weights.safetensors import TensorFiles

_STRIP = 64  # columns that are written at once
_BLOCK = 2**18  # bytes that are copied at once
_WIDENINGS = {(np.dtype(np.float16), np.dtype(np.float32))}  # the casts of `assign`: lossless
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclasses.dataclass(frozen=True)
class Part:
    """Projection `index` of the `count` that are concatenated in one tensor, along its outputs.

    With `by_head` the outputs are grouped by head first: [heads, count, K] (GPT-NeoX). Numbers of
    outputs that differ are in `sizes`.
    """

    module: str
    index: int
    count: int
    by_head: bool = False
    sizes: tuple[int, ...] = ()


def fused(modules: str, name: str, by_head: bool = False) -> dict[str, Part]:
    """Return queries, keys and values, our `modules` with q, k, v in {}, as parts of one tensor."""
    return {modules.format(x): Part(name, i, 3, by_head) for i, x in enumerate("qkv")}


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution over square patches [D, C, p, p]; ours is a linear layer [p·p·C, D].

    One over f frames, too, is [D, C, f, p, p]; ours [f, p·p·C, D] or, as a layer of one image, the
    sum of its `frames`.
    """

    module: str
    frames: int = 0  # that are summed


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Queries or keys whose rotated pairs are adjacent, (2i, 2i + 1) of each head.

    Ours are (i, R/2 + i). With one axis all K dims are rotated, R = K; with several, as many of the
    first as are divisible by pairs of all axes. Source: the conversion of Llama's first weights in
    transformers.
    """

    module: str | Part
    axes: int = 1

    def order(self, head_dim: int) -> np.ndarray:
        """Return the place of each of our dims of a head in theirs."""
        pairs = head_dim // (2 * self.axes) * self.axes
        firsts = 2 * np.arange(pairs)
        return np.concatenate([firsts, firsts + 1, np.arange(2 * pairs, head_dim)])


SQUARE = -1  # for `Tokens.grid`


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Trainable vectors under a name of their own, of any shape; ours are [1, n, D].

    Attributes:
      name: the full name of the tensor.
      grid: number of leading vectors that are not positions in a square grid, or SQUARE: all that
        exceed a square; a grid of another size is resampled, with or without antialiasing. None:
        there is no grid.
      kernel: of resampling; linear: always with antialiasing. corners: linearly between positions,
        the corners of both grids on each other (Qwen3-VL). nearest: the position that a patch
        begins in (Idefics 3).
    """

    name: str
    grid: int | None = None
    antialias: bool = False
    kernel: Literal["cubic", "linear", "corners", "nearest"] = "cubic"

    def weights(self, old: int, new: int) -> np.ndarray:
        """Return the weights that resample a side of the grid, f32[new, old]."""
        if self.kernel == "cubic":
            return bicubic(old, new, antialias=self.antialias)
        return {"linear": bilinear, "corners": _corners, "nearest": _nearest}[self.kernel](old, new)


Form = str | Part | Patches | Pairs | Tokens


@dataclasses.dataclass(frozen=True)
class Table:
    """The names of one family.

    Attributes:
      modules: our module's path (within a layer for those of the stack) -> form of theirs.
      layers: prefix of the names in layer {}.
      stacks: prefix of our paths in a stack -> the first of their layers that it holds, and the
        step from one to the next.
      prefixes: prefixes of all names, which depend on the class that saved the checkpoint.
      transposed: the linear layers of the stack are stored [out, in]; GPT-2's are [in, out].
      ignored: patterns of tensors that a checkpoint may have and no component needs.
      optional: a module of ours -> the pattern of tensors that only it needs.
    """

    modules: Mapping[str, Form]
    layers: str
    stacks: Mapping[str, tuple[int, int]] = dataclasses.field(
        default_factory=lambda: {"stack/blocks/": (0, 1)}
    )
    prefixes: tuple[str, ...] = ("",)
    transposed: bool = True
    ignored: tuple[str, ...] = ()
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def periodic(self, period: int) -> "Table":
        """Return the table of layers that are in stacks of every so many, see
        `models.transformer.Period`."""
        places = {f"stack/blocks/block_{i}/": (i, period) for i in range(period)}
        return self if period == 1 else dataclasses.replace(self, stacks=places)

    def __or__(self, other: Mapping[str, Form]) -> "Table":
        """Return the table with some modules renamed."""
        return dataclasses.replace(self, modules={**self.modules, **other})

    def without(self, root: str) -> "Table":
        """Return the table of names that lack a root, as where a base model was saved alone."""

        def bare(form: Any) -> Any:
            if isinstance(form, str):
                return form.removeprefix(root)
            key = "name" if isinstance(form, Tokens) else "module"
            return dataclasses.replace(form, **{key: bare(getattr(form, key))})

        modules = {module: bare(form) for module, form in self.modules.items()}
        return dataclasses.replace(self, modules=modules, layers=self.layers.removeprefix(root))

    def source(self, path: str, shape: Sequence[int], prefix: str = "") -> "Source | None":
        """Return the source of our leaf, `stack/blocks/attn/q/kernel`; None if it has none."""
        stack = self._stack(path)
        inside, own = bool(stack), path.removeprefix(stack)
        module, _, leaf = own.rpartition("/")
        form = self.modules.get(own, self.modules.get(module))
        if isinstance(form, Tokens):
            name = form.name
        elif form is None or (own not in self.modules and leaf not in _LEAVES):
            return None
        else:
            form_or_part = form.module if isinstance(form, Pairs) else form
            name = form_or_part if isinstance(form_or_part, str) else form_or_part.module
            if own not in self.modules:  # otherwise a leaf with a name of its own
                name = f"{name}.{_LEAVES[leaf]}"
        fronts = [""]
        if inside:
            first, step = self.stacks[stack]
            fronts = [self.layers.format(first + i * step) for i in range(shape[0])]
        names = tuple(f"{prefix}{front}{name}" for front in fronts)
        transposed = leaf == "kernel" and (self.transposed or not inside)
        return Source(names, tuple(shape), inside, transposed, form)

    def depth(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """Return the number of layers in all stacks together, given the shapes of our leaves."""
        depths = {self._stack(path): shape[0] for path, shape in shapes.items()}
        return sum(depth for stack, depth in depths.items() if stack)

    def _stack(self, path: str) -> str:
        return next((stack for stack in self.stacks if path.startswith(stack)), "")


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensors that one leaf of ours is read from.

    Attributes:
      names: of the tensors: one per layer if `stacked`, otherwise one.
      shape: of the leaf.
      transposed: the tensors are the transpose of ours.
      form: how else they differ.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    transposed: bool
    form: Form

    def fits(self, shape: Sequence[int]) -> bool:
        """Return whether our leaf can be read from a tensor of this shape."""
        if isinstance(self.form, Tokens):
            same = int(np.prod(shape)) == int(np.prod(self.shape))
            return shape[-1] == self.shape[-1] and (same or self.form.grid is not None)
        return tuple(shape) == self.expected

    @property
    def expected(self) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        shape = self.shape[self.stacked :]
        if isinstance(self.form, Patches) and self.transposed:
            frames = shape[:-2] or (self.form.frames,) * bool(self.form.frames)
            side = math.isqrt(shape[-2] // 3)
            return (shape[-1], 3, *frames, side, side)
        form = self.form.module if isinstance(self.form, Pairs) else self.form
        if isinstance(form, Part):
            shape = (*shape[:-1], sum(form.sizes) or shape[-1] * form.count)
        return shape[::-1] if self.transposed else shape

    def read(
        self, files: TensorFiles, index: tuple[slice, ...], head_dim: int, dtype: np.dtype
    ) -> np.ndarray:
        """Return a part of our leaf, read in small blocks.

        Where one of their tensors is more than a slice or a transpose away, all of it is held.

        `index` has the slices that a sharding requests; K = `head_dim`, where heads matter.
        """
        ranges = [range(*s.indices(n)) for s, n in zip(index, self.shape, strict=True)]
        out = _pages([len(r) for r in ranges], np.dtype(dtype))
        layers = ranges[0] if self.stacked else [0]
        for piece, i in zip(out if self.stacked else out[None], layers, strict=True):
            self._write(piece, files, self.names[i], index[self.stacked :], head_dim)
        return out

    def _write(
        self, out: np.ndarray, files: TensorFiles, name: str, index: tuple[slice, ...],
        head_dim: int,
    ) -> None:  # fmt: skip
        """Read one of their tensors, or a part of it, into an array of ours."""
        slices = self._slices(index)
        if slices is None or (self.transposed and out.ndim != 2):
            _copy(out, self._one(files, name, index, head_dim))
        elif self.transposed:
            row = math.prod(out.shape[:-1]) * files.tensors[name].dtype.itemsize
            _write_columns(out, files.blocks(name, slices, _STRIP * row))
        else:
            at = 0
            for block in files.blocks(name, slices, _BLOCK):
                out[at : at + len(block)] = block
                at += len(block)

    def _slices(self, index: tuple[slice, ...]) -> tuple[slice, ...] | None:
        """Return the slices of their tensor that `index` selects; None if it is no such part."""
        form = self.form
        special = isinstance(form, Tokens | Pairs) or (isinstance(form, Part) and form.by_head)
        if special or not index or (isinstance(form, Patches) and self.transposed):
            return None
        bounds = [s.indices(n)[:2] for s, n in zip(index, self.shape[self.stacked :], strict=True)]
        if isinstance(form, Part):
            a, b = bounds[-1]
            outputs = self.shape[-1]
            before = sum(form.sizes[: form.index]) if form.sizes else form.index * outputs
            bounds[-1] = (a + before, b + before)
        slices = tuple(slice(a, b) for a, b in bounds)
        return slices[::-1] if self.transposed else slices

    def _one(
        self, files: TensorFiles, name: str, index: tuple[slice, ...], head_dim: int
    ) -> np.ndarray:
        whole, form = self.shape[self.stacked :], self.form
        if isinstance(form, Tokens):
            return _tokens(files.read(name), self.shape, form)[index]
        if isinstance(form, Patches) and self.transposed:
            kernel = np.moveaxis(files.read(name), (0, 1), (-1, -2))  # [f, p, p, C, D]
            if form.frames:
                kernel = kernel.astype(np.float32).sum(0)
            return kernel.reshape(whole)[index]
        if isinstance(form, Pairs):
            start, stop, _ = index[-1].indices(whole[-1])
            heads = slice(start // head_dim, -(-stop // head_dim))  # all that overlap
            outputs = slice(heads.start * head_dim, heads.stop * head_dim)
            plain = dataclasses.replace(self, form=form.module)
            pairs = plain._one(files, name, (*index[:-1], outputs), head_dim)
            by_head = pairs.reshape(*pairs.shape[:-1], heads.stop - heads.start, head_dim)
            halves = by_head[..., form.order(head_dim)].reshape(pairs.shape)
            return halves[..., start - outputs.start : stop - outputs.start]
        if isinstance(form, Part) and form.by_head:
            tensor = files.read(name)  # all, as the outputs of one projection are not contiguous
            tensor = tensor.reshape(-1, form.count, head_dim, *tensor.shape[1:])[:, form.index]
            tensor = tensor.reshape(-1, *tensor.shape[2:])
            return (tensor.T if self.transposed else tensor)[index]
        tensor = files.read(name, self._slices(index))
        return tensor.T if self.transposed else tensor


def _pages(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Return a new array that a CPU device can use without a copy.

    It begins with a page, as XLA's arrays begin at multiples of 64 bytes. The pages are small:
    numpy asks for huge ones, of which a virtual machine may have none that its host has backed.
    Then the first use of 1 GB takes 2 seconds in the kernel instead of 0.4.
    """
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, max(1, size), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, size).view(dtype).reshape(shape)


def _copy(out: np.ndarray, tensor: np.ndarray) -> None:
    """Assign `out[...] = tensor`, several times faster than numpy for a transposed matrix."""
    if tensor.ndim != 2 or tensor.flags.c_contiguous:
        out[...] = tensor
        return
    rows = tensor.T
    _write_columns(out, (rows[i : i + _STRIP] for i in range(0, len(rows), _STRIP)))


def _write_columns(out: np.ndarray, blocks: Iterable[np.ndarray]) -> None:
    """Write rows, at most _STRIP at a time, as columns of a matrix, in their order.

    They are copied through a small buffer. Its rows are padded: at a distance of a power of two
    they would evict each other from the cache.
    """
    length, at = len(out), 0
    buffer = np.empty((_STRIP, length + _STRIP // 2), out.dtype)
    for block in blocks:
        strip = buffer[: len(block), :length]
        strip[...] = block
        out[:, at : at + len(block)] = strip.T
        at += len(block)


def _tokens(tensor: np.ndarray, shape: Sequence[int], form: Tokens) -> np.ndarray:
    """Return vectors as [1, n, D], with their grid resampled if ours has another size."""
    tensor, lead = tensor.reshape(1, -1, shape[-1]), form.grid
    if lead == SQUARE:
        lead = shape[1] - math.isqrt(shape[1]) ** 2
    if tensor.shape == tuple(shape) or lead is None:
        return tensor
    old, new = (math.isqrt(n - lead) for n in (tensor.shape[1], shape[1]))
    if lead + old * old != tensor.shape[1]:
        count = tensor.shape[1] - lead
        raise CheckpointError(f"{form.name}: its {count} positions are not a square grid")
    grid = tensor[0, lead:].astype(np.float32).reshape(old, old, -1)
    weights = form.weights(old, new)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid).reshape(1, new * new, -1)
    return np.concatenate([tensor[:, :lead].astype(np.float32), grid], axis=1)


def bicubic(old: int, new: int, *, antialias: bool = False) -> np.ndarray:
    """Return the weights of cubic convolution, f32[new, old].

    As in transformers' ViTs, which resample their position grids by
    `torch.nn.functional.interpolate` (mode "bicubic", align_corners False): a = -0.75 and repeated
    edges; with antialiasing a = -0.5, a kernel as wide as the step between positions, and weights
    that sum to one.
    """
    scale = old / new
    stretch = max(scale, 1.0) if antialias else 1.0
    a, reach = -0.5 if antialias else -0.75, math.ceil(2 * stretch)
    weights = np.zeros((new, old), np.float64)
    for row in range(new):
        center = (row + 0.5) * scale - 0.5
        for k in range(math.floor(center) - reach + 1, math.floor(center) + reach + 1):
            inside = 0 <= k < old
            if inside or not antialias:
                weights[row, min(max(k, 0), old - 1)] += _cubic(abs(center - k) / stretch, a)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def bilinear(old: int, new: int) -> np.ndarray:
    """Return the weights of linear interpolation with antialiasing, f32[new, old].

    As in transformers' SigLIP 2: a kernel as wide as the step between positions, if that is wider
    than one, and weights that sum to one.
    """
    scale = old / new
    centers = (np.arange(new) + 0.5) * scale - 0.5
    distances = np.abs(np.arange(old) - centers[:, None]) / max(scale, 1.0)
    weights = np.maximum(1 - distances, 0)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _corners(old: int, new: int) -> np.ndarray:
    """Return the weights of linear interpolation from corner to corner, f32[new, old]."""
    at = np.linspace(0, old - 1, new, dtype=np.float32)
    low = np.floor(at).astype(int)
    part, rows, weights = at - low, np.arange(new), np.zeros((new, old), np.float32)
    weights[rows, low] = 1 - part
    weights[rows, np.minimum(low + 1, old - 1)] += part
    return weights


def _nearest(old: int, new: int) -> np.ndarray:
    """Return the weights of the position that each of the new ones begins in, f32[new, old].

    Exactly; the original's float32 takes the position before in places that depend on the processor
    (on its own grids of 19, 25 or 29 a side; those of published models are 26, 27 and 32).
    """
    return np.eye(old, dtype=np.float32)[np.arange(new) * old // new]


def _cubic(t: float, a: float) -> float:
    if t <= 1:
        return ((a + 2) * t - (a + 3)) * t * t + 1
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a if t < 2 else 0.0


def assign(
    params_abstract: Mapping[str, Any], tensors: Mapping[str, np.ndarray],
    name_table: Mapping[str, str], *, ignore: Collection[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Assign the tensors of a file to the parameter tree of a model, strictly.

    float16 is cast to float32 where the model needs it; there are no other casts.

    Args:
      params_abstract: nested dict whose leaves have `.shape` and `.dtype` (`jax.eval_shape`).
      name_table: name in the file to path in the tree, parts joined by "/".
      ignore: names in the file to leave out.

    Raises:
      CheckpointError: missing or unexpected tensors, or mismatched shapes or dtypes. Names all.
      ValueError: `name_table` maps two names to one path.
    """
    leaves = match_names(params_abstract, tensors, name_table, ignore=ignore)
    arrays = {path: tensors[name].astype(to, copy=False) for path, (name, to) in leaves.items()}
    return nest(arrays)


def match_names(
    params_abstract: Mapping[str, Any], tensors: Mapping[str, Any],
    name_table: Mapping[str, str], *, ignore: Collection[str] = (),
) -> dict[str, tuple[str, np.dtype]]:  # fmt: skip
    """Return what `assign` assigns: path in the tree -> name in the file, and the model's dtype.

    Arguments and errors as in `assign`; the tensors need `.shape` and `.dtype` only.
    """
    params = flatten(dict(params_abstract))
    sources = {path: name for name, path in name_table.items()}
    if len(sources) != len(name_table):
        repeated = [p for p, n in collections.Counter(name_table.values()).items() if n > 1]
        raise ValueError(f"name_table maps several names to {repeated}")

    missing = [
        f"{path} (in the file: {sources.get(path, 'not in the name table')})"
        for path in params
        if sources.get(path) not in tensors
    ]
    unexpected = [
        f"{name} {tensors[name].dtype}{list(tensors[name].shape)}"
        for name in tensors
        if name not in ignore and name_table.get(name) not in params
    ]
    leaves, mismatched = {}, []
    for path, leaf in params.items():
        if (name := sources.get(path)) is None or name not in tensors:
            continue
        tensor, dtype = tensors[name], np.dtype(leaf.dtype)
        castable = tensor.dtype == dtype or (tensor.dtype, dtype) in _WIDENINGS
        if tuple(tensor.shape) == tuple(leaf.shape) and castable:
            leaves[path] = name, dtype
        else:
            mismatched.append(
                f"{path}: model {dtype}{list(leaf.shape)}, "
                f"file {tensor.dtype}{list(tensor.shape)} ({name})"
            )
    if missing or unexpected or mismatched:
        report = (("missing", missing), ("unexpected", unexpected), ("mismatched", mismatched))
        lines = [f"The weights do not match the model: {len(leaves)} parameters matched."]
        lines += [f"  {kind}: {entry}" for kind, entries in report for entry in entries]
        lines.append("Use the configuration that belongs to these weights, or other weights.")
        raise CheckpointError("\n".join(lines))
    ignored = [name for name in tensors if name in ignore]
    counts = "Weights: %d matched, 0 missing, 0 unexpected, %d ignored %s"
    logging.info(counts, len(leaves), len(ignored), ignored)
    return leaves
