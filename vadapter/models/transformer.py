"""One transformer block and one stack for every model: ViT, tiny LM, LLM, resampler, CoCa text.

Legend: B batch, T tokens, S keys, E width, L layers.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vadapter.models.layers import Attention, Dtype, Mlp, Norm

# What the backward pass keeps. For a frozen stack the inputs of its matrix products are never
# needed, so these names suffice; they are recomputed from with one norm and one activation each.
SAVED_NAMES = ("q", "k", "v", "mid", "u")
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer block.

    Attributes:
      width: E.
      heads, kv_heads, head_dim: attention; kv_heads=1 is multi-query, =heads is multi-head.
      mlp_dim: hidden width of the feed-forward.
      mlp: swiglu | geglu | gelu | relu.
      norm: rms | layer.
      parallel: attention and feed-forward from one norm, summed (PaLM), instead of in sequence.
      cross: a cross-attention between self-attention and feed-forward.
      rope_theta: rotary base; None for no rotary positions.
      dropout: on both residual branches, active only where a `dropout` rng is given.
      remat: none | full | names | dots, what the backward pass recomputes.
    """

    width: int
    heads: int
    mlp_dim: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width // heads
    mlp: str = "gelu"
    norm: str = "layer"
    norm_eps: float = 1e-6
    bias: bool = True
    parallel: bool = False
    cross: bool = False
    rope_theta: float | None = None
    dropout: float = 0.0
    remat: str = "none"

    def attention(self, dtype: Dtype, name: str, rope: bool = True) -> Attention:
        return Attention(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            bias=self.bias,
            rope_theta=self.rope_theta if rope else None,
            dtype=dtype,
            name=name,
        )


class Block(nn.Module):
    """Pre-norm transformer block; arguments and results as `Stack`, for one layer."""

    config: BlockConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x, cache, mask, positions, kv, kv_mask, index):
        c = self.config
        norm = lambda name: Norm(c.norm, c.norm_eps, self.dtype, name=name)  # noqa: E731
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        mlp = Mlp(c.mlp_dim, c.mlp, c.bias, self.dtype, name="mlp")
        h = norm("norm_attn")(x)
        y, cache = c.attention(self.dtype, "attn")(
            h, mask=mask, positions=positions, cache=cache, index=index
        )
        if c.parallel:
            return x + drop(y + mlp(h)), cache
        x = checkpoint_name(x + drop(y), "mid")
        if c.cross:
            y, _ = c.attention(self.dtype, "cross", rope=False)(
                norm("norm_cross")(x), kv, mask=kv_mask
            )
            x = x + drop(y)
        return x + drop(mlp(norm("norm_mlp")(x))), cache


class Stack(nn.Module):
    """`depth` equal blocks, scanned: compile time does not grow with depth.

    Parameters are stacked on a leading `layers` axis.
    """

    config: BlockConfig
    depth: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        kv: jax.Array | None = None,
        kv_mask: jax.Array | None = None,
        cache: Any = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Runs the blocks.

        Args:
          x: [B, T, E].
          mask: bool[B, T, S] for self-attention (None: everything visible).
          positions: i32[B, T] for rotary positions.
          kv: [B, S', ·] for cross-attention, with kv_mask bool[B, T, S'].
          cache: keys and values, each [L, B, S, kv_heads, K], or None.
          index: first cache slot of `x`.

        Returns:
          [B, T, E] and the updated cache (None without one).
        """
        block = Block
        if self.config.remat != "none":
            block = nn.remat(Block, prevent_cse=False, policy=REMAT[self.config.remat])
        return nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, *(nn.broadcast,) * 5),  # type: ignore[arg-type]
            length=self.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(self.config, self.dtype, name="blocks")(x, cache, mask, positions, kv, kv_mask, index)


def text_mask(segments: jax.Array, prefix: int = 0, *, bidirectional: bool = False) -> jax.Array:
    """Who sees whom in [prefix][independent texts].

    Segment 0 is padding, -1 the shared prefix, 1..k independent texts. Every token sees earlier
    tokens of its own segment and of the prefix; nobody sees padding.

    Example, causal, for segments [-1, -1, 1, 1, 2, 0]::

        [[1 0 0 0 0 0]
         [1 1 0 0 0 0]
         [1 1 1 0 0 0]
         [1 1 1 1 0 0]
         [1 1 0 0 1 0]
         [1 1 0 0 0 0]]

    Args:
      segments: i32[B, T].
      prefix: number of leading tokens that are prefix; used only with `bidirectional`.
      bidirectional: the prefix also sees itself forwards.

    Returns:
      bool[B, T, T].
    """
    T = segments.shape[1]
    q, k = segments[:, :, None], segments[:, None, :]
    order = jnp.tril(jnp.ones((T, T), bool))
    if bidirectional:
        order = order | (jnp.arange(T) < prefix)[None, :]
    return order[None] & (k != 0) & ((k == -1) | (k == q))
