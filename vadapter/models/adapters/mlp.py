"""LLaVA 1.5's adapter (arXiv 2310.03744): two linear layers with a GELU, token by token.

Legend: B batch, F frames, N visual tokens a frame, Q = frames · N output tokens, D encoder width,
E output width.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from vadapter.models.layers import Dtype, linear


@dataclasses.dataclass(frozen=True)
class MlpAdapterConfig:
    """Sizes of the two layers.

    Attributes:
      width: E; 0 takes the width of the language model that follows in the chain.
      frames: clips are averaged over time down to this many frames.
    """

    hidden_dim: int
    width: int
    frames: int = 1

    DERIVED: ClassVar = ("width",)


class MlpAdapter(nn.Module):
    """One output token per visual token."""

    config: MlpAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c = self.config
        frames = min(c.frames, visual.shape[1])
        x = reduce(visual, "b (g f) n d -> b g n d", "mean", g=frames).astype(self.dtype)
        x = rearrange(x, "b g n d -> b (g n) d")
        x = nn.gelu(linear(c.hidden_dim, ("embed", "mlp"), True, self.dtype, name="up")(x))
        return linear(c.width, ("mlp", "embed"), True, self.dtype, name="down")(x)
