"""Gated delta network: a layer in place of attention that hands a state from token to token.

A head keeps a matrix S that answers a key k with a value Sᵀk. A token lets it fade and writes its
own value at its own key, in place of what S had there:

    S ← exp(g) S;   S ← S + β k (v - Sᵀk)ᵀ;   output Sᵀq

Queries, keys and values pass a short convolution over the last tokens before. Tokens of a row may
be padding or texts that share a prefix: a token continues from the last one that it attends to,
whose state the mask tells. Between chunks of `CHUNK` tokens the states are handed on; within one,
all tokens are products of matrices (arXiv 2406.06484, 2412.06464).

Legend: B batch, T new tokens, U tokens of the inputs, S keys of the mask, E width, H value heads,
G key heads, K key head dim, V value head dim, W width of the convolution, D channels of one, C
tokens of a chunk, N chunks, X = W - 1 + U tokens with those before.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.layers import Dtype, Norm, linear, partitioned

CHUNK = 64  # tokens
BOTH_WAYS = (
    "bidirectional=True is not possible with a language model of gated delta networks, which hand "
    "states on in one direction"
)
_EPS = 1e-6  # of the norms of queries and keys
_EXACT = jax.lax.Precision.HIGHEST  # states are sums of all tokens so far


@dataclasses.dataclass(frozen=True)
class DeltaConfig:
    """A gated delta network.

    Attributes:
      key_heads, value_heads: G and H; each key head serves H / G value heads.
      key_dim, value_dim: of a head, K and V.
      conv: tokens that the convolution sees, W.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int = 4

    def __post_init__(self) -> None:
        if self.value_heads % self.key_heads:
            raise ConfigError(
                f"delta.value_heads={self.value_heads} must be a multiple of "
                f"delta.key_heads={self.key_heads}"
            )


# What a layer hands on while a sequence is decoded: the inputs of the convolutions of queries, keys
# and values at the last W - 1 tokens, and the state after the last one.
DeltaCache = tuple[
    Float[Array, "B W_1 GK"], Float[Array, "B W_1 GK"], Float[Array, "B W_1 HV"],
    Float[Array, "BH K V"],
]  # fmt: skip


def empty(config: DeltaConfig, batch: int, dtype: Dtype) -> DeltaCache:
    """Return what is handed to the first token. States are float32, whatever the dtype."""
    c = config
    before = [(c.key_heads * c.key_dim,) * 2, (c.value_heads * c.value_dim,)]
    inputs = [jnp.zeros((batch, c.conv - 1, size), dtype) for sizes in before for size in sizes]
    state = jnp.zeros((batch * c.value_heads, c.key_dim, c.value_dim), jnp.float32)
    return *inputs, state  # type: ignore[return-value]


class Paths(NamedTuple):
    """From which token each token continues, as the mask of attention says.

    The tokens that a token attends to are its path. The path of the next token is the same and the
    next token; only texts that share a prefix begin again after its last token.
    """

    real: Bool[Array, "B U"]  # not padding
    before: Int[Array, "B U W_1"]  # the tokens in front of each on its path, the nearest first
    last: Int[Array, "B W_1"]  # the last W - 1 tokens of the row, the latest last
    same: Bool[Array, "B N C C"]  # tokens of a chunk on the path of each
    again: Bool[Array, "B N C"]  # continues after the prefix, not after the chunk before
    end: Bool[Array, "B N C"]  # the last token of the chunk
    fork: Bool[Array, "B N C"]  # the last token of the prefix, where several texts follow

    @classmethod
    def of(cls, mask: Bool[Array, "B U U"], conv: int) -> "Paths":
        """Return the paths of a mask of self-attention; indices begin with the W - 1 before."""
        tokens = mask.shape[1]
        at = jnp.arange(tokens)
        real = jnp.diagonal(mask, axis1=1, axis2=2)
        token, other = at[None, :, None], at[None, None, :]
        path = mask & real[:, None, :] & (other <= token)

        def latest(of: jax.Array) -> jax.Array:  # -1: none
            return jnp.where(of, at.reshape((1,) * (of.ndim - 1) + (-1,)), -1).max(-1)

        parent, previous = (latest(x & (other < token)) for x in (path, real[:, None]))
        restarts = real & (parent != previous)
        fork_at = jnp.where(restarts, parent, -1).max(-1, keepdims=True)

        # Steps back: those of tokens to their parent, those of what was before to its neighbor.
        old = jnp.broadcast_to(jnp.arange(conv - 1) - 1, (len(mask), conv - 1))
        back = jnp.concatenate([jnp.maximum(old, 0), parent + conv - 1], axis=1)
        step = lambda i: jnp.take_along_axis(back, i, axis=1)  # noqa: E731
        newest = latest(real)[:, None] + conv - 1
        before, last = [back[:, conv - 1 :]], [newest]
        for _ in range(conv - 2):
            before.append(step(before[-1]))
            last.append(step(last[-1]))

        size = min(CHUNK, tokens)
        count = -(-tokens // size)
        room = count * size - tokens
        chunks = lambda x: jnp.pad(x, ((0, 0), (0, room))).reshape(-1, count, size)  # noqa: E731
        start = token // size * size  # of the chunk of each token
        handed, ahead = (latest(x & (other < start)) for x in (path, real[:, None]))
        square = jnp.pad(path, ((0, 0), (0, room), (0, room)))
        square = square.reshape(-1, count, size, count, size)
        same = jnp.diagonal(square, axis1=1, axis2=3)
        own = chunks(real)
        end = own & ~jnp.flip(jnp.cumsum(jnp.flip(own, -1), -1) > 1, -1)
        return cls(
            real, jnp.stack(before, -1)[..., : conv - 1],
            jnp.concatenate(last[::-1], -1)[:, -(conv - 1) :] if conv > 1 else newest[:, :0],
            jnp.moveaxis(same, -1, 1), chunks(real & (handed != ahead)), end,
            chunks(at[None] == fork_at),
        )  # fmt: skip


class DeltaNet(nn.Module):
    """A gated delta network; called as `layers.Attention`, positions and frequencies aside.

    Attributes:
      norm_eps: of the norm of outputs.
      linear: constructor of the large projections, with the signature of `layers.linear`; those of
        decay and step are small, and always float.
    """

    config: DeltaConfig
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32
    linear: Callable[..., nn.Module] = linear

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], kv: Float[Array, "B U E"], *,
        mask: Bool[Array, "B T S"] | None = None, positions: Any = None, freq: Any = None,
        cache: DeltaCache | None = None, index: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "B T E"], DeltaCache | None]:  # fmt: skip
        """Return the outputs of the last T of U tokens, and what is handed on.

        Args:
          mask: of self-attention of all U tokens: a token continues from the last earlier one that
            it attends to, and one that does not attend to itself is padding.
          cache: from `empty`, or None; `index` is the key of the mask that is the first token.

        Raises:
          ConfigError: there is no mask: tokens attend both ways.
        """
        del positions, freq
        c, wide = self.config, x.shape[1]
        if mask is None:
            if not self.is_initializing():
                raise ConfigError(BOTH_WAYS)
            mask = jnp.ones((*kv.shape[:2], kv.shape[1]), bool)
        mask = jax.lax.dynamic_slice_in_dim(mask, index, kv.shape[1], axis=2)
        paths = Paths.of(mask, c.conv)
        old = empty(c, len(kv), self.dtype) if cache is None else cache

        def project(name: str, heads: int, size: int, x: jax.Array) -> jax.Array:
            y = self.linear(heads * size, ("embed", "heads"), False, self.dtype, name=name)(x)
            return constrain(y, "batch", None, "heads")

        sizes = {"q": (c.key_heads, c.key_dim), "k": (c.key_heads, c.key_dim),
                 "v": (c.value_heads, c.value_dim)}  # fmt: skip
        mixed, inputs = [], []
        for (name, (heads, size)), before in zip(sizes.items(), old[:3], strict=True):
            y = checkpoint_name(project(name, heads, size, kv), name)
            y = jnp.concatenate([before.astype(y.dtype), y], axis=1)
            inputs.append(_rows(y, paths.last).astype(before.dtype))
            y = self._convolve(name, y, paths)
            mixed.append(rearrange(y, "b u (h k) -> b h u k", h=heads).astype(jnp.float32))
        q, k = (jnp.repeat(_unit(x), c.value_heads // c.key_heads, axis=1) for x in mixed[:2])

        def small(name: str) -> Float[Array, "B H U"]:
            layer = linear(c.value_heads, ("embed", "heads"), dtype=self.dtype, name=name)
            return rearrange(layer(kv).astype(jnp.float32), "b u h -> b h u")

        def per_head(name: str, init: Callable[..., Any]) -> Float[Array, "1 H 1"]:
            value = self.param(name, partitioned(init, "heads"), (c.value_heads,))
            return value.astype(jnp.float32)[None, :, None]

        rate, bias = per_head("a_log", _log_rates), per_head("dt_bias", nn.initializers.ones)
        decay = -jnp.exp(rate) * nn.softplus(small("a") + bias)
        beta = nn.sigmoid(small("b"))
        real = paths.real[:, None].astype(jnp.float32)
        state = rearrange(old[3].astype(jnp.float32), "(b h) k v -> b h k v", b=len(kv))
        y, state = delta_rule(
            q * c.key_dim**-0.5, k, mixed[2], decay * real, beta * real, state, paths
        )
        y = rearrange(y[:, :, -wide:], "b h t v -> b t h v").astype(self.dtype)
        y = Norm("rms", self.norm_eps, self.dtype, name="norm")(y)
        z = project("z", c.value_heads, c.value_dim, x)
        y = rearrange(y, "b t h v -> b t (h v)") * nn.silu(z.astype(jnp.float32))
        out = self.linear(x.shape[-1], ("heads", "embed"), False, self.dtype, name="o")
        y = out(y.astype(self.dtype))
        if cache is None:
            return y, None
        return y, (*inputs, rearrange(state, "b h k v -> (b h) k v").astype(old[3].dtype))  # type: ignore[return-value]

    def _convolve(self, name: str, x: Float[Array, "B X D"], paths: Paths) -> Float[Array, "B U D"]:
        """Return silu of the convolution of each token with those before it on its path."""
        width = self.config.conv
        init = partitioned(nn.initializers.uniform(width**-0.5), None, None, "heads")
        kernel = _Kernel((width, 1, x.shape[-1]), init, name=f"conv_{name}")()
        kernel = kernel.astype(self.dtype)
        y = x[:, width - 1 :] * kernel[-1:]
        for i in range(width - 1):
            y = y + _rows(x, paths.before[..., i]) * kernel[width - 2 - i : width - 1 - i]
        return nn.silu(y)


class _Kernel(nn.Module):
    """A parameter `kernel`, in a module of its own as a layer's."""

    shape: tuple[int, ...]
    init: Callable[..., Any]

    @nn.compact
    def __call__(self) -> Float[Array, "..."]:
        return self.param("kernel", self.init, self.shape)


def _log_rates(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, " H"]:
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0))


def _rows(x: Float[Array, "B X D"], index: Int[Array, "B U"]) -> Float[Array, "B U D"]:
    return jnp.take_along_axis(x, index[:, :, None], axis=1)


def _unit(x: Float[Array, "*n K"]) -> Float[Array, "*n K"]:
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + _EPS)


class _Chunk(NamedTuple):
    """One chunk of tokens, or several with a leading axis for them."""

    q: Float[Array, "B H C K"]
    k: Float[Array, "B H C K"]
    v: Float[Array, "B H C V"]
    decay: Float[Array, "B H C"]
    beta: Float[Array, "B H C"]
    same: Bool[Array, "B C C"]
    again: Bool[Array, "B C"]
    end: Bool[Array, "B C"]
    fork: Bool[Array, "B C"]


def delta_rule(
    q: Float[Array, "B H U K"], k: Float[Array, "B H U K"], v: Float[Array, "B H U V"],
    decay: Float[Array, "B H U"], beta: Float[Array, "B H U"], state: Float[Array, "B H K V"],
    paths: Paths,
) -> tuple[Float[Array, "B H U V"], Float[Array, "B H K V"]]:  # fmt: skip
    """Return the outputs of all tokens, and the state after the last one; float32.

    Args:
      decay, beta: g and β, 0 at padding.
      state: in front of the first token.
    """
    tokens, (count, size) = q.shape[2], paths.again.shape[1:]

    def chunks(x: jax.Array) -> jax.Array:
        room = [(0, 0), (0, 0), (0, count * size - tokens), *[(0, 0)] * (x.ndim - 3)]
        x = jnp.pad(x, room).reshape(*x.shape[:2], count, size, *x.shape[3:])
        return jnp.moveaxis(x, 2, 0)

    of_heads = (chunks(x) for x in (q, k, v, decay, beta))
    masks = (paths.same, paths.again, paths.end, paths.fork)
    chunk = _Chunk(*of_heads, *(jnp.moveaxis(x, 1, 0) for x in masks))
    if count == 1:
        (state, _), y = _chunk((state, state), _Chunk(*(x[0] for x in chunk)))
        return y, state
    (state, _), y = jax.lax.scan(_chunk, (state, state), chunk)
    return rearrange(y, "n b h c v -> b h (n c) v")[:, :, :tokens], state


def _chunk(states: tuple[jax.Array, jax.Array], c: _Chunk) -> tuple[Any, Float[Array, "B H C V"]]:
    """Return the states after a chunk, the last token's and the prefix's, and its outputs."""

    def product(pattern: str, *x: jax.Array) -> jax.Array:
        return jnp.einsum(pattern, *x, precision=_EXACT)

    same = c.same[:, None]
    faded = product("bij,bhj->bhi", c.same.astype(jnp.float32), c.decay)
    # Of each pair on a path; other differences may be large, and their gradient is not wanted.
    between = jnp.where(same, faded[..., :, None] - faded[..., None, :], 0)
    between = jnp.where(same, jnp.exp(between), 0)
    since = jnp.exp(faded)[..., None]  # the chunk before

    def handed(x: jax.Array) -> Float[Array, "B H C V"]:
        """Return Sᵀx of the state that each token's path enters the chunk with."""
        near, far = (product("bhck,bhkv->bhcv", x, state) for state in states)
        return since * jnp.where(c.again[:, None, :, None], far, near)

    beta = c.beta[..., None]
    written = beta * (c.v - handed(c.k))
    if c.q.shape[2] > 1:
        overlap = beta * product("bhik,bhjk->bhij", c.k, c.k) * between
        written = jax.lax.linalg.triangular_solve(
            overlap, written, left_side=True, lower=True, unit_diagonal=True
        )
    scores = product("bhik,bhjk->bhij", c.q, c.k) * between
    y = handed(c.q) + product("bhij,bhjv->bhiv", scores, written)

    def after(at: Bool[Array, "B C"], otherwise: jax.Array) -> Float[Array, "B H K V"]:
        """Return the state after the token that is marked; without one, as it is."""
        one = at[:, None].astype(jnp.float32)
        weights = product("bgi,bhij->bhj", one, between)
        near, far = states
        enters = (at & c.again).any(-1)[:, None, None, None]
        fade = product("bgi,bhi->bh", one, since[..., 0])[..., None, None]
        new = fade * jnp.where(enters, far, near)
        new += product("bhck,bhcv->bhkv", c.k * weights[..., None], written)
        return jnp.where(at.any(-1)[:, None, None, None], new, otherwise)

    return (after(c.end, states[0]), after(c.fork, states[1])), y
