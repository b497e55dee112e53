"""Cross-attention from trainable queries to visual tokens, shared by the resampler and the pooler.

Legend: B batch, Q queries, E width of the queries.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vadapter.models.layers import Attention, Dtype, embedding_param


def trainable_queries(
    module: nn.Module, batch: int, shape: tuple[int, int], dtype: Dtype, std: float = 1.0
) -> Float[Array, "B Q E"]:
    """Create the parameter `queries` of `module` and repeat it for every row.

    Args:
      module: owns the parameter.
      batch: B.
      shape: (Q, E).
      dtype: of the computation.
      std: standard deviation at initialization.
    """
    queries = embedding_param(module, "queries", (1, *shape), nn.initializers.normal(std))
    return jnp.broadcast_to(queries, (batch, *shape)).astype(dtype)


def cross_attention(heads: int, width: int, dtype: Dtype, bias: bool = False) -> Attention:
    """Return multi-head attention named `attn`; `width` is that of all heads together."""
    return Attention(heads, heads, width // heads, bias, dtype=dtype, name="attn")
