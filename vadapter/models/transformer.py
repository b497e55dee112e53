"""One transformer block and one stack forevery model: ViT, tiny LM, LLM, resampler, CoCa text.

Legend: B batch, T tokens, S keys, E width, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vadapter.distributed.mesh import constrain
from vadapter.models.layers import (
    Attention,
    Dtype,
    Mlp,
    MlpKind,
    Norm,
    NormKind,
    linear,
    partitioned,
)
from vadapter.models.quantize import Int8Linear

# What the backward pass keeps. For a frozen stack the inputs of its matrix products are never
# needed, so these names suffice; they are recomputed from with one norm and one activation each.
SAVED_NAMES = ("q", "k", "v", "mid", "u")
Remat = Literal["none", "full", "names", "dots"]
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
      mlp: swiglu | geglu | gelu | gelu_erf | quick_gelu | relu.
      norm: rms | layer; norm_offset is added to its scales.
      bias, qkv_bias, qk_norm, attn_scale, attn_softcap: see `layers.Attention`.
      mlp_bias: of the feed-forward; None: as `bias`.
      parallel: attention and feed-forward side by side, summed (PaLM), instead of in sequence;
        from one norm, or from two with `shared_norm=False` (GPT-NeoX).
      post_norms: also a norm on the output of attention and of feed-forward (Gemma 2).
      layer_scale: outputs are multiplied by a learned vector (DINOv2).
      cross: a cross-attention between self-attention and feed-forward.
      rope_scale: see `rope.rotate`.
      dropout: on both residual branches, active only where a `dropout` rng is given.
      remat: none | full | names | dots, what the backward pass recomputes.
      int8: kernels are int8, see `quantize`; they cannot be trained.
    """

    width: int
    heads: int
    mlp_dim: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: width // heads
    mlp: MlpKind = "gelu"
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    bias: bool = True
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    parallel: bool = False
    shared_norm: bool = True
    post_norms: bool = False
    layer_scale: bool = False
    cross: bool = False
    rope_scale: float = 1.0
    dropout: float = 0.0
    remat: Remat = "none"
    int8: bool = False

    @property
    def linear(self) -> Callable[..., nn.Module]:
        return Int8Linear if self.int8 else linear

    def attention(self, dtype: Dtype, name: str) -> Attention:
        return Attention(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            bias=self.bias,
            qkv_bias=self.qkv_bias,
            qk_norm=functools.partial(self.make_norm, dtype) if self.qk_norm else None,
            scale=self.attn_scale,
            softcap=self.attn_softcap,
            rope_scale=self.rope_scale,
            dtype=dtype,
            linear=self.linear,
            name=name,
        )

    def make_norm(self, dtype: Dtype, name: str) -> Norm:
        return Norm(self.norm, self.norm_eps, dtype, self.norm_offset, name=name)


@flax.struct.dataclass
class PerLayer:
    """What differs between the layers of one stack, scanned with their parameters.

    Attributes:
      freq: f32[L, R/2], rotary frequencies; None for no rotary positions.
      window: i32[L], a query sees keys less than so many positions back; None for all.
    """

    freq: jax.Array | None = None
    window: jax.Array | None = None


class Block(nn.Module):
    """Pre-norm transformer block; arguments and results as `Stack`, for one layer.

    Attributes:
      last: it computes the states of so many last tokens, which see all of them; 0: of all.
    """

    config: BlockConfig
    dtype: Dtype = jnp.float32
    last: int = 0

    @nn.compact
    def __call__(self, x, cache, layer, mask, positions, distance, kv, kv_mask, index):
        c = self.config
        norm = functools.partial(c.make_norm, self.dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        bias = c.bias if c.mlp_bias is None else c.mlp_bias
        mlp = Mlp(c.mlp_dim, c.mlp, bias, self.dtype, c.linear, name="mlp")
        after = lambda name, y: drop(self._scaled(name, norm(name)(y) if c.post_norms else y))  # noqa: E731
        if layer.window is not None:
            near = distance < layer.window
            mask = near if mask is None else mask & near
        h = keys = norm("norm_attn")(x)
        if self.last:
            x, h = x[:, -self.last :], h[:, -self.last :]
            mask = None if mask is None else mask[:, -self.last :]
        y, cache = c.attention(self.dtype, "attn")(
            h, keys, mask=mask, positions=positions, freq=layer.freq, cache=cache, index=index
        )
        y = after("norm_attn_out", y)
        if c.parallel:
            h = h if c.shared_norm else norm("norm_mlp")(x)
            return constrain(x + y + after("norm_mlp_out", mlp(h)), "batch"), cache
        x = checkpoint_name(x + y, "mid")
        if c.cross:
            y, _ = c.attention(self.dtype, "cross")(norm("norm_cross")(x), kv, mask=kv_mask)
            x = x + drop(y)
        return constrain(x + after("norm_mlp_out", mlp(norm("norm_mlp")(x))), "batch"), cache

    def _scaled(self, name: str, y: jax.Array) -> jax.Array:
        if not self.config.layer_scale:
            return y
        init = partitioned(nn.initializers.ones, "norm")
        scale = self.param(name.replace("norm", "scale"), init, (y.shape[-1],))
        return y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


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
        layers: PerLayer | None = None,
        distance: jax.Array | None = None,
        kv: jax.Array | None = None,
        kv_mask: jax.Array | None = None,
        cache: Any = None,
        index: jax.Array | int = 0,
        last: int = 0,
    ) -> tuple[jax.Array, Any]:
        """Runs the blocks.

        Args:
          x: [B, T, E].
          mask: bool[B, T, S] for self-attention (None: everything visible).
          positions: i32[B, T] for rotary positions.
          layers: what differs between the layers.
          distance: i32[B, T, S], positions from key to query, for windows.
          kv: [B, S', ·] for cross-attention, with kv_mask bool[B, T, S'].
          cache: keys and values, each [L, B, S, kv_heads, K], or None.
          index: first cache slot of `x`.
          last: the last block runs for so many last tokens alone, for which the others are there;
            0: for all. Not for parameters that are trained, nor with a cache or `kv`.

        Returns:
          [B, T or last, E] and the updated cache (None without one).
        """
        if last:
            assert cache is None
            assert kv is None
            return self._last(x, layers or PerLayer(), (mask, positions, distance), last), None
        blocks = in_a_row(Block, self.depth, self.config.remat, (0, 0, *(nn.broadcast,) * 6))
        return blocks(self.config, self.dtype, name="blocks")(
            constrain(x, "batch"), cache, layers or PerLayer(), mask, positions, distance, kv,
            kv_mask, index,
        )  # fmt: skip

    def _last(self, x: jax.Array, layers: PerLayer, seen: tuple[Any, ...], last: int) -> jax.Array:
        """Runs the blocks, the last one for the last tokens alone.

        Each block takes its parameters out of the whole stack: a scan over all blocks but one
        would copy them. Gradients of such parameters would be as large as the stack, in each block.
        """
        every = self.variables["params"]["blocks"], layers

        def run(x: jax.Array, at: jax.Array | int, last: int) -> jax.Array:
            pick = lambda w: jax.lax.dynamic_index_in_dim(w, at, keepdims=False)  # noqa: E731
            params, layer = jax.tree.map(pick, every)
            block = Block(self.config, self.dtype, last, parent=None)
            return block.apply({"params": params}, x, None, layer, *seen, None, None, 0)[0]  # type: ignore[index]

        if self.config.remat != "none":
            policy = REMAT[self.config.remat]
            run = jax.checkpoint(run, prevent_cse=False, policy=policy, static_argnums=2)
        body = lambda x, at: (run(x, at, 0), None)  # noqa: E731
        x, _ = jax.lax.scan(body, constrain(x, "batch"), jnp.arange(self.depth - 1))
        return run(x, self.depth - 1, last)


def in_a_row(layer: type[nn.Module], depth: int, remat: Remat, in_axes: Any) -> Any:
    """`depth` layers one after the other, scanned, their parameters stacked.

    Args:
      layer: a module class whose call takes and returns the carry first.
      depth: L.
      remat: what the backward pass computes again, see `BlockConfig`.
      in_axes: of the call's other arguments: 0 where layers differ, `nn.broadcast` elsewhere.
    """
    if remat != "none":
        # A loop of one layer is none: there the compiler would find what is done twice.
        layer = nn.remat(layer, prevent_cse=depth == 1, policy=REMAT[remat])
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


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
