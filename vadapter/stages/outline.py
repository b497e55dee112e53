"""What is known of a stage's model without building it: shapes of parameters, images, context.

A process that uses a trained stage needs no more than that, besides the program that it runs. It
follows from the recipe, so that it is kept from one process to the next, see `io.results`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from vadapter.config import build, plain
from vadapter.data.image_transform import ImageTransform
from vadapter.distributed.mesh import partition
from vadapter.io import results
from vadapter.models.paths import flatten, nest
from vadapter.models.registry import expand
from vadapter.recipe.schema import Recipe, StageConfig, components

_KIND = "outline"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A parameter: its shape, its dtype as stored, and the logical axis of each dimension."""

    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class Outline:
    """What is known of a model."""

    view: ImageTransform | None  #: the transform of the encoder's images; None for text only
    max_len: int  #: the number of tokens that the language model has room for
    leaves: dict[str, dict[str, Leaf]]  #: component -> path, joined by "/" -> parameter

    def shapes(self, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """Return component -> tree of `jax.ShapeDtypeStruct` with shardings."""
        return {name: _shapes(leaves, mesh, f"{name}/") for name, leaves in self.leaves.items()}


def leaves(boxed: Mapping[str, Any], within: str = "") -> dict[str, Leaf]:
    """Return the leaves of a tree of shapes in logical-axis boxes by path.

    A leaf without a box is a ValueError, which names it `within` others.
    """
    found = {}
    for path, box in flatten(boxed).items():
        if not hasattr(box, "names"):
            raise ValueError(
                f"parameter {within}{path} {box.shape} names no logical axes; define it with "
                "`layers.partitioned(init, *axes)`, None for a dimension that is not sharded"
            )
        found[path] = Leaf(tuple(box.value.shape), str(box.value.dtype), tuple(box.names))
    return found


def abstract(boxed: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Return a tree of shapes in logical-axis boxes as `jax.ShapeDtypeStruct` with shardings.

    A leaf without logical axes, or with an unknown one, is a ValueError.
    """
    return _shapes(leaves(boxed), mesh)


def _shapes(
    leaves: Mapping[str, Leaf], mesh: jax.sharding.Mesh, within: str = ""
) -> dict[str, Any]:
    shapes = {}
    for path, leaf in leaves.items():
        try:
            sharding = NamedSharding(mesh, partition(leaf.axes, leaf.shape, mesh))
        except ValueError as error:
            raise ValueError(f"parameter {within}{path}: {error}") from error
        shapes[path] = jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=sharding)
    return nest(shapes)


def facts(recipe: Recipe, stage: StageConfig, vocab_size: int) -> dict[str, Any]:
    """Return all that a stage's model follows from, as a JSON value."""
    specs = {name: expand(name, recipe.components[name]) for name in components(stage)}
    for spec in specs.values():
        spec.pop("weights", None)
    keys = ("kind", "lm", "chain", "encoder", "bidirectional", "exit_layer")
    section = {key: getattr(stage, key) for key in keys}
    return plain({
        "stage": section, "components": specs, "dtype": recipe.dtype, "vocab_size": vocab_size,
    })  # fmt: skip


def kept(facts: dict[str, Any]) -> Outline | None:
    """Return the outline that an earlier process has kept; None without."""
    values = results.load(_KIND, facts)
    return None if values is None else build(Outline, values, _KIND)


def keep(facts: dict[str, Any], made: Outline) -> None:
    """Keep an outline for later processes."""
    results.save(_KIND, facts, plain(made))
