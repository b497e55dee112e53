"""From visual tokens to a fixed number of queries: perceiver resampler, attentional pooler, MLP.

Legend: B batch, F frames, N visual tokens a frame, Q queries, D encoder width, E output width.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.layers import Attention, Dtype, Mlp, Norm, linear, partitioned
from vadapter.models.transformer import Remat, in_a_row


@dataclasses.dataclass(frozen=True)
class ResamplerConfig:
    """Perceiver resampler with the switches of the paper's Table 1.

    Attributes:
      queries: Q, learned.
      query_dim: width of the queries, and of the visual tokens after the input projection.
      hidden_dim: inner width of attention (all heads together) and 1/4 of the feed-forward's.
      layers: cross-attention blocks; 6 for the baseline, 1 in front of the tiny LM.
      heads: attention heads; divides hidden_dim.
      norm: none | shared | separate LayerNorm on queries and visual inputs (Table 1a).
      final_norm: LayerNorm on the output (Table 1a).
      ffn: a feed-forward in every layer (Table 1b).
      time_embed: a learned embedding per frame, added to the visual tokens (Table 1b).
      frames: how many frames there are time embeddings for.
      concat_queries: keys and values also from the queries (Flamingo, arXiv 2204.14198).
      space_embed: a learned embedding per visual token, for encoders without positions (CNNs).
      query_std: spread of the queries at initialization.
      remat: what the backward pass computes again, see `BlockConfig`. A layer's attention weights,
        of every query on the tokens of all frames, are by far the largest arrays of a resampler.
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
    remat: Remat = "none"


class ResamplerLayer(nn.Module):
    """queries += attention(norm(queries), norm(visual)); queries += mlp(norm(queries))."""

    config: ResamplerConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, queries: jax.Array, visual: jax.Array) -> tuple[jax.Array, None]:
        c, queries = self.config, constrain(queries, "batch")
        if c.norm == "none":
            q, kv = queries, visual
        else:
            norm_q = Norm("layer", dtype=self.dtype, name="norm_queries")
            norm_v = Norm("layer", dtype=self.dtype, name="norm_visual")
            q, kv = norm_q(queries), (norm_v if c.norm == "separate" else norm_q)(visual)
        if c.concat_queries:
            kv = jnp.concatenate([kv, q], axis=1)
        attn = Attention(c.heads, c.heads, c.hidden_dim // c.heads, dtype=self.dtype, name="attn")
        queries = queries + attn(q, kv)[0]
        if c.ffn:
            h = Norm("layer", dtype=self.dtype, name="norm_mlp")(queries)
            queries = queries + Mlp(4 * c.hidden_dim, "gelu", dtype=self.dtype, name="mlp")(h)
        return queries, None  # what `nn.scan` expects: carry, and nothing to stack


class Resampler(nn.Module):
    """visual tokens [B,F,N,D] -> [B,Q,query_dim]; layers are scanned, their parameters stacked."""

    config: ResamplerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: jax.Array) -> jax.Array:
        c = self.config
        if c.hidden_dim % c.heads:
            raise ConfigError(f"hidden_dim={c.hidden_dim} does not divide into heads={c.heads}")
        B, F, N, _ = visual.shape
        x = linear(c.query_dim, (None, "embed"), True, self.dtype, name="in_proj")(visual)
        if c.space_embed:
            x = x + self._embed("space_embed", (1, 1, N, c.query_dim)).astype(x.dtype)
        if c.time_embed:
            if c.frames % F:
                raise ValueError(
                    f"{F} frames do not repeat to the {c.frames} of the time embedding"
                )
            # An image is one encoding that counts as `frames` equal frames: repeated only here.
            # Shorter clips hold each frame, which keeps their order in time.
            x = jnp.repeat(x, c.frames // F, axis=1)
            x = x + self._embed("time_embed", (1, c.frames, 1, c.query_dim)).astype(x.dtype)
        x = constrain(rearrange(x, "b f n d -> b (f n) d"), "batch")
        queries = self._embed("queries", (1, c.queries, c.query_dim), c.query_std)
        queries = jnp.broadcast_to(queries, (B, c.queries, c.query_dim)).astype(self.dtype)
        layers = in_a_row(ResamplerLayer, c.layers, c.remat, nn.broadcast)
        queries, _ = layers(c, self.dtype, name="layers")(queries, x)
        return Norm("layer", dtype=self.dtype, name="norm")(queries) if c.final_norm else queries

    def _embed(self, name: str, shape: tuple[int, ...], std: float = 0.02) -> jax.Array:
        axes = (*(None,) * (len(shape) - 1), "embed")
        return constrain(self.param(name, partitioned(nn.initializers.normal(std), *axes), shape))


@dataclasses.dataclass(frozen=True)
class PoolerConfig:
    """CoCa's attentional pooler (arXiv 2205.01917): one cross-attention, then a LayerNorm.

    Attributes:
      queries, width: Q learned queries, of that width; heads divide it.
      norm_queries: a LayerNorm on the queries too; bias: of the projections (both: open_clip).
    """

    queries: int = 256
    width: int = 768
    heads: int = 12
    norm_queries: bool = False
    bias: bool = False
    norm_eps: float = 1e-6


class Pooler(nn.Module):
    """visual tokens [B,F,N,D] -> [B,Q,width]; all frames are pooled together."""

    config: PoolerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: jax.Array) -> jax.Array:
        c = self.config
        x = rearrange(visual, "b f n d -> b (f n) d")
        init = partitioned(nn.initializers.normal(1.0), None, None, "embed")
        queries = constrain(self.param("queries", init, (1, c.queries, c.width)))
        queries = jnp.broadcast_to(queries, (len(x), c.queries, c.width)).astype(self.dtype)
        norm = lambda name: Norm("layer", c.norm_eps, self.dtype, name=name)  # noqa: E731
        if c.norm_queries:
            queries = norm("norm_queries")(queries)
        kv = norm("norm_visual")(x)
        head_dim = c.width // c.heads
        attn = Attention(c.heads, c.heads, head_dim, c.bias, dtype=self.dtype, name="attn")
        return norm("norm")(attn(queries, kv)[0])


@dataclasses.dataclass(frozen=True)
class MlpAdapterConfig:
    """LLaVA 1.5's adapter (arXiv 2310.03744): two linear layers with a GELU, token by token."""

    hidden_dim: int
    width: int  # E, 0: the LLM's
    frames: int = 1  # clips are averaged over time down to this many frames


class MlpAdapter(nn.Module):
    """visual tokens [B,F,N,D] -> [B, frames·N, width]."""

    config: MlpAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: jax.Array) -> jax.Array:
        c = self.config
        groups = min(c.frames, visual.shape[1])
        x = rearrange(visual, "b (g f) n d -> b g f n d", g=groups).mean(2).astype(self.dtype)
        x = rearrange(x, "b g n d -> b (g n) d")
        x = nn.gelu(linear(c.hidden_dim, ("embed", "mlp"), True, self.dtype, name="up")(x))
        return linear(c.width, ("mlp", "embed"), True, self.dtype, name="down")(x)
