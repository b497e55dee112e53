"""The parameters of a stage's model: drawn at random, or as shapes that know where they lie."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vadapter.data.images import View
from vadapter.models.coca import CoCa
from vadapter.models.vadapter import VAdapter, component_seed
from vadapter.parallel.mesh import shardings

Model = VAdapter | CoCa


def view_of(model: Model) -> View | None:
    """How the model's encoder wants its pictures; None for text only."""
    return model.modules[model.encoder].view if model.encoder else None  # type: ignore[attr-defined]


def init_params(model: Model, rng: jax.Array) -> dict[str, Any]:
    """Random parameters of every component, the encoder's included, in logical-axis boxes."""
    view = view_of(model)
    size = view.size if view else 0
    frames = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8)
    if isinstance(model, CoCa):
        return model.init(rng, frames)
    if not model.encoder:
        return model.init(rng, None)
    key = jax.random.fold_in(rng, component_seed(model.encoder))
    zeros = jnp.zeros(frames.shape, frames.dtype)
    visual, variables = model.modules[model.encoder].init_with_output(key, zeros)
    shape = jax.ShapeDtypeStruct(visual.shape, visual.dtype)
    return {model.encoder: variables["params"], **model.init(rng, shape)}


def abstract_params(model: Model, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Component -> tree of `jax.ShapeDtypeStruct` with shardings; nothing is computed."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )
