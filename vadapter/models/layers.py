"""Layers shared by every model: norms, projections, feed-forward, rotary positions, one attention.

Legend: B batch, T queries (text tokens), S keys, E width, H heads, G query heads a key head,
K head dim, V vocabulary.

Parameters are float32; `dtype` is the dtype of the computation. Every parameter names its logical
axes at definition (`embed`, `heads`, `mlp`, `vocab`, …); `vadapter.parallel.mesh` maps them to the
mesh.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

Dtype = jnp.dtype
# Scores of masked keys. Finite, so that a row without any visible key stays finite.
MASKED = -1e30

default_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def partitioned(init: Callable, *axes: str | None) -> Callable:
    """Marks the initialiser's parameter with its logical axes, one name per dimension."""
    return nn.with_logical_partitioning(init, axes)


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
        bias_init=partitioned(nn.initializers.zeros, axes[1]),
        name=name,
    )


class Norm(nn.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm (`kind="layer"`), statistics in float32."""

    kind: str = "rms"
    eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        shape = (1,) * (x.ndim - 1) + (width,)
        y = y * self.param("scale", partitioned(nn.initializers.ones, "norm"), (width,)).reshape(
            shape
        )
        if self.kind == "layer":
            y = y + self.param(
                "bias", partitioned(nn.initializers.zeros, "norm"), (width,)
            ).reshape(shape)
        return y.astype(self.dtype)


ACTIVATIONS: dict[str, Callable] = {
    "swiglu": nn.silu,
    "geglu": lambda x: nn.gelu(x, approximate=True),
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
}


class Mlp(nn.Module):
    """Feed-forward block; `kind` in swiglu | geglu (gated) or gelu | relu (plain).

    The pre-activations carry the name `u` for rematerialisation policies.
    """

    hidden: int
    kind: str = "swiglu"
    bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up, down = ("embed", "mlp"), ("mlp", "embed")
        u = checkpoint_name(linear(self.hidden, up, self.bias, self.dtype, name="up")(x), "u")
        y = ACTIVATIONS[self.kind](u)
        if self.kind.endswith("glu"):
            gate = linear(self.hidden, up, self.bias, self.dtype, name="gate")(x)
            y = y * checkpoint_name(gate, "u")
        return linear(x.shape[-1], down, self.bias, self.dtype, name="down")(y)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves rotated against each other.

    Args:
      x: [B, T, H, K], K even.
      positions: i32[B, T].
      theta: base of the geometric progression of wavelengths.
    """
    half = x.shape[-1] // 2
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions.astype(jnp.float32)[..., None, None] * freq[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Attention(nn.Module):
    """The only attention: self (`kv is None`) or cross, multi-, grouped- or single-key-head.

    Scores and softmax are float32. q, k, v carry checkpoint names for rematerialisation policies.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    rope_theta: float | None = None
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        kv: jax.Array | None = None,
        *,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: tuple[jax.Array, jax.Array] | None = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends from `x` [B,T,E] to `kv` [B,S,·] (or to itself, or to the cache).

        Args:
          x: queries' inputs, [B, T, E].
          kv: inputs of keys and values, [B, S, any width]; None for self-attention.
          mask: bool[B, T, S], True where a query may look; None for everywhere.
          positions: i32[B, T] for rotary positions; unused without `rope_theta`.
          cache: keys and values [B, S, kv_heads, K] of a sequence being decoded; the new ones are
            written at `index`.
          index: first slot of `x` in the cache.

        Returns:
          [B, T, E], and the updated cache (None without one).
        """
        kv = x if kv is None else kv
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads do not divide into {self.kv_heads} key heads")
        proj = lambda n, name: linear(  # noqa: E731
            n * self.head_dim, ("embed", "heads"), self.bias, self.dtype, name=name
        )
        split = lambda y: y.reshape(*y.shape[:-1], -1, self.head_dim)  # noqa: E731
        q = split(proj(self.heads, "q")(x))
        k = split(proj(self.kv_heads, "k")(kv))
        v = split(proj(self.kv_heads, "v")(kv))
        if self.rope_theta is not None:
            assert positions is not None
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is not None:
            k = jax.lax.dynamic_update_slice(cache[0], k.astype(cache[0].dtype), (0, index, 0, 0))
            v = jax.lax.dynamic_update_slice(cache[1], v.astype(cache[1].dtype), (0, index, 0, 0))
            cache = (k, v)
        y = attend(q, k, v, mask)
        y = y.reshape(*y.shape[:-2], -1)
        return linear(x.shape[-1], ("heads", "embed"), self.bias, self.dtype, name="o")(y), cache


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Scaled dot-product attention: q [B,T,H,K], k and v [B,S,H/G,K], mask bool[B,T,S].

    The G query heads of a key head are laid end to end as G·T queries, so that both products are
    plain batched matrix products.
    """
    B, T, H, K = q.shape
    N = k.shape[2]
    q = q.reshape(B, T, N, H // N, K).transpose(0, 2, 3, 1, 4).reshape(B, N, -1, K)
    scores = jnp.einsum("bnqk,bsnk->bnqs", q, k, preferred_element_type=jnp.float32) * K**-0.5
    if mask is not None:
        scores = scores.reshape(B, H, T, -1)
        scores = jnp.where(mask[:, None], scores, MASKED).reshape(B, N, H // N * T, -1)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jnp.einsum("bnqs,bsnk->bnqk", weights, v).reshape(B, N, H // N, T, K)
    return y.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)
