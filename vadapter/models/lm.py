"""The decoder language model, tiny and large alike.

Legend: B batch, T tokens, E width, V vocabulary, L layers, S cache slots, K head dim.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vadapter.models.layers import Dtype, Norm, linear, partitioned
from vadapter.models.transformer import BlockConfig, Stack


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder LM. The defaults are PaLM's block: parallel, SwiGLU, rotary, multi-query, no bias.

    Attributes:
      vocab_size: V; 0 takes the run's tokenizer's size.
      width, depth, heads, kv_heads, head_dim, mlp_dim, mlp, norm, parallel, bias: see BlockConfig.
      positions: rope | learned.
      max_len: longest sequence; sizes the learned positions and bounds every layout.
      tied: the output head is the transposed embedding.
      embed_scale: embeddings are multiplied by sqrt(width).
      remat: see `transformer.REMAT`.
      dropout: on residual branches, while training only.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    kv_heads: int = 1
    head_dim: int = 0
    mlp: str = "swiglu"
    norm: str = "rms"
    norm_eps: float = 1e-6
    positions: str = "rope"
    rope_theta: float = 10_000.0
    max_len: int = 2048
    parallel: bool = True
    bias: bool = False
    tied: bool = True
    embed_scale: bool = True
    remat: str = "none"
    dropout: float = 0.0

    def block(self) -> BlockConfig:
        shared = {f.name for f in dataclasses.fields(BlockConfig)}
        mine: dict[str, Any] = {name: getattr(self, name) for name in shared if hasattr(self, name)}
        mine["rope_theta"] = self.rope_theta if self.positions == "rope" else None
        return BlockConfig(**mine)


class LM(nn.Module):
    """Decoder LM over embeddings, so that visual tokens can stand where words stand.

    `embed` → `hidden` → `logits`. A component used only through `hidden` (the tiny LM as adapter)
    has neither embedding nor head among its parameters.
    """

    config: LMConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        # Unit variance once scaled: visual prefixes of unit variance meet words of their size.
        init = nn.initializers.normal(c.width**-0.5 if c.embed_scale else 0.02)
        self.embedding = nn.Embed(
            c.vocab_size,
            c.width,
            dtype=self.dtype,
            embedding_init=partitioned(init, "vocab", "embed"),
        )
        if c.positions == "learned":
            init = nn.initializers.normal(0.02)
            self.position_embedding = nn.Embed(
                c.max_len,
                c.width,
                dtype=self.dtype,
                embedding_init=partitioned(init, None, "embed"),
            )
        self.stack = Stack(c.block(), c.depth, self.dtype)
        self.norm = Norm(c.norm, c.norm_eps, self.dtype)
        if not c.tied:
            self.head = linear(c.vocab_size, ("embed", "vocab"), dtype=self.dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[B, T] -> [B, T, E], scaled; ids must be in 0..V-1 (checked on the host)."""
        scale = self.config.width**0.5 if self.config.embed_scale else 1.0
        return self.embedding(tokens) * jnp.asarray(scale, self.dtype)

    def hidden(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        mask: jax.Array | None = None,
        cache: Any = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Embeddings [B, T, E] -> last hidden states [B, T, E] after the final norm, and the cache.

        Args:
          positions: i32[B, T].
          mask: bool[B, T, S], S = T, or the cache's slots.
          cache: from `empty_cache`, or None.
          index: first cache slot of `x`.
        """
        x = x.astype(self.dtype)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        x, cache = self.stack(x, mask=mask, positions=positions, cache=cache, index=index)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., E] -> f32[..., V]."""
        out = self.embedding.attend(hidden) if self.config.tied else self.head(hidden)
        return out.astype(jnp.float32)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """i32[B, T] -> f32[B, T, V], causal; creates every parameter."""
        B, T = tokens.shape
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        return self.logits(self.hidden(self.embed(tokens), positions=positions, mask=mask)[0])


def empty_cache(config: LMConfig, batch: int, slots: int, dtype: Dtype = jnp.float32) -> Any:
    """Keys and values of no tokens yet: two arrays [L, B, slots, kv_heads, K]."""
    block = config.block()
    kv_heads = block.kv_heads or block.heads
    shape = (config.depth, batch, slots, kv_heads, block.head_dim or block.width // block.heads)
    return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
