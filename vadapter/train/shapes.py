"""The parameters of a stage's model: drawn at random, or as shapes that know where they lie."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vadapter.models.coca import CoCa
from vadapter.models.vadapter import VAdapter, component_seed
from vadapter.parallel.mesh import shardings

Model = VAdapter | CoCa


def image_size(model: Model) -> int:
    """Pixels a side of the model's encoder; 0 for text only."""
    return model.modules[model.encoder].image_size if model.encoder else 0  # type: ignore[attr-defined]


def init_params(model: Model, rng: jax.Array) -> dict[str, Any]:
    """Random parameters of every component, the encoder's included, in logical-axis boxes."""
    size = image_size(model)
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
    boxed = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )
