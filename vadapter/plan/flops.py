"""FLOPs of matrix products and convolutions: counted in a program, and by formula from sizes.

A multiply-add is two FLOPs. As is usual, everything else (norms, softmax, optimizer) is left out.
Causal attention counts in full, since the program computes the whole square of scores.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
from jax.extend import core

from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.mlp import MlpAdapter
from vadapter.models.adapters.pooler import Pooler
from vadapter.models.adapters.projection import Projection
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.coca import CoCa
from vadapter.models.layers import GATED
from vadapter.models.lm import LM, LMConfig
from vadapter.models.vit import ViT


def count(fn: Callable, *args: Any, loops: int = 1) -> int:
    """Return the FLOPs of a function of arrays, read from its trace; nothing is computed.

    A trace does not say how often a `while` loop runs: `loops` times.
    """
    return count_traced(jax.make_jaxpr(fn)(*args).jaxpr, loops)


def count_traced(jaxpr: Any, loops: int = 1) -> int:
    """Return the FLOPs of a traced program, see `count`."""
    total = 0
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            left = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * math.prod(left[i] for i in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * eqn.outvars[0].aval.size * kernel.size // outputs
        elif name == "cond":
            total += max(count_traced(branch.jaxpr, loops) for branch in params["branches"])
        else:
            times = {"scan": params.get("length", 1), "while": loops}.get(name, 1)
            total += times * sum(count_traced(inner, loops) for inner in subprograms(params))
    return total


def subprograms(params: Mapping[str, Any]) -> list[Any]:
    """Return the programs among an operation's parameters."""
    lists = [v if isinstance(v, list | tuple) else (v,) for v in params.values()]
    kinds = (core.ClosedJaxpr, core.Jaxpr)
    return [getattr(x, "jaxpr", x) for items in lists for x in items if isinstance(x, kinds)]


class Work(NamedTuple):
    """Forward FLOPs of a component for one row."""

    weights: int = 0  # of products with parameters
    first: int = 0  # part of `weights` in the first layer: no gradient if all before is frozen
    mixing: int = 0  # of products of activations with each other (attention)

    def forward(self) -> int:
        """Return the FLOPs of the forward pass."""
        return self.weights + self.mixing

    def step(self, *, trained: bool, crossed: bool) -> int:
        """Return the FLOPs of forward and backward pass.

        Gradients cross a component if they pass through it to a trained one before it.
        """
        if not (trained or crossed):
            return self.forward()
        inputs = self.weights if crossed else self.weights - self.first
        return self.forward() + inputs + trained * self.weights + 2 * self.mixing


def formula(
    model: AdapterModel | CoCa, trained: Collection[str], sizes: Mapping[str, int]
) -> dict[str, int] | None:
    """Return component -> FLOPs of a training step for one row, without recomputation.

    The sizes are F, S, P, T and M of the batch, see `data.batch`. Returns None if a component has
    no formula (MobileNet, CoCa).
    """
    work = forward_work(model, sizes)
    if work is None:
        return None
    crossed, flops = False, {}
    for name, component in work.items():
        flops[name] = component.step(trained=name in trained, crossed=crossed)
        crossed = crossed or name in trained
    return flops


def forward_work(model: AdapterModel | CoCa, sizes: Mapping[str, int]) -> dict[str, Work] | None:
    """Return the work of each component for one row, in the order of the data flow."""
    if not isinstance(model, AdapterModel):
        return None
    frames, tokens, width = sizes.get("F", 0), 0, 0
    work: dict[str, Work] = {}
    if model.encoder:
        encoder: Any = model.modules[model.encoder]
        if not isinstance(encoder, ViT) or encoder.config.pooled:
            return None
        tokens, width = encoder.tokens_per_frame(), encoder.width
        work[model.encoder] = _vit(encoder, frames)
        tokens *= frames
    for name in model.chain:
        module: Any = model.modules[name]
        c = module.config
        if isinstance(module, Resampler):
            work[name] = _resampler(c, tokens, frames, width)
            tokens, width = c.queries, c.query_dim
        elif isinstance(module, Pooler):
            work[name] = _pooler(c, tokens, width)
            tokens, width = c.queries, c.width
        elif isinstance(module, MlpAdapter):
            tokens = tokens // frames * min(c.frames, frames)
            first = _linear(tokens, width, c.hidden_dim)
            work[name] = Work(first + _linear(tokens, c.hidden_dim, c.width), first)
            width = c.width
        elif isinstance(module, Projection):
            product = _linear(tokens, width, c.width)
            work[name] = Work(product, product)
            width = c.width
        elif isinstance(module, LM):
            work[name], width = _stack(c, tokens, tokens), c.width
        else:
            return None
    lm: Any = model.modules[model.lm]
    rows = sizes["P"] + tokens + sizes["T"]
    states = _stack(lm.config, rows, sizes["T"] if model.frozen_lm else rows)
    head = _linear(sizes["M"], lm.config.width, lm.config.vocab_size)
    work[model.lm] = Work(states.weights + head, 0, states.mixing)
    return work


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _vit(encoder: ViT, frames: int) -> Work:
    c = encoder.config
    patches = (c.image_size // c.patch) ** 2
    tokens = patches + c.class_token + c.registers
    depth = c.depth - (c.tap == "penultimate")
    block = _linear(tokens, c.width, 4 * c.width) + _linear(tokens, c.width, 2 * c.mlp_dim)
    weights = _linear(patches, 3 * c.patch**2, c.width) + depth * block
    return Work(frames * weights, 0, frames * depth * 4 * tokens**2 * c.width)


def _resampler(c: Any, tokens: int, frames: int, width: int) -> Work:
    first = _linear(tokens, width, c.query_dim)
    attended = tokens // frames * c.frames if c.time_embed else tokens
    attended += c.queries * c.concat_queries
    layer = 2 * _linear(c.queries, c.query_dim, c.hidden_dim)
    layer += 2 * _linear(attended, c.query_dim, c.hidden_dim)
    layer += c.ffn * 2 * _linear(c.queries, c.query_dim, 4 * c.hidden_dim)
    mixing = 4 * c.queries * attended * c.hidden_dim
    return Work(first + c.layers * layer, first, c.layers * mixing)


def _pooler(c: Any, tokens: int, width: int) -> Work:
    keys = 2 * _linear(tokens, width, c.width)
    weights = keys + 2 * _linear(c.queries, c.width, c.width)
    return Work(weights, keys, 4 * c.queries * tokens * c.width)


def _stack(c: LMConfig, rows: int, last: int) -> Work:
    """Return the work of a language model's layers on a row, in the last one for `last` tokens."""
    size = c.head_dim or c.width // c.heads
    inner, keys = c.heads * size, (c.kv_heads or c.heads) * size
    each = 2 * c.width * inner + (3 if c.mlp in GATED else 2) * c.width * c.mlp_dim
    queries = (c.depth - 1) * rows + last  # tokens, summed over layers
    weights = 2 * queries * each + c.depth * 2 * _linear(rows, c.width, keys)
    return Work(weights, 0, queries * 4 * rows * inner)
