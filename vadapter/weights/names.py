"""How a family of public checkpoints names its tensors, and how a tensor of theirs becomes ours.

A table maps our module to theirs; the leaves follow: `kernel`, `scale` and `embedding` are their
`weight`, `bias` is `bias`. Layers, which lie apart there, are stacked here, and a linear layer's
`weight` [out, in] is our `kernel` [in, out].

    Table(layers="model.layers.{}.", modules={"attn/q": "self_attn.q_proj", "norm": "model.norm"})
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np

BLOCKS = "stack/blocks/"
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
class Table:
    """The names of one family.

    Attributes:
      modules: our module's path (within a layer for those of the stack) -> theirs.
      layers: what their names of layer {} begin with.
      prefixes: what all names may begin with, depending on who saved the checkpoint.
      transposed: linear layers are stored [out, in]; GPT-2's are [in, out].
      ignored: patterns of tensors that a checkpoint may have and nobody needs.
    """

    modules: Mapping[str, str | Part]
    layers: str
    prefixes: tuple[str, ...] = ("",)
    transposed: bool = True
    ignored: tuple[str, ...] = ()

    def __or__(self, other: Mapping[str, str | Part]) -> "Table":
        """The same with some modules renamed."""
        return dataclasses.replace(self, modules={**self.modules, **other})

    def source(self, path: str, shape: Sequence[int]) -> "Source | None":
        """Where our leaf comes from; None if the family has no such module.

        Args:
          path: of the leaf, `stack/blocks/attn/q/kernel`.
          shape: of the leaf.
        """
        inside = path.startswith(BLOCKS)
        module, _, leaf = path.removeprefix(BLOCKS).rpartition("/")
        theirs = self.modules.get(module)
        if theirs is None or leaf not in _LEAVES:
            return None
        part = theirs if isinstance(theirs, Part) else None
        name = f"{part.module if part else theirs}.{_LEAVES[leaf]}"
        names = tuple(f"{self.layers.format(i)}{name}" for i in range(shape[0])) if inside else ()
        turned = leaf == "kernel" and self.transposed
        return Source(names or (name,), tuple(shape), stacked=inside, turned=turned, part=part)

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
      turned: theirs is transposed; part: what of it is ours.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    stacked: bool
    turned: bool
    part: Part | None = None

    @property
    def expected(self) -> tuple[int, ...]:
        """The shape of each of their tensors."""
        shape = self.shape[self.stacked :]
        if self.part:
            shape = (*shape[:-1], shape[-1] * self.part.count)
        return shape[::-1] if self.turned else shape

    def read(self, files, names: Sequence[str], index: tuple[slice, ...], head_dim: int):
        """A piece of our leaf, from the files' tensors of these names.

        Args:
          files: `tensors.TensorFiles`.
          names: `self.names`, with their prefix.
          index: slices of our leaf, as a sharding asks for them.
          head_dim: K, for parts that are grouped by head.
        """
        if not self.stacked:
            return self._one(files, names[0], index, head_dim)
        layers = range(*index[0].indices(self.shape[0]))
        return np.stack([self._one(files, names[i], index[1:], head_dim) for i in layers])

    def _one(self, files, name: str, index: tuple[slice, ...], head_dim: int) -> np.ndarray:
        whole = self.shape[self.stacked :]
        bounds = [s.indices(n)[:2] for s, n in zip(index, whole, strict=True)]
        part = self.part
        if part and part.by_head:  # one projection's outputs are not contiguous: all are read
            tensor = files.read(name)
            tensor = tensor.reshape(-1, part.count, head_dim, *tensor.shape[1:])[:, part.index]
            tensor = tensor.reshape(-1, *tensor.shape[2:])
            tensor = tensor.T if self.turned else tensor
            return tensor[tuple(slice(a, b) for a, b in bounds)]
        if part:
            a, b = bounds[-1]
            bounds[-1] = (a + part.index * whole[-1], b + part.index * whole[-1])
        slices = tuple(slice(a, b) for a, b in bounds)
        return files.read(name, slices[::-1]).T if self.turned else files.read(name, slices)
