"""FLOPs of matrix products and convolutions: counted in a program, and by formula from sizes.

A multiply-add is two. Everything else a step computes (norms, softmax, optimizer) is left out, as
is usual, and so is attention's causality: the program computes the whole square.

Legend: F frames, S pixels a side, N visual tokens a frame, D encoder width, Q queries, E language
model width, P prompt tokens, T text tokens, M targets, V vocabulary, R tokens in a row.
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
    """FLOPs of a function, read from its program; nothing is computed.

    Args:
      fn: any function of arrays, or of shapes.
      args: its arguments; shapes will do.
      loops: how often the body of a `while` runs, which the program does not tell.
    """
    return count_traced(jax.make_jaxpr(fn)(*args).jaxpr, loops)


def count_traced(jaxpr: Any, loops: int = 1) -> int:
    """As `count`, of a program that is traced already."""
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
            total += times * sum(count_traced(inner, loops) for inner in programs_in(params))
    return total


def programs_in(params: Mapping[str, Any]) -> list[Any]:
    """The programs among an operation's parameters."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found


class Work(NamedTuple):
    """Forward FLOPs of a part of a row.

    Attributes:
      weights: of products with parameters.
      first: of those, the first, whose input needs no gradient where everything before is frozen.
      mixing: of products of activations with each other (attention).
    """

    weights: int = 0
    first: int = 0
    mixing: int = 0

    def forward(self) -> int:
        """FLOPs of the forward pass."""
        return self.weights + self.mixing

    def step(self, *, learns: bool, crossed: bool) -> int:
        """FLOPs of forward and backward.

        Args:
          learns: its parameters are trained.
          crossed: gradients go through it to something trained before it.
        """
        if not (learns or crossed):
            return self.forward()
        inputs = self.weights if crossed else self.weights - self.first
        return self.forward() + inputs + learns * self.weights + 2 * self.mixing


def formula(
    model: AdapterModel | CoCa, learns: Collection[str], sizes: Mapping[str, int]
) -> dict[str, int] | None:
    """FLOPs of a training step for each row and component, without recomputation.

    Args:
      model: of a stage.
      learns: the components that it trains.
      sizes: F, S, P, T and M of the batch, see `data.batch`.

    Returns:
      Component -> FLOPs a row; None for a model with a part that has no formula (MobileNet, CoCa).
    """
    work = forward_work(model, sizes)
    if work is None:
        return None
    before, flops = False, {}
    for name, part in work.items():
        flops[name] = part.step(learns=name in learns, crossed=before)
        before = before or name in learns
    return flops


def forward_work(model: AdapterModel | CoCa, sizes: Mapping[str, int]) -> dict[str, Work] | None:
    """The work of each component for one row, in the order of the data flow."""
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
            first, second = (
                _linear(tokens, width, c.hidden_dim),
                _linear(tokens, c.hidden_dim, c.width),
            )
            work[name] = Work(first + second, first)
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
    seen = tokens // frames * c.frames if c.time_embed else tokens
    seen += c.queries * c.concat_queries
    layer = 2 * _linear(c.queries, c.query_dim, c.hidden_dim)
    layer += 2 * _linear(seen, c.query_dim, c.hidden_dim)
    layer += c.ffn * 2 * _linear(c.queries, c.query_dim, 4 * c.hidden_dim)
    mixing = 4 * c.queries * seen * c.hidden_dim
    return Work(first + c.layers * layer, first, c.layers * mixing)


def _pooler(c: Any, tokens: int, width: int) -> Work:
    keys = 2 * _linear(tokens, width, c.width)
    weights = keys + 2 * _linear(c.queries, c.width, c.width)
    return Work(weights, keys, 4 * c.queries * tokens * c.width)


def _stack(c: LMConfig, rows: int, last: int) -> Work:
    """All layers of a language model over R tokens, the last one for `last` of them."""
    size = c.head_dim or c.width // c.heads
    inner, keys = c.heads * size, (c.kv_heads or c.heads) * size
    each = 2 * c.width * inner + (3 if c.mlp in GATED else 2) * c.width * c.mlp_dim
    asked = (c.depth - 1) * rows + last  # tokens over all layers
    weights = 2 * asked * each + c.depth * 2 * _linear(rows, c.width, keys)
    return Work(weights, 0, asked * 4 * rows * inner)
