"""Honeybee's C-Abstractor (arXiv 2312.06742): convolutions around an adaptive average pool.

A block is RegNet's (arXiv 2003.13678) with depthwise filters and squeeze-excitation.

Legend: B batch, F frames, n = B · F images, N visual tokens a frame, h rows and w columns with
h · w = N, Q output tokens a frame, C channels of the blocks, D encoder width, E output width.
"""

import dataclasses
import math
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.grid import adaptive_mean, on_grid
from vadapter.models.convolution import depthwise
from vadapter.models.layers import Dtype, Norm, embedding_param, linear, partitioned
from vadapter.models.transformer import REMAT, Remat

# Only the channels inside a block are sharded, like those of a feed-forward.
_AXES = {"expand": ("embed", "mlp"), "project": ("mlp", "embed"), "shortcut": (None, "embed")}
_SQUEEZE = 4  # channels per channel inside the squeeze-excitation


@dataclasses.dataclass(frozen=True)
class CAbstractorConfig:
    """Positions, blocks, pool to √Q × √Q, blocks, Linear-SiLU-Linear.

    Attributes:
      queries: Q, a square.
      width: E; 0 takes the width of the language model that follows in the chain.
      hidden_dim: C.
      blocks: in front of the pool, and as many behind it.
      merge: the frames of a clip: mean, so that a clip has Q tokens; concat, F · Q.
      grid: (h, w); () takes the encoder's.
      remat: what the backward pass recomputes, see `transformer.BlockConfig`.
    """

    queries: int = 144
    width: int = 0
    hidden_dim: int = 1024
    blocks: int = 3
    merge: Literal["mean", "concat"] = "mean"
    grid: tuple[int, ...] = ()
    remat: Remat = "none"

    DERIVED: ClassVar = ("width", "grid")
    needs_grid: ClassVar = True

    def __post_init__(self) -> None:
        if self.queries < 1 or self.side**2 != self.queries:
            near = [side**2 for side in (self.side, self.side + 1) if side]
            raise ConfigError(
                f"queries={self.queries} is not a square; the nearest: "
                f"{' and '.join(map(str, near))}"
            )
        if self.blocks < 1:
            raise ConfigError(f"blocks={self.blocks}: at least 1")

    @property
    def side(self) -> int:
        """√Q."""
        return math.isqrt(max(self.queries, 0))


class Depthwise(nn.Module):
    """A 3 × 3 filter for each channel."""

    @nn.compact
    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n h w C"]:
        init = partitioned(nn.initializers.he_normal(), None, None, None, "embed")
        kernel = constrain(self.param("kernel", init, (3, 3, 1, x.shape[-1])))
        return depthwise(x, kernel.astype(x.dtype))


class Block(nn.Module):
    """silu(x + branch(x)), the branch 1 × 1, depthwise 3 × 3, squeeze-excitation and 1 × 1.

    Every convolution is without bias and followed by a LayerNorm over the channels, those but the
    last also by a SiLU; an input of another width is projected before it is added.
    """

    width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "n h w _"]) -> Float[Array, "n h w C"]:
        x = constrain(x, "batch")
        y = nn.silu(self._norm("norm_expand")(self._pointwise("expand", x)))
        y = checkpoint_name(Depthwise(name="depthwise")(y), "u")
        y = nn.silu(self._norm("norm_depthwise")(y))
        y = self._norm("norm_project")(self._pointwise("project", self._squeeze(y)))
        if x.shape[-1] != self.width:
            x = self._norm("norm_shortcut")(self._pointwise("shortcut", x))
        return constrain(nn.silu(x + y), "batch")

    def _pointwise(self, name: str, x: Float[Array, "n h w _"]) -> Float[Array, "n h w C"]:
        y = linear(self.width, _AXES[name], False, self.dtype, name=name)(x)
        return checkpoint_name(y, "u")

    def _squeeze(self, x: Float[Array, "n h w C"]) -> Float[Array, "n h w C"]:
        """Return the channels, each times a factor in 0..1 that follows from their means."""
        means = x.mean((1, 2), keepdims=True)
        inner = linear(self.width // _SQUEEZE, ("embed", "mlp"), True, self.dtype, name="squeeze")
        gate = linear(self.width, ("mlp", "embed"), True, self.dtype, name="excite")
        return x * nn.sigmoid(gate(nn.silu(inner(means))))

    def _norm(self, name: str) -> Norm:
        return Norm("layer", dtype=self.dtype, name=name)


class CAbstractor(nn.Module):
    """Every frame by itself; neighbors on the grid stay neighbors among the output tokens."""

    config: CAbstractorConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c, (B, _, N, D) = self.config, visual.shape
        init = nn.initializers.truncated_normal(0.02)
        positions = embedding_param(self, "positions", (1, 1, N, D), init)
        x = visual.astype(self.dtype) + positions.astype(self.dtype)
        x = on_grid(rearrange(x, "b f n d -> (b f) n d"), c.grid)
        block = nn.remat(Block, policy=REMAT[c.remat]) if c.remat != "none" else Block
        for i in range(2 * c.blocks):
            if i == c.blocks:
                x = adaptive_mean(x, c.side)
            x = block(c.hidden_dim, self.dtype, name=f"block_{i}")(x)
        x = rearrange(x, "(b f) h w c -> b f (h w) c", b=B)
        x = nn.silu(linear(c.width, ("embed", "mlp"), True, self.dtype, name="up")(x))
        x = linear(c.width, ("mlp", "embed"), True, self.dtype, name="down")(x)
        return x.mean(1) if c.merge == "mean" else rearrange(x, "b f q e -> b (f q) e")
