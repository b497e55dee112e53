"""Layers shared by every model: norms, projections, feed-forward, one attention.

Legend: B batch, T queries (text tokens), S keys, E width, H heads, G query heads a key head,
K head dim, V vocabulary.

Parameters are float32; `dtype` is the dtype of the computation. Every parameter names its logical
axes at definition (`embed`, `heads`, `mlp`, `vocab`, …); `distributed.mesh` maps them to the mesh.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vadapter.distributed.mesh import constrain
from vadapter.models.rope import rotate

Dtype = jnp.dtype
# Scores of masked keys. Finite, so that a row without any visible key stays finite.
MASKED = -1e30

default_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def partitioned(init: Callable, *axes: str | None) -> Callable:
    """Marks the initializer's parameter with its logical axes, one name per dimension."""
    return nn.with_logical_partitioning(init, axes)


def output_axis(axes: tuple[str | None, str | None]) -> str | None:
    """Of what a kernel has one of per output: states are whole, and so is what joins them."""
    return "norm" if axes[1] == "embed" else axes[1]


def linear(
    features: int,
    axes: tuple[str | None, str | None],
    bias: bool = False,
    dtype: Dtype = jnp.float32,
    kernel_init: Callable = default_init,
    name: str | None = None,
) -> nn.Dense:
    """`x @ kernel + bias` over the last axis, [..., in] -> [..., features]; axes of the kernel."""
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=partitioned(kernel_init, *axes),
        bias_init=partitioned(nn.initializers.zeros, output_axis(axes)),
        name=name,
    )


class Norm(nn.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm (`kind="layer"`), statistics in float32.

    `offset` is added to the scale: Gemma stores scales around 0.
    """

    kind: str = "rms"
    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        shape = (1,) * (x.ndim - 1) + (width,)
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", partitioned(init, "norm"), (width,)).astype(jnp.float32)
        y = y * (self.offset + scale).reshape(shape)
        if self.kind == "layer":
            y = y + self.param(
                "bias", partitioned(nn.initializers.zeros, "norm"), (width,)
            ).reshape(shape)
        return y.astype(self.dtype)


NormKind = Literal["rms", "layer"]
MlpKind = Literal["swiglu", "geglu", "gelu", "gelu_erf", "quick_gelu", "relu"]
ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "relu": nn.relu,
}
GATED: dict[str, Callable] = {"swiglu": nn.silu, "geglu": ACTIVATIONS["gelu"]}


class Mlp(nn.Module):
    """Feed-forward block, down(act(up(x))), or down(act(gate(x)) · up(x)) for a `kind` in `GATED`.

    The pre-activations carry the name `u` for rematerialization policies. `linear` makes the
    projections, called as the function of that name.
    """

    hidden: int
    kind: str = "swiglu"
    bias: bool = False
    dtype: Dtype = jnp.float32
    linear: Callable[..., nn.Module] = linear

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        wide = lambda name: checkpoint_name(  # noqa: E731
            constrain(
                self.linear(self.hidden, ("embed", "mlp"), self.bias, self.dtype, name=name)(x),
                "batch", None, "mlp",
            ),
            "u",
        )  # fmt: skip
        if self.kind in GATED:
            gate, up = write_gradients(wide("gate"), wide("up"))
            y = GATED[self.kind](gate) * up
        else:
            y = ACTIVATIONS[self.kind](*write_gradients(wide("up")))
        return self.linear(x.shape[-1], ("mlp", "embed"), self.bias, self.dtype, name="down")(y)


@jax.custom_vjp
def write_gradients(*x: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays as they are; the backward pass writes their gradients before it reads them.

    An activation's derivative is cheap, so compilers put it inside the products that read it; the
    TPU's then computes it again forevery tile of each of them, at up to 3/4 of a product's time.
    """
    return x


def _backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return jax.lax.optimization_barrier(gradients)


write_gradients.defvjp(lambda *x: (x, None), _backward)


class Attention(nn.Module):
    """The only attention: self (`kv is None`) or cross, multi-, grouped- or single-key-head.

    Scores and softmax are float32. q, k, v carry checkpoint names for rematerialization policies.

    Attributes:
      heads, kv_heads, head_dim: H query heads share kv_heads key heads of width K.
      bias: of the output; qkv_bias: of queries, keys and values (None: as `bias`).
      qk_norm: an RMSNorm over K on queries and keys, before they are rotated; None: none.
      scale: of the scores; 0: K ** -0.5.
      softcap: scores are cap · tanh(scores / cap); 0: not (Gemma 2).
      rope_scale: see `rope.rotate`.
      linear: makes the projections, called as the function of that name.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    qkv_bias: bool | None = None
    qk_norm: Callable[[str], nn.Module] | None = None
    scale: float = 0.0
    softcap: float = 0.0
    rope_scale: float = 1.0
    dtype: Dtype = jnp.float32
    linear: Callable[..., nn.Module] = linear

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kv: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        freq: jax.Array | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends from `x` [B,T,E] to `kv` [B,S,·] (or to itself, or to the cache).

        Args:
          x: queries' inputs, [B, T, E].
          kv: inputs of keys and values, [B, S, any width]; None for self-attention.
          mask: bool[B, T, S], True where a query may look; None foreverywhere.
          positions: i32[B, S] of the keys, whose last T are the queries', and freq: f32[R/2] of
            rotary positions; None for none.
          cache: keys and values [B, S, kv_heads, K] of a sequence being decoded; the new ones are
            written at `index`.
          index: first slot of `x` in the cache.

        Returns:
          [B, T, E], and the updated cache (None without one).
        """
        kv = x if kv is None else kv
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide into {self.kv_heads} key heads")
        bias = self.bias if self.qkv_bias is None else self.qkv_bias
        proj = lambda n, name: self.linear(  # noqa: E731
            n * self.head_dim, ("embed", "heads"), bias, self.dtype, name=name
        )
        # Heads are split, never within one: with fewer key heads than `tensor`, each has them all.
        by_head = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)  # noqa: E731
        split = lambda y: constrain(by_head(y), "batch", None, "heads")  # noqa: E731
        q = split(proj(self.heads, "q")(x))
        k = split(proj(self.kv_heads, "k")(kv))
        v = split(proj(self.kv_heads, "v")(kv))
        if self.qk_norm is not None:
            q, k = self.qk_norm("norm_q")(q), self.qk_norm("norm_k")(k)
        if freq is not None:
            assert positions is not None
            q = rotate(q, positions[:, -q.shape[1] :], freq, self.rope_scale)
            k = rotate(k, positions, freq, self.rope_scale)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, index, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, index, 0, 0))
            cache = (k, v)
        y = attend(q, k, v, mask, self.scale, self.softcap)
        y = y.reshape(*y.shape[:-2], -1)
        out = self.linear(x.shape[-1], ("heads", "embed"), self.bias, self.dtype, name="o")
        return out(y), cache


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    scale: float = 0.0,
    softcap: float = 0.0,
) -> jax.Array:
    """Scaled dot-product attention: q [B,T,H,K], k and v [B,S,H/G,K], mask bool[B,T,S].

    Scores are multiplied by `scale` (0: K ** -0.5), then capped, see `Attention`.

    The G query heads of a key head stand beside its queries, [B,N,G,T,K], so that both products
    are plain batched matrix products and the mask is one for all heads.
    """
    B, T, H, K = q.shape
    N = k.shape[2]
    q = q.reshape(B, T, N, H // N, K).transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bngtk,bsnk->bngts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (scale or K**-0.5)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # An addend: a choice would keep the mask of every head for the backward pass.
        scores = scores + jnp.where(mask[:, None, None], jnp.float32(0), MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bngts,bsnk->bngtk", weights, v)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
