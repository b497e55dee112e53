"""Small models for the tests, with parameters that need no compilation to draw.

Legend: B batch, F frames, N visual tokens a frame, D encoder width, Q queries, T text tokens.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.projection import Projection, ProjectionConfig
from vadapter.models.adapters.resampler import Resampler, ResamplerConfig
from vadapter.models.delta import DeltaConfig
from vadapter.models.lm import LM, LMConfig
from vadapter.models.vit import ViT, ViTConfig

V, B, IMAGE, N = 32, 8, 16, 4

TLM = LMConfig(V, width=16, depth=2, heads=2, mlp_dim=32, max_len=64)
LLM = LMConfig(V, width=24, depth=3, heads=4, kv_heads=2, mlp_dim=48, max_len=64, norm="rms")
DELTA = DeltaConfig(key_heads=2, value_heads=4, key_dim=6, value_dim=5)
VIT = ViTConfig(image_size=IMAGE, patch=8, width=16, depth=2, heads=2, mlp_dim=32)
RESAMPLER = ResamplerConfig(queries=4, query_dim=16, hidden_dim=16, layers=1, heads=2)


def filled(abstract: Any, seed: int = 0) -> Any:
    """Unboxed numpy parameters for a tree of shapes: every leaf random, biases too."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        noise = rng.standard_normal(leaf.shape).astype(np.float32)
        if path[-1].key == "scale":
            return np.float32(1) + np.float32(0.1) * noise
        return noise * np.float32(leaf.shape[-2] ** -0.5 if len(leaf.shape) > 1 else 0.1)

    return jax.tree_util.tree_map_with_path(one, nn.unbox(abstract))


def key(seed: int) -> jax.Array:
    """A key of the generator that compiles fastest, for the tests that need a true start."""
    return jax.random.key(seed, impl="unsafe_rbg")


def init(module: nn.Module, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
    """Random parameters of a module called with these arguments."""
    shapes = jax.eval_shape(lambda k: module.init(k, *args, **kwargs), jax.random.key(0))
    return filled(shapes["params"], seed)


def lm(config: LMConfig = TLM, seed: int = 0, **overrides: Any) -> tuple[LM, Any]:
    """A language model and its parameters."""
    module = LM(dataclasses.replace(config, **overrides))
    return module, init(module, jnp.zeros((1, 2), jnp.int32), seed=seed)


def paths(tree: Any) -> dict[str, Any]:
    """`a/b/c` -> leaf."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    part = lambda k: str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))  # noqa: E731
    return {"/".join(map(part, path)): leaf for path, leaf in flat}


def boxed(model: AdapterModel, frames: int = 1) -> dict[str, Any]:
    """Shapes of every component's parameters, the encoder's included, in logical-axis boxes."""
    rng = jax.random.key(0)
    encoder = model.modules[model.encoder]
    pixels = jnp.zeros((1, frames, IMAGE, IMAGE, 3))
    tokens, variables = jax.eval_shape(encoder.init_with_output, rng, pixels)
    rest = jax.eval_shape(lambda k: model.init(k, tokens), rng)
    return {model.encoder: variables["params"]} | rest


def stage2(**overrides: Any) -> AdapterModel:
    """encoder → resampler → fc_in → tlm → fc_out → llm."""
    modules = {
        "encoder": ViT(VIT),
        "resampler": Resampler(RESAMPLER),
        "fc_in": Projection(ProjectionConfig(TLM.width)),
        "tlm": LM(TLM),
        "fc_out": Projection(ProjectionConfig(LLM.width)),
        "llm": LM(LLM),
    }
    chain = ("resampler", "fc_in", "tlm", "fc_out")
    return AdapterModel(modules=modules, encoder="encoder", chain=chain, lm="llm", **overrides)
