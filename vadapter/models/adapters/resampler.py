"""Perceiver resampler: visual tokens of any number → a fixed number of queries.

Legend: B batch, F frames, N visual tokens a frame, S visual tokens a row (all frames), Q queries,
D encoder width, E width of the queries.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.layers import (
    Attention,
    Dtype,
    Mlp,
    Norm,
    embedding_param,
    linear,
    trainable_tokens,
)
from vadapter.models.transformer import Remat, scan_layers


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver resampler with the switches of the paper's Table 1.

    Attributes:
      queries: Q.
      query_dim: E, width of the queries, and of the visual tokens after the input projection.
      hidden_dim: inner width of attention (all heads together) and 1/4 of the feed-forward's.
      layers: cross-attention blocks; 6 for the baseline, 1 before the tiny LM.
      norm, final_norm: LayerNorm on queries and visual inputs; on the output (Table 1a).
      ffn: a feed-forward in every layer (Table 1b).
      time_embed: a trainable embedding for each of `frames`, added to the visual tokens (Table 1b).
      concat_queries: keys and values also from the queries (Flamingo, arXiv 2204.14198).
      space_embed: a trainable embedding per visual token, for encoders without positions (CNNs).
      query_std: standard deviation of the queries at initialization.
      fused_attention: see `BlockConfig`.
      remat: what the backward pass recomputes, see `BlockConfig`. A layer's attention weights, of
        every query on the tokens of all frames, are by far the largest arrays of a resampler.
    """

    queries: int = 256
    query_dim: int = 768
    hidden_dim: int = 768
    layers: int = 6
    heads: int = 12
    norm: Literal["none", "shared", "separate"] = "separate"
    final_norm: bool = True
    ffn: bool = True
    time_embed: bool = True
    frames: int = 8
    concat_queries: bool = False
    space_embed: bool = False
    query_std: float = 1.0
    fused_attention: bool = True
    remat: Remat = "none"


class ResamplerLayer(nn.Module):
    """queries += attention(norm(queries), norm(visual)); queries += mlp(norm(queries))."""

    config: ResamplerConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self, queries: Float[Array, "B Q E"], visual: Float[Array, "B S E"]
    ) -> tuple[Float[Array, "B Q E"], None]:
        c, queries = self.config, constrain(queries, "batch")
        if c.norm == "none":
            q, kv = queries, visual
        else:
            norm_q = Norm("layer", dtype=self.dtype, name="norm_queries")
            norm_v = Norm("layer", dtype=self.dtype, name="norm_visual")
            q, kv = norm_q(queries), (norm_v if c.norm == "separate" else norm_q)(visual)
        if c.concat_queries:
            kv = jnp.concatenate([kv, q], axis=1)
        head_dim = c.hidden_dim // c.heads
        attend = Attention(
            c.heads, c.heads, head_dim, fused=c.fused_attention, dtype=self.dtype, name="attn"
        )
        queries = queries + attend(q, kv)[0]
        if c.ffn:
            h = Norm("layer", dtype=self.dtype, name="norm_mlp")(queries)
            queries = queries + Mlp(4 * c.hidden_dim, "gelu", dtype=self.dtype, name="mlp")(h)
        return queries, None  # what `nn.scan` expects: the carry, and nothing to stack


class Resampler(nn.Module):
    """A scanned stack of `ResamplerLayer`: its parameters have a leading `layers` axis."""

    config: ResamplerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c = self.config
        if c.hidden_dim % c.heads:
            raise ConfigError(f"hidden_dim={c.hidden_dim} is not divisible by heads={c.heads}")
        x = linear(c.query_dim, (None, "embed"), True, self.dtype, name="in_proj")(visual)
        init = nn.initializers.normal(0.02)
        if c.space_embed:
            shape = (1, 1, x.shape[2], c.query_dim)
            x = x + embedding_param(self, "space_embed", shape, init).astype(x.dtype)
        if c.time_embed:
            x = add_time_embedding(self, x, c.frames)
        x = constrain(rearrange(x, "b f n d -> b (f n) d"), "batch")
        shape, init = (len(x), c.queries, c.query_dim), nn.initializers.normal(c.query_std)
        queries = trainable_tokens(self, "queries", shape, init, self.dtype)
        layers = scan_layers(ResamplerLayer, c.layers, c.remat, nn.broadcast, (queries, x))
        queries, _ = layers(c, self.dtype, name="layers")(queries, x)
        return Norm("layer", dtype=self.dtype, name="norm")(queries) if c.final_norm else queries


def add_time_embedding(
    module: nn.Module, x: Float[Array, "B F N D"], frames: int
) -> Float[Array, "B T N D"]:
    """Add a parameter of `module`, one vector for each of `frames`, to the tokens of a clip.

    An image is encoded once and counts as `frames` equal frames, so it is repeated here, after the
    encoder. A shorter clip repeats each of its frames, which keeps their order.

    Raises:
      ValueError: `frames` is not a multiple of the clip's.
    """
    if frames % x.shape[1]:
        raise ValueError(
            f"{x.shape[1]} frames cannot be repeated to the {frames} frames of the time embedding"
        )
    x = jnp.repeat(x, frames // x.shape[1], axis=1)
    shape, init = (1, frames, 1, x.shape[-1]), nn.initializers.normal(0.02)
    return x + embedding_param(module, "time_embed", shape, init).astype(x.dtype)
