"""Where the queries of a connector look: weights of its attentions over the visual tokens.

Legend: B batch, F frames, N visual tokens a frame, Q queries, S keys, H heads, L layers, h rows and
w columns of a frame.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vadapter.models.adapter_model import AdapterModel, Params
from vadapter.models.lm import LM


class Place(NamedTuple):
    """An attention over visual tokens: a component, and the path in it; it may be many layers."""

    component: str
    path: tuple[str, ...]


def sown_by_chain(model: AdapterModel, params: Params, visual: Any) -> dict[str, list[Any]]:
    """Return what the attentions of the chain sow, by component; none of those inside an LM.

    Inside `jit`, or of shapes inside `jax.eval_shape`.
    """
    names = [name for name in model.chain if not isinstance(model.modules[name], LM)]
    seeing = dataclasses.replace(model, sown={name: [] for name in names})
    seeing.prefix(params, visual)
    return dict(seeing.sown)


def weights_in(sown: Mapping[str, list[Any]], tokens: int) -> dict[Place, Any]:
    """Return the weights over visual tokens, [L, B, H, Q, S] or without L, by place.

    Of a component with attentions named `cross`, only those: the others are among its queries.
    `tokens` is N: S is a multiple of it, or more where the queries are keys, too.
    """
    found = {}
    for component, calls in sown.items():
        leaves = [leaf for call in calls for leaf in jax.tree_util.tree_leaves_with_path(call)]
        paths = [tuple(str(part.key) for part in path[1:-1] if hasattr(part, "key"))
                 for path, _ in leaves]  # fmt: skip
        cross = any("cross" in path for path in paths)
        for path, (_, weights) in zip(paths, leaves, strict=True):
            if weights.shape[-1] >= tokens and ("cross" in path or not cross):
                found[Place(component, path[:-1])] = weights
    return found


def make_attention(
    model: AdapterModel,
) -> Callable[[Params, Mapping[str, Any]], dict[str, Any]]:
    """Return a function (params, batch) -> component -> f32[B,Q,S], to compile.

    The weights are means over the layers and heads of the component, on the visual tokens alone:
    those on queries, where they are keys behind the visual tokens, are left out. One row is
    computed at a time: the weights of all layers would not fit for a batch.
    """

    def of_row(params: Params, visual: Float[Array, "F N D"]) -> dict[str, Any]:
        sown = sown_by_chain(model, params, visual[None])
        parts: dict[str, list[Any]] = {}
        for place, weights in weights_in(sown, visual.shape[1]).items():
            weights = weights[..., : weights.shape[-1] - _queries_in_keys(model, place.component)]
            flat = weights.astype(jnp.float32).reshape(-1, *weights.shape[-2:])
            parts.setdefault(place.component, []).append(flat)
        return {name: jnp.concatenate(each).mean(0) for name, each in parts.items()}

    def of_rows(params: Params, batch: Mapping[str, Any]) -> dict[str, Any]:
        visual = model.encode(params, batch)
        return jax.lax.map(lambda row: of_row(params, row), visual)

    return of_rows


def _queries_in_keys(model: AdapterModel, component: str) -> int:
    """Return how many of the keys of a component are its queries, which are the last ones."""
    config: Any = model.modules[component].config  # type: ignore[attr-defined]
    return config.queries if getattr(config, "concat_queries", False) else 0


class Maps(NamedTuple):
    """The attention of the queries of one component to one image or clip."""

    component: str
    #: f32[Q,F,h,w], the share of a query's attention that a visual token has; h is 1 without a grid
    maps: np.ndarray
    is_grid: bool
    rest: float  # mean share on what is not in the maps: class token, registers, other queries

    @property
    def spread(self) -> float:
        """The effective number of tokens that a query attends to, e^entropy, as share of all."""
        p = self.maps.reshape(len(self.maps), -1)
        p = p / np.maximum(p.sum(1, keepdims=True), 1e-30)
        entropy = -(p * np.log(np.maximum(p, 1e-30))).sum(1)
        return float(np.exp(entropy).mean() / p.shape[1])


def arrange(component: str, weights: np.ndarray, frames: int, encoder: nn.Module) -> Maps:
    """Return the weights f32[Q,S] of one image or clip by frame, row and column.

    A connector may repeat frames (an image counts as a clip of equal frames); the repetitions of
    a frame are added up. Weights that are not there, on other keys than the visual tokens, and
    those of leading tokens that are no patches are in `rest`.
    """
    module: Any = encoder
    N, grid = module.tokens_per_frame(), grid_of(module)
    times = weights.shape[-1] // N
    of_tokens = weights[:, : times * N].reshape(len(weights), times, N)
    if times % frames == 0:  # each frame is repeated in its place
        of_tokens = of_tokens.reshape(len(weights), frames, times // frames, N).sum(2)
    if grid:
        patches = of_tokens[..., N - grid[0] * grid[1] :]
        maps = patches.reshape(*patches.shape[:2], *grid)
    else:
        maps = of_tokens[:, :, None]
    rest = float(1 - maps.sum((1, 2, 3)).mean())
    return Maps(component, maps, bool(grid), max(rest, 0.0))


def grid_of(module: Any) -> tuple[int, ...]:
    """Return (rows, columns) of an encoder's tokens, behind leading ones; () without a grid."""
    tokens, config = module.tokens_per_frame(), module.config
    if grid := tuple(module.grid()):
        return grid
    if getattr(config, "pooled", None) or not hasattr(config, "patch"):
        return ()
    side = config.image_size // config.patch
    return (side, side) if tokens > side * side else ()
