"""The parameters of a stage's model: drawn at random, or as shapes that know where they lie."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from vadapter.data.batch import SPEC
from vadapter.data.media.images import ImageTransform
from vadapter.distributed.mesh import replicated, shardings
from vadapter.models.adapter_model import AdapterModel, component_seed
from vadapter.models.coca import CoCa
from vadapter.stages.steps import init_state

Model = AdapterModel | CoCa


def view_of(model: Model) -> ImageTransform | None:
    """How the model's encoder wants its images; None for text only."""
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
    return _laid_out(jax.eval_shape(lambda: init_params(model, jax.random.key(0))), mesh)


def abstract_encoder(encoder: nn.Module, mesh: jax.sharding.Mesh) -> Any:
    """As `abstract_params`, of an encoder alone."""
    size = encoder.view.size  # type: ignore[attr-defined]
    frames = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8)
    return _laid_out(jax.eval_shape(encoder.init, jax.random.key(0), frames)["params"], mesh)


def abstract_state(
    trainable: dict[str, Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Any:
    """Shapes and shardings of the train state; optimizer moments lie as their parameters.

    Args:
      learnt: of the trained components, from `abstract_params`.
    """
    state = jax.eval_shape(lambda p: init_state(p, tx), trainable)
    whole = replicated(mesh)
    put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
    opt = optax.tree_utils.tree_map_params(
        tx,
        lambda x, p: put(x, p.sharding),
        state.opt_state,
        trainable,
        transform_non_params=lambda x: put(x, whole),
    )
    return state.replace(
        params=trainable,
        opt_state=opt,
        step=put(state.step, whole),
        skipped=put(state.skipped, whole),
    )


def at_rest(frozen: Any, dtype: Any) -> Any:
    """Shapes of frozen parameters as they lie on the devices, in the dtype of the computation."""

    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        floats = jnp.issubdtype(x.dtype, jnp.floating)
        return jax.ShapeDtypeStruct(x.shape, dtype if floats else x.dtype, sharding=x.sharding)

    return jax.tree.map(cast, frozen)


def on_one(tree: Any) -> int:
    """Bytes of shapes with shardings, on each device."""
    shard = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize  # noqa: E731
    return sum(shard(x) for x in jax.tree.leaves(tree))


def row_shapes(
    sizes: dict[str, int], *, visual: bool, rows: int = 1
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch.

    Args:
      sizes: F, S, P, T and M, see `data.batch`; F and S only of images.
      visual: the batch has frames.
      rows: B.
    """
    sizes = {**sizes, "B": rows, "C": 3}
    keys = [key for key in SPEC if key != "features" and (key != "frames" or visual)]
    shape = lambda dims: tuple(sizes[d] for d in dims)  # noqa: E731
    return {key: jax.ShapeDtypeStruct(shape(SPEC[key][1]), SPEC[key][0]) for key in keys}


def _laid_out(boxed: Any, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        nn.meta.unbox(boxed),
        shardings(boxed, mesh),
    )
