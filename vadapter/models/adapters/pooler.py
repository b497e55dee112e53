"""CoCa's attentional pooler (arXiv 2205.01917): one cross-attention from trainable queries.

Legend: B batch, F frames, N visual tokens a frame, Q queries, D encoder width, E width.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vadapter.models.layers import Attention, Dtype, Norm, trainable_tokens


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """One cross-attention, then a LayerNorm; open_clip has `norm_queries` and `bias`, too.

    Attributes:
      queries: Q.
      width: E, divisible by `heads`.
      norm_queries: a LayerNorm on the queries.
      bias: of the projections.
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
        shape, init = (len(x), c.queries, c.width), nn.initializers.normal(1.0)
        queries = trainable_tokens(self, "queries", shape, init, self.dtype)
        if c.norm_queries:
            queries = self._norm("norm_queries")(queries)
        head_dim = c.width // c.heads
        attend = Attention(c.heads, c.heads, head_dim, c.bias, dtype=self.dtype, name="attn")
        y, _ = attend(queries, self._norm("norm_visual")(x))
        return self._norm("norm")(y)

    def _norm(self, name: str) -> Norm:
        return Norm("layer", self.config.norm_eps, self.dtype, name=name)
