"""CoCa's attentional pooler (arXiv 2205.01917): one cross-attention from trainable queries.

Legend: B batch, F frames, N visual tokens a frame, Q queries, D encoder width, E width.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vadapter.models.adapters.cross_attention import cross_attention, trainable_queries
from vadapter.models.layers import Dtype, Norm


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """One cross-attention, then a LayerNorm.

    Attributes:
      queries: Q.
      width: E, divisible by `heads`.
      norm_queries: a LayerNorm on the queries too (open_clip).
      bias: of the projections (open_clip).
    """

    queries: int = 256
    width: int = 768
    heads: int = 12
    norm_queries: bool = False
    bias: bool = False
    norm_eps: float = 1e-6


class Pooler(nn.Module):
    """Pools the tokens of all frames together."""

    config: PoolerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c = self.config
        x = rearrange(visual, "b f n d -> b (f n) d")
        queries = trainable_queries(self, len(x), (c.queries, c.width), self.dtype)
        if c.norm_queries:
            queries = self._norm("norm_queries")(queries)
        kv = self._norm("norm_visual")(x)
        y, _ = cross_attention(c.heads, c.width, self.dtype, c.bias)(queries, kv)
        return self._norm("norm")(y)

    def _norm(self, name: str) -> Norm:
        return Norm("layer", self.config.norm_eps, self.dtype, name=name)
