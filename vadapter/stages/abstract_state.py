"""The parameters of a stage's model: random values, or shapes with shardings."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import optax
from jax.dtypes import itemsize_bits

from vadapter.data.batch import SPEC
from vadapter.data.image_transform import ImageTransform
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import replicated, shardings_of
from vadapter.models.adapter_model import AdapterModel, component_key
from vadapter.models.coca import CoCa
from vadapter.models.lm import LM
from vadapter.stages import outline as outlines
from vadapter.stages.outline import Outline
from vadapter.stages.steps import TrainState, init_state

Model = AdapterModel | CoCa


def view_of(model: Model) -> ImageTransform | None:
    """Return the transform of the encoder's images; None for text only."""
    return model.modules[model.encoder].view if model.encoder else None  # type: ignore[attr-defined]


class Initializer:
    """A model with its init, traced once: shapes and random values both come from that program.

    Tracing takes seconds for a large model.
    """

    def __init__(self, model: Model):
        self.model = model

    def outline(self) -> Outline:
        """Return what is known of the model, such as the shapes of its parameters."""
        model = self.model
        lm = model.modules[model.text if isinstance(model, CoCa) else model.lm]
        assert isinstance(lm, LM)
        leaves = {name: outlines.leaves(tree, f"{name}/") for name, tree in self._traced[1].items()}
        return Outline(view_of(model), lm.config.max_len, leaves)

    def random(self, names: Iterable[str], rng: jax.Array, abstract: Any) -> dict[str, Any]:
        """Return random parameters of some components, with shardings and dtypes of `abstract`.

        The values of each depend on `rng` and its name alone.
        """
        out = {name: abstract[name] for name in names}
        if not out:
            return {}
        jaxpr, boxed = self._traced
        structure = jax.tree.structure(nn.meta.unbox(boxed))

        def init(key: jax.Array) -> dict[str, Any]:
            leaves = jax.extend.core.jaxpr_as_fun(jaxpr)(key)
            params = jax.tree.unflatten(structure, leaves)
            # The other components are never computed: XLA removes what no output needs.
            return jax.tree.map(
                lambda x, like: x.astype(like.dtype), {name: params[name] for name in out}, out
            )

        return jit(init, out_shardings=shardings_of(out))(rng)

    def like_words(
        self, params: dict[str, Any], names: Iterable[str], words: int
    ) -> dict[str, Any]:
        """Return those of the random components that start as large as words, in that size.

        It is measured on normally distributed visual tokens of one image.

        Args:
          params: of all components.
          names: of the random ones.
          words: number of ids of the language model that are words.
        """
        model, modules = self.model, self.model.modules
        configs: dict[str, Any] = {n: modules[n].config for n in names}  # type: ignore[attr-defined]
        own = [n for n in configs if getattr(configs[n], "init", "") == "words"]
        if not own:
            return {}
        assert isinstance(model, AdapterModel)
        encoder: Any = modules[model.encoder]
        shape = (1, encoder.time_positions(1), encoder.tokens_per_frame(), encoder.width)

        def scaled(params: dict[str, Any]) -> dict[str, Any]:
            wanted = model.apply(params, model.lm, words, method="word_scale")
            visual, new = jax.random.normal(jax.random.key(0), shape), {}
            for i, name in enumerate(model.chain):
                if name in own:
                    before = dataclasses.replace(model, chain=model.chain[: i + 1])
                    y = before.prefix(params | new, visual).astype(jnp.float32)
                    factor = configs[name].scale * wanted / jnp.sqrt(jnp.square(y).mean())
                    new[name] = jax.tree.map(lambda x, f=factor: x * f, params[name])
            return new

        used = {name: params[name] for name in (*model.chain, model.lm)}
        return jit(scaled, out_shardings=shardings_of({n: params[n] for n in own}))(used)

    @functools.cached_property
    def _traced(self) -> tuple[Any, Any]:
        """The init as a jaxpr, and the shapes that it returns, in logical-axis boxes."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.make_jaxpr(functools.partial(_init, self.model), return_shape=True)(key)


def _init(model: Model, rng: jax.Array) -> dict[str, Any]:
    """Return random parameters of all components, the encoder's included, in logical-axis boxes."""
    view = view_of(model)
    size = view.size if view else 0
    frames = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8)
    if isinstance(model, CoCa):
        return model.init(rng, frames)
    if not model.encoder:
        return model.init(rng, None)
    key = component_key(rng, model.encoder)
    encoder, zeros = model.modules[model.encoder], jnp.zeros(frames.shape, frames.dtype)
    visual, variables = encoder.init_with_output(key, zeros)
    shape = jax.ShapeDtypeStruct(visual.shape, visual.dtype)
    return {model.encoder: variables["params"], **model.init(rng, shape)}


def abstract_encoder(encoder: nn.Module, mesh: jax.sharding.Mesh) -> Any:
    """Return shapes with shardings of the parameters of an encoder alone."""
    size = encoder.view.size  # type: ignore[attr-defined]
    frames = jax.ShapeDtypeStruct((1, 1, size, size, 3), jnp.uint8)
    boxed = jax.eval_shape(encoder.init, jax.random.key(0), frames)["params"]
    return outlines.abstract(boxed, mesh)


def abstract_state(
    trainable: dict[str, Any], tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Any:
    """Return shapes and shardings of the train state; moments are sharded as their parameters.

    `trainable` are the shapes with shardings of the trainable components, `tx` is their optimizer.
    """
    state = jax.eval_shape(lambda p: init_state(p, tx), trainable)

    def on_all(x: Any) -> Any:
        return _shape(x, replicated(mesh))

    opt_state = optax.tree_utils.tree_map_params(
        tx, lambda x, p: _shape(x, p.sharding), state.opt_state, trainable,
        transform_non_params=on_all,
    )  # fmt: skip
    return TrainState(on_all(state.step), trainable, opt_state, on_all(state.skipped))


def in_compute_dtype(frozen: Any, dtype: Any) -> Any:
    """Return the shapes of frozen parameters as the devices hold them: floats in `dtype`."""

    def cast(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return _shape(x, x.sharding, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype)

    return jax.tree.map(cast, frozen)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that shapes with shardings take on each device."""
    leaves = jax.tree.leaves(tree)
    counts = (math.prod(x.sharding.shard_shape(x.shape)) for x in leaves)
    return sum(n * itemsize_bits(x.dtype) for n, x in zip(counts, leaves, strict=True)) // 8


def row_shapes(
    sizes: dict[str, int], rows: int = 1, sharding: Any = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of B rows; `sizes` are F, S, P, T and M, see `data.batch`.

    Without F and S it has no images.
    """
    sizes = {**sizes, "B": rows, "C": 3}
    keys = [key for key in SPEC if key != "features" and (key != "frames" or "S" in sizes)]
    shapes = {key: tuple(sizes[dim] for dim in SPEC[key][1]) for key in keys}
    return {
        key: jax.ShapeDtypeStruct(shape, SPEC[key][0], sharding=sharding)
        for key, shape in shapes.items()
    }


def _shape(x: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype if dtype is None else dtype, sharding=sharding)
