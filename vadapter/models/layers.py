"""Layers shared by every model: norms, projections, feed-forward, one attention.

Legend: B batch, T queries (text tokens), S keys, E width, D width of the keys' inputs, H query
heads, N KV heads, G = H / N query heads a KV head, K head dim, P rotated pairs of a head.

Parameters are float32; `dtype` is the dtype of the computation. Every parameter names its logical
axes at definition (`embed`, `heads`, `mlp`, `vocab`, …); `distributed.mesh` maps them to the mesh.
"""

import re
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.mesh import constrain, platform
from vadapter.models.fused_attention import Kernel
from vadapter.models.rope import Rotary, factors, rotate_by

Dtype = jax.typing.DTypeLike
# Added to the scores of masked keys. Finite, so that a row without any visible key stays finite.
MASKED = -1e30
# The collection in which attentions sow their weights where `apply` makes it mutable (not `init`).
ATTENTION = "intermediates"

default_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def partitioned(init: Callable, *axes: str | None) -> Callable:
    """Return the initializer, its parameter marked with logical axes, one name per dimension."""
    return nn.with_logical_partitioning(init, axes)


def output_axis(axes: tuple[str | None, str | None]) -> str | None:
    """Return the logical axis of a bias or scale per output of a kernel.

    States are not sharded over their width, so what is added to them is not either.
    """
    return "norm" if axes[1] == "embed" else axes[1]


def linear(
    features: int, axes: tuple[str | None, str | None], bias: bool = False,
    dtype: Dtype = jnp.float32, kernel_init: Callable = default_init, name: str | None = None,
) -> nn.Dense:  # fmt: skip
    """Return a layer x @ kernel + bias over the last axis; `axes` are those of the kernel."""
    bias_init = partitioned(nn.initializers.zeros, output_axis(axes))
    kernel_init = partitioned(kernel_init, *axes)
    own = (lambda x, kernel, *_, **__: product(x, kernel)) if platform() == "cpu" else None
    return nn.Dense(
        features, bias, dtype, kernel_init=kernel_init, bias_init=bias_init, dot_general=own,
        name=name,
    )  # fmt: skip


@jax.custom_vjp
def product(x: Float[Array, "*n I"], kernel: Float[Array, "I O"]) -> Float[Array, "*n O"]:
    """Return x @ kernel; the kernel's gradient is one product of two matrices.

    JAX's own gradient is the transpose of a product with O as its rows, for which XLA:CPU first
    transposes the gradient of the output in memory: 2.5 times as slow (BUILD_NOTES, "Steps on a
    CPU"). TPUs are slower with this one: they copy to merge its rows.
    """
    return x @ kernel


def _product_forward(x: Any, kernel: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    # What no gradient needs is not kept: the inputs of frozen kernels, the kernels of first layers.
    kept = (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)
    return x.value @ kernel.value, kept


def _product_backward(kept: tuple[Any, ...], gradient: jax.Array) -> tuple[Any, Any]:
    x, kernel = kept
    rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return (
        None if kernel is None else gradient @ kernel.T,
        None if x is None else rows(x).T @ rows(gradient),
    )


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


def embedding_param(
    module: nn.Module, name: str, shape: tuple[int, ...], init: Callable
) -> Float[Array, "..."]:
    """Create trainable vectors, [..., E], as a parameter of `module`."""
    axes = (*(None,) * (len(shape) - 1), "embed")
    return constrain(module.param(name, partitioned(init, *axes), shape))


def trainable_tokens(
    module: nn.Module, name: str, shape: tuple[int, int, int], init: Callable, dtype: Dtype
) -> Float[Array, "B T E"]:
    """Create a parameter [1, T, E] of `module`; return it in `dtype`, repeated for every row."""
    tokens = embedding_param(module, name, (1, *shape[1:]), init)
    return jnp.broadcast_to(tokens, shape).astype(dtype)


class Norm(nn.Module):
    """RMSNorm (`kind="rms"`) or LayerNorm (`kind="layer"`), statistics in float32.

    `offset` is added to the scale: Gemma stores scales around 0.
    """

    kind: str = "rms"
    eps: float = 1e-6
    dtype: Dtype = jnp.float32
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
        width, shape = x.shape[-1:], (1,) * (x.ndim - 1) + (-1,)
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        init = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", partitioned(init, "norm"), width).astype(jnp.float32)
        y = y * (self.offset + scale).reshape(shape)
        if self.kind == "layer":
            bias = self.param("bias", partitioned(nn.initializers.zeros, "norm"), width)
            y = y + bias.reshape(shape)
        return y.astype(self.dtype)


NormKind = Literal["rms", "layer"]
NormOver = Literal["head", "heads"]
MlpKind = Literal["swiglu", "geglu", "geglu_erf", "gelu", "gelu_erf", "quick_gelu", "relu"]
ACTIVATIONS: dict[str, Callable] = {
    "gelu": lambda x: nn.gelu(x, approximate=True),
    "gelu_erf": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "relu": nn.relu,
}
GATED: dict[str, Callable] = {
    "swiglu": nn.silu, "geglu": ACTIVATIONS["gelu"], "geglu_erf": ACTIVATIONS["gelu_erf"],
}  # fmt: skip


class Mlp(nn.Module):
    """Feed-forward block, down(act(up(x))), or down(act(gate(x)) · up(x)) for a `kind` in `GATED`.

    The pre-activations are named `u` for rematerialization policies. Attributes: `linear` is the
    constructor of the projections, with the signature of `layers.linear`; `inner_norm` that of a
    norm in front of `down`, or None.
    """

    hidden: int
    kind: str = "swiglu"
    bias: bool = False
    dtype: Dtype = jnp.float32
    linear: Callable[..., nn.Module] = linear
    inner_norm: Callable[[str], nn.Module] | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        def wide(name: str) -> jax.Array:
            u = self.linear(self.hidden, ("embed", "mlp"), self.bias, self.dtype, name=name)(x)
            return checkpoint_name(constrain(u, "batch", None, "mlp"), "u")

        if self.kind in GATED:
            gate, up = write_gradients(wide("gate"), wide("up"))
            y = GATED[self.kind](gate) * up
        else:
            y = ACTIVATIONS[self.kind](*write_gradients(wide("up")))
        if self.inner_norm is not None:
            y = self.inner_norm("inner_norm")(y)
        return self.linear(x.shape[-1], ("mlp", "embed"), self.bias, self.dtype, name="down")(y)


@jax.custom_vjp
def write_gradients(*x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the arrays unchanged; the backward pass writes their gradients before it reads them.

    An activation's derivative is cheap, so compilers fuse it into the products that read it. The
    TPU's then recomputes it for every tile of each of them, at up to 3/4 of a product's time.
    """
    return x


def _backward(_: None, gradients: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return jax.lax.optimization_barrier(gradients)


write_gradients.defvjp(lambda *x: (x, None), _backward)


# Keys and values in the cache: as products read them, with rows and KV heads in one dimension. A
# CPU would copy the whole cache for every token to another order, or if one of the two were 1.
KeysValues = tuple[Float[Array, "BN K S"], Float[Array, "BN S K"]]


class Attention(nn.Module):
    """The only attention: self (`kv is None`) or cross; multi-head, grouped- or multi-query.

    Scores and softmax are float32. q, k and v are named for rematerialization policies.

    Attributes:
      heads, kv_heads, head_dim: H, N and K.
      bias: of the output; qkv_bias: of queries, keys and values (None takes `bias`), except that
        keys have none if not `key_bias`.
      qk_norm: constructor of a norm on queries and keys, before the rotation, or None.
      qk_norm_over: what that norm is over: each "head" (K), or all "heads" together (OLMo 2).
      value_eps: values are divided by their root mean square over a head, to whose square it is
        added (Gemma 4); 0: they are not.
      shared_values: keys are the values, too, before their norm and rotation (Gemma 4).
      inner_norm: constructor of a norm over all heads in front of the last projection, or None.
      gate: outputs are multiplied by the sigmoid of a projection of `x` (Qwen3.5).
      scale: of the scores; 0: K ** -0.5.
      softcap: scores are cap · tanh(scores / cap) (Gemma 2); 0: no cap.
      rope_scale: see `rope.rotate`.
      fused: use the kernel of `fused_attention` where it is faster; False: never.
      linear: constructor of the projections, with the signature of `layers.linear`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    qkv_bias: bool | None = None
    key_bias: bool = True
    qk_norm: Callable[[str], nn.Module] | None = None
    qk_norm_over: NormOver = "head"
    value_eps: float = 0.0
    shared_values: bool = False
    inner_norm: Callable[[str], nn.Module] | None = None
    gate: bool = False
    scale: float = 0.0
    softcap: float = 0.0
    rope_scale: float = 1.0
    fused: bool = True
    dtype: Dtype = jnp.float32
    linear: Callable[..., nn.Module] = linear

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], kv: Float[Array, "B U D"] | None = None, *,
        mask: Bool[Array, "B T S"] | None = None,
        positions: Int[Array, "B U"] | Rotary | None = None,
        freq: Float[Array, " P"] | None = None, cache: KeysValues | None = None,
        index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T E"], KeysValues | None]:  # fmt: skip
        """Attend from `x` to `kv` (or to itself, or to the cache).

        Args:
          mask: True where a query attends; None: everywhere.
          positions: of the keys, whose last T are the queries'; or their `rope.factors`.
          freq: rotary frequencies for `positions`; None: no rotary positions, or factors.
          cache: keys and values of a sequence that is being decoded, or None; the new ones are
            written at `index`.
          index: first slot of `x` in the cache.

        Returns:
          States, and the updated cache (None without one).
        """
        kv = x if kv is None else kv
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} is not divisible by kv_heads={self.kv_heads}")

        def project(x: jax.Array, heads: int, name: str) -> Float[Array, "B T HK"]:
            bias = self.bias if self.qkv_bias is None else self.qkv_bias
            bias = bias and (name != "k" or self.key_bias)
            size = heads * self.head_dim
            return self.linear(size, ("embed", "heads"), bias, self.dtype, name=name)(x)

        def split(x: jax.Array) -> Float[Array, "B T H K"]:
            # Devices get whole heads. With fewer KV heads than the mesh's `tensor`, they are
            # replicated rather than split within a head.
            x = x.reshape(*x.shape[:-1], -1, self.head_dim)
            return constrain(x, "batch", None, "heads")

        q = project(x, self.heads, "q")
        k = project(kv, self.kv_heads, "k")
        v = k if self.shared_values else project(kv, self.kv_heads, "v")
        if self.value_eps:
            v = _normed(split(v), self.value_eps)
        if self.qk_norm is not None:
            if self.qk_norm_over == "head":
                q, k = split(q), split(k)
            q, k = self.qk_norm("norm_q")(q), self.qk_norm("norm_k")(k)

        def out(y: Float[Array, "B T HK"]) -> Float[Array, "B T E"]:
            y = y if self.inner_norm is None else self.inner_norm("inner_norm")(y)
            if self.gate:
                y = y * nn.sigmoid(project(x, self.heads, "gate"))
            return self.linear(x.shape[-1], ("heads", "embed"), self.bias, self.dtype, name="o")(y)

        rotary = positions if isinstance(positions, tuple) else None
        if freq is not None:
            assert positions is not None
            assert not isinstance(positions, tuple)
            rotary = factors(positions, freq, self.rope_scale)
        if rotary is not None and len(rotary) == 3:
            rotary, scale = rotary[:2], rotary[2]
            q = split(q) if q.ndim == 3 else q
            q = (q * scale[:, -q.shape[1] :, None, None]).astype(self.dtype)
        if rotary is not None and rotary[0].ndim == 4:  # kernels know one angle for a pair
            q, k = (rotate_by(x if x.ndim == 4 else split(x), rotary) for x in (q, k))
            rotary = None
        if cache is None and (kernel := self._kernel(q, k, rotary)):
            merge = lambda x, name: checkpoint_name(x.reshape(*x.shape[:2], -1), name)  # noqa: E731
            return out(kernel(merge(q, "q"), merge(k, "k"), merge(v, "v"), mask, rotary)), None
        q, k, v = (x if x.ndim == 4 else split(x) for x in (q, k, v))
        if rotary is not None:
            q, k = rotate_by(q, rotary), rotate_by(k, rotary)
        q, k, v = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(v, "v")
        if cache is not None:
            cache = write_cache(cache, k, v, index)
            weights, y = attend_cache(q, cache, mask, self.scale, self.softcap)
            self.sow(ATTENTION, "weights", weights)
            return out(rearrange(y, "b t h k -> b t (h k)")), cache
        weights = attention_weights(q, k, mask, self.scale, self.softcap, v.dtype)
        if self.is_mutable_collection(ATTENTION):
            rows = f"b {_form(self.kv_heads).rows} s -> b n g t s"
            per_head = rearrange(weights, rows, n=self.kv_heads, t=q.shape[1])
            self.sow(ATTENTION, "weights", per_head)
        y = _weighted(weights, v, q.shape[1])
        return out(rearrange(y, "b t h k -> b t (h k)")), None

    def _kernel(
        self, q: Float[Array, "B T *_"], k: Float[Array, "B S *_"], rotary: Rotary | None
    ) -> Kernel | None:
        """Return the kernel to use, see `fused_attention`; None: none.

        It has no weights to be asked for, and no softcap.
        """
        if not self.fused or self.softcap or self.is_mutable_collection(ATTENTION):
            return None
        pairs = 0 if rotary is None else rotary[0].shape[-1]
        own = Kernel(self.heads, self.kv_heads, self.head_dim, self.scale, pairs)
        return own if own.is_faster(len(q), q.shape[1], k.shape[1], q.dtype) else None


def _normed(x: Float[Array, "*n K"], eps: float) -> Float[Array, "*n K"]:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + eps)).astype(x.dtype)


def attend(
    q: Float[Array, "B T H K"], k: Float[Array, "B S N K"], v: Float[Array, "B S N K"],
    mask: Bool[Array, "B T S"] | None, scale: float = 0.0, softcap: float = 0.0,
) -> Float[Array, "B T H K"]:  # fmt: skip
    """Return scaled dot-product attention; `scale` and `softcap` as in `Attention`."""
    weights = attention_weights(q, k, mask, scale, softcap, v.dtype)
    return _weighted(weights, v, q.shape[1])


class _Form(NamedTuple):
    """How attention is written as products of matrices: patterns of einops, and of `einsum`."""

    rows: str  # of scores: tokens t and query heads g of KV heads n
    apart: str  # the same axes, not merged
    keys: str  # KV heads n and keys s
    scores: str
    states: str


# Query heads are an axis of their own, so that the mask is one for all heads.
_FORM = _Form("n g t", "n g t", "n s", "bngtk,bnsk->bngts", "bngts,bnsk->bngtk")
# Of a single KV head, tokens and query heads are rows of one matrix as they are in memory.
_ONE_KV_HEAD = _Form("(n t g)", "n t g", "(n s)", "brk,bsk->brs", "brs,bsk->brk")


def _form(kv_heads: int) -> _Form:
    """Return the form without transposes on this platform (BUILD_NOTES, "Steps on a CPU")."""
    return _ONE_KV_HEAD if kv_heads == 1 and platform() == "cpu" else _FORM


def attention_weights(
    q: Float[Array, "B T H K"], k: Float[Array, "B S N K"], mask: Bool[Array, "B T S"] | None,
    scale: float, softcap: float, dtype: Dtype,
) -> Float[Array, "B *TNG S"]:  # fmt: skip
    """Return the weight of every key for every query of every head; they add up to 1.

    Their axes are the rows of `_form`.
    """
    N, K = k.shape[2:]
    form = _form(N)
    q = rearrange(q, f"b t (n g) k -> b {form.rows} k", n=N)
    k = rearrange(k, f"b s n k -> b {form.keys} k")
    scores = jnp.einsum(form.scores, q, k, preferred_element_type=jnp.float32)
    return _normalized(scores * (scale or K**-0.5), mask, softcap, form, N).astype(dtype)


def _normalized(
    scores: Float[Array, "B *TNG S"], mask: Bool[Array, "B T S"] | None, softcap: float,
    form: _Form, kv_heads: int,
) -> Float[Array, "B *TNG S"]:  # fmt: skip
    """Return the weights of scaled scores, with the axes of `form`."""
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # Added rather than selected by `where`, whose backward pass keeps the mask of every head.
        added = jnp.where(mask, jnp.float32(0), MASKED)
        added = rearrange(added, f"b t s -> b {re.sub('[ng]', '1', form.apart)} s")
        sizes = {"n": kv_heads, "t": mask.shape[1]}
        scores = rearrange(scores, f"b {form.rows} s -> b {form.apart} s", **sizes)
        scores = rearrange(scores + added, f"b {form.apart} s -> b {form.rows} s")
    return jax.nn.softmax(scores, axis=-1)


def _weighted(
    weights: Float[Array, "B *TNG S"], v: Float[Array, "B S N K"], tokens: int
) -> Float[Array, "B T H K"]:
    N, form = v.shape[2], _form(v.shape[2])
    y = jnp.einsum(form.states, weights, rearrange(v, f"b s n k -> b {form.keys} k"))
    return rearrange(y, f"b {form.rows} k -> b t (n g) k", n=N, t=tokens)


def write_cache(
    cache: KeysValues, k: Float[Array, "B T N K"], v: Float[Array, "B T N K"],
    index: Int[Array, ""] | int,
) -> KeysValues:  # fmt: skip
    """Return the cache with new keys and values from slot `index` on."""
    write = jax.lax.dynamic_update_slice
    keys = rearrange(k, "b t n k -> (b n) k t").astype(cache[0].dtype)
    values = rearrange(v, "b t n k -> (b n) t k").astype(cache[1].dtype)
    return write(cache[0], keys, (0, 0, index)), write(cache[1], values, (0, index, 0))


def attend_cache(
    q: Float[Array, "B T H K"], cache: KeysValues, mask: Bool[Array, "B T S"] | None,
    scale: float, softcap: float,
) -> tuple[Float[Array, "B N G T S"], Float[Array, "B T H K"]]:  # fmt: skip
    """Return the weights of the slots, and the attention to them; see `Attention`."""
    (keys, values), (B, T, _, K) = cache, q.shape
    sizes = {"b": B, "n": len(keys) // B, "t": T}
    q = rearrange(q, "b t (n g) k -> (b n) (g t) k", n=sizes["n"])
    scores = jnp.einsum("xgk,xks->xgs", q, keys, preferred_element_type=jnp.float32)
    scores = rearrange(scores * (scale or K**-0.5), "(b n) (g t) s -> b n g t s", **sizes)
    weights = _normalized(scores, mask, softcap, _FORM, sizes["n"]).astype(values.dtype)
    y = jnp.einsum("xgs,xsk->xgk", rearrange(weights, "b n g t s -> (b n) (g t) s"), values)
    return weights, rearrange(y, "(b n) (g t) k -> b t (n g) k", **sizes)
