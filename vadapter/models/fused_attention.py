"""Attention as one TPU kernel: scores and weights stay in the chip's vector memory.

XLA writes the float32 scores of every head to the chip's main memory, and copies queries and
outputs between the layouts of projections and of heads. This kernel (Pallas) reads queries, keys
and values as the projections write them, rotates them, and holds all keys of a head at once, so
that its softmax is the ordinary one. The backward pass computes the weights again.

Legend: B batch, T queries, S keys, H query heads, N KV heads, K head dim, P rotated pairs, h query
heads and n KV heads of a block, R query rows of a block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from vadapter.distributed.mesh import partition
from vadapter.models.rope import Rotary

MASKED = -1e30  # added to the scores of masked keys, as in `layers`
LANES = 128  # of a vector register: a block of heads ends at a multiple, or the array's end
# Bytes of float32 scores on a device up to which XLA keeps them in the vector memory of a v5e, so
# that the kernel is faster only if it has something to rotate.
FEW = 2**26
ROWS = 256, 128  # query rows of a block, if all do not fit
VMEM = 14 * 2**20  # bytes of vector memory that a step may use: a core of a v4 has 16 MiB


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Attention of these heads.

    Attributes:
      scale: of the scores; 0: K ** -0.5.
      pairs: P; 0 without a rotation.
      interpret: compute it where there is no TPU.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    pairs: int = 0
    interpret: bool = False

    @property
    def block(self) -> tuple[int, int]:
        """Return (h, n); (0, 0) if no block of heads fills registers.

        It is the smallest one: heads of the same KV head, or KV heads with all of their heads.
        """
        group = self.heads // self.kv_heads
        sizes = [(h, 1) for h in range(1, group + 1) if group % h == 0]
        sizes += [(n * group, n) for n in range(2, self.kv_heads + 1) if self.kv_heads % n == 0]

        def fills(count: int, of: int) -> bool:
            return count == of or count * self.head_dim % LANES == 0

        fit = (s for s in sizes if fills(s[0], self.heads) and fills(s[1], self.kv_heads))
        return next(fit, (0, 0))

    @property
    def halves(self) -> bool:
        """Whether a rotated pair is the same lane of two registers."""
        return self.pairs > 0 and self.pairs % LANES == 0 and 2 * self.pairs == self.head_dim

    def rows(self, queries: int, keys: int) -> int:
        """Return R, the query rows of a block; 0 if a step would use too much vector memory."""
        fit = (r for r in (queries, *ROWS) if r <= queries and self.vmem(r, keys) <= VMEM)
        return next(fit, 0)

    def vmem(self, rows: int, keys: int) -> int:
        """Estimate the bytes of vector memory that a step of the backward pass uses."""
        wide, narrow = (count * self.head_dim for count in self.block)
        # Blocks in bfloat16, twice, as the next step's are read meanwhile; sums; three of scores.
        size = 4 * (3 * rows * wide + 4 * keys * narrow + rows * keys)
        size += 8 * keys * narrow + 12 * rows * keys
        if self.pairs:
            size += 16 * (rows * wide + keys * narrow) + 2 * keys * narrow
        return size

    def is_faster(self, batch: int, queries: int, keys: int, dtype: Any) -> bool:
        """Return whether it supports arrays of this size on the mesh's devices, and gains time.

        False without an active mesh, see `distributed.mesh.with_mesh`.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.abstract_device.platform != "tpu" or dtype != jnp.bfloat16:
            return False
        if queries % 8 or keys % 8 or self.head_dim % 64:
            return False
        of_q, of_kv = _partitions(batch, self.heads, self.kv_heads, mesh)
        heads, kv_heads = (
            count // mesh.shape.get(spec[2], 1)
            for count, spec in ((self.heads, of_q), (self.kv_heads, of_kv))
        )
        if heads < self.heads and kv_heads == self.kv_heads > 1:
            return False  # devices would need other KV heads than the first
        rows = jax.sharding.NamedSharding(mesh, PartitionSpec(of_q[0])).shard_shape((batch,))[0]
        if not self.pairs and 4 * rows * heads * queries * keys <= FEW:
            return False
        own = dataclasses.replace(self, heads=heads, kv_heads=kv_heads)
        return own.block[0] > 0 and own.rows(queries, keys) > 0

    def __call__(
        self, q: Float[Array, "B T HK"], k: Float[Array, "B S NK"], v: Float[Array, "B S NK"],
        mask: Bool[Array, "B T S"] | None, rotary: Rotary | None,
    ) -> Float[Array, "B T HK"]:  # fmt: skip
        """Return `layers.attend` of heads that lie side by side.

        Args:
          mask: True where a query attends; None: everywhere.
          rotary: factors of the keys, whose last T are the queries'; None: without a rotation.
        """
        return _attention(q, k, v, mask, rotary, self)


# -- over the devices of the mesh ------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(q: Any, k: Any, v: Any, mask: Any, rotary: Any, kernel: Kernel) -> jax.Array:
    return _on_mesh(_forward, kernel, q, k, v, mask, rotary)


def _keep(q: Any, k: Any, v: Any, mask: Any, rotary: Any, kernel: Kernel) -> tuple[Any, Any]:
    return _attention(q, k, v, mask, rotary, kernel), (q, k, v, mask, rotary)


def _gradients(kernel: Kernel, kept: Any, do: jax.Array) -> tuple[Any, ...]:
    return (*_on_mesh(_backward, kernel, *kept, do), None, None)


_attention.defvjp(_keep, _gradients)


def _partitions(
    batch: int, heads: int, kv_heads: int, mesh: Any
) -> tuple[PartitionSpec, PartitionSpec]:
    """Return the sharding of queries [B, T, H·K], and that of keys and values [B, S, N·K]."""
    names = ("batch", None, "heads")
    return partition(names, (batch, 1, heads), mesh), partition(names, (batch, 1, kv_heads), mesh)


def _on_mesh(fn: Callable[..., Any], kernel: Kernel, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    """Return `fn(kernel, q, k, v, mask, rotary, [do])`, on every device for its rows and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return fn(kernel, q, k, v, *rest)
    of_q, of_kv = _partitions(len(q), kernel.heads, kernel.kv_heads, mesh)
    rows, shared = PartitionSpec(of_q[0]), of_q[2] if of_q[2] != of_kv[2] else None

    def local(q: Any, k: Any, v: Any, *rest: Any) -> Any:
        heads, kv_heads = (x.shape[2] // kernel.head_dim for x in (q, k))
        own = dataclasses.replace(kernel, heads=heads, kv_heads=kv_heads)
        out = fn(own, q, k, v, *rest)
        if fn is _backward and shared:  # KV heads whose query heads are on several devices
            out = (out[0], *(jax.lax.psum(x, shared) for x in out[1:]))
        return out

    specs = (of_q, of_kv, of_kv, rows, rows, of_q)[: 3 + len(rest)]
    out_specs = (of_q, of_kv, of_kv) if fn is _backward else of_q
    mapped = jax.shard_map(local, in_specs=specs, out_specs=out_specs, check_vma=False)
    return mapped(q, k, v, *rest)


# -- on a device -----------------------------------------------------------------------------------


def _forward(kernel: Kernel, *arrays: Any) -> jax.Array:
    return _call(kernel, False, *arrays)[0]


def _backward(kernel: Kernel, *arrays: Any) -> tuple[jax.Array, ...]:
    return tuple(_call(kernel, True, *arrays))


def _call(
    kernel: Kernel, backward: bool, q: Any, k: Any, v: Any, mask: Any, rotary: Any, *do: Any
) -> Sequence[jax.Array]:
    """Run the forward or the backward kernel: a step for every row, block of heads and of queries.

    Steps with the same keys follow each other.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (B, T, _), S, K, (h, n) = q.shape, k.shape[1], kernel.head_dim, kernel.block
    R = kernel.rows(T, S)
    share = kernel.heads // h // (kernel.kv_heads // n)  # blocks of heads with the same keys
    queries = pl.BlockSpec((1, R, h * K), lambda b, i, t: (b, t, i))
    keys = pl.BlockSpec((1, S, n * K), lambda b, i, t: (b, 0, i // share))
    tile = lambda width: pl.BlockSpec((1, R, width), lambda b, i, t: (b, t, 0))  # noqa: E731
    row = lambda width: pl.BlockSpec((1, S, width), lambda b, i, t: (b, 0, 0))  # noqa: E731
    inputs: dict[str, Any] = {"q": (q, queries), "k": (k, keys), "v": (v, keys)}
    outputs: dict[str, Any] = {"dq": (q, queries), "dk": (k, keys), "dv": (v, keys)}
    scratch: dict[str, Any] = {}
    if mask is not None:
        inputs["bias"] = jnp.where(mask, 0, MASKED).astype(jnp.bfloat16), tile(S)
    if rotary is not None:
        of_q, of_k = _of_lanes(kernel, rotary, T, h), _of_lanes(kernel, rotary, S, n)
        for name, q_factor, k_factor in zip(("sin", "cos"), of_q, of_k, strict=True):
            inputs[f"{name}_q"] = q_factor, tile(q_factor.shape[2])
            inputs[f"{name}_k"] = k_factor, row(k_factor.shape[2])
        scratch["rotated"] = pltpu.VMEM((S, n * K), k.dtype)
    if backward:
        inputs["do"] = do[0], queries
        scratch |= dict.fromkeys(("sum_k", "sum_v"), pltpu.VMEM((S, n * K), jnp.float32))
    else:
        outputs = {"o": (q, queries)}
    names = (*inputs, *outputs, *scratch)
    steps = share * pl.cdiv(T, R)

    def body(*refs: Any) -> None:
        step = pl.program_id(1) % share * pl.num_programs(2) + pl.program_id(2)
        at = _Step(kernel, dict(zip(names, refs, strict=True)), step == 0, step == steps - 1)
        if backward:
            at.backward(T - pl.program_id(2) * R if T % R else None)
        else:
            at.forward()

    moved = [x for x, _ in (*inputs.values(), *outputs.values())]
    return pl.pallas_call(
        body,
        grid=(B, kernel.heads // h, pl.cdiv(T, R)),
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=(5 if backward else 2) * 2 * B * kernel.heads * T * S * K,
            transcendentals=B * kernel.heads * T * S,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in moved),
        ),
        interpret=kernel.interpret,
        name="attention_backward" if backward else "attention_forward",
    )(*(x for x, _ in inputs.values()))


def _of_lanes(kernel: Kernel, rotary: Rotary, rows: int, heads: int) -> Sequence[jax.Array]:
    """Return the factors of the last `rows` positions for the lanes of a block of heads.

    Those are of a lane's partner in its pair, and of the lane itself. Where the halves of a head
    are whole registers, the factors of one half are enough, see `_Step._rotated`.
    """
    sin, cos = (factor[:, -rows:] for factor in rotary)
    if kernel.halves:
        return sin, cos
    rest = (*sin.shape[:2], kernel.head_dim - 2 * kernel.pairs)
    of_partner = jnp.concatenate([-sin, sin, jnp.zeros(rest)], -1)
    of_lane = jnp.concatenate([cos, cos, jnp.ones(rest)], -1)
    return [jnp.tile(factor, (1, 1, heads)) for factor in (of_partner, of_lane)]


class _Step:
    """A step of the grid: `refs` are its blocks by name, and whether its keys are new or done."""

    def __init__(self, kernel: Kernel, refs: dict[str, Any], first: Any, last: Any):
        self.kernel, self.refs, self.first, self.last = kernel, refs, first, last
        self._scale = kernel.scale or kernel.head_dim**-0.5

    def forward(self) -> None:
        """Write the outputs of a block of queries."""
        q, k, v, outputs = self._queries(), self._keys(), self.refs["v"][0], []
        for own, shared in self._heads():
            weights, total = self._weights(q[:, own], k[:, shared])
            y = _dot(weights.astype(v.dtype), v[:, shared], 1, 0)
            outputs.append(y / total)
        self.refs["o"][0] = jnp.concatenate(outputs, 1).astype(v.dtype)

    def backward(self, rows: Any) -> None:
        """Write the gradients of a block of queries; add to those of its keys and values.

        Only `rows` rows of the block exist; None: all.
        """
        from jax.experimental import pallas as pl

        refs, scale = self.refs, self._scale
        q, k, v, do = self._queries(), self._keys(), refs["v"][0], refs["do"][0]
        if rows is not None:
            there = jax.lax.broadcasted_iota(jnp.int32, (len(q), 1), 0) < rows
            q, do = jnp.where(there, q, 0), jnp.where(there, do, 0)
            refs["bias"] = [jnp.where(there, refs["bias"][0], 0)] if "bias" in refs else None

        @pl.when(self.first)
        def _() -> None:
            for name in ("sum_k", "sum_v"):
                refs[name][...] = jnp.zeros_like(refs[name])

        of_queries = []
        for own, shared in self._heads():
            weights, total = self._weights(q[:, own], k[:, shared])
            weights = weights / total
            slope = _dot(do[:, own], v[:, shared], 1, 1)
            slope = weights * (slope - (weights * slope).sum(1, keepdims=True))
            slope = slope.astype(q.dtype)
            refs["sum_v"][:, shared] += _dot(weights.astype(q.dtype), do[:, own], 0, 0)
            refs["sum_k"][:, shared] += _dot(slope, q[:, own], 0, 0)
            of_queries.append(_dot(slope, k[:, shared], 1, 0) * scale)
        refs["dq"][0] = self._rotated("q", jnp.concatenate(of_queries, 1), -1).astype(q.dtype)

        @pl.when(self.last)
        def _() -> None:
            refs["dk"][0] = self._rotated("k", refs["sum_k"][...] * scale, -1).astype(k.dtype)
            refs["dv"][0] = refs["sum_v"][...].astype(v.dtype)

    def _heads(self) -> list[tuple[slice, slice]]:
        """Return for each query head of the block its lanes, and those of its KV head."""
        (h, n), K = self.kernel.block, self.kernel.head_dim
        lanes = lambda i: slice(i * K, (i + 1) * K)  # noqa: E731
        return [(lanes(i), lanes(i * n // h)) for i in range(h)]

    def _queries(self) -> jax.Array:
        q = self.refs["q"][0]
        return self._rotated("q", q.astype(jnp.float32)).astype(q.dtype)

    def _keys(self) -> jax.Array:
        """Return the keys, rotated by the first step that reads them."""
        from jax.experimental import pallas as pl

        if not self.kernel.pairs:
            return self.refs["k"][0]
        rotated = self.refs["rotated"]

        @pl.when(self.first)
        def _() -> None:
            k = self.refs["k"][0].astype(jnp.float32)
            rotated[...] = self._rotated("k", k).astype(rotated.dtype)

        return rotated[...]

    def _rotated(self, name: str, x: jax.Array, direction: int = 1) -> jax.Array:
        """Return queries or keys rotated, or their gradients rotated back (-1), in float32."""
        from jax.experimental.pallas import tpu as pltpu

        if not (pairs := self.kernel.pairs):
            return x
        sin, cos = (self.refs[f"{each}_{name}"][0] for each in ("sin", "cos"))
        sin = direction * sin
        if self.kernel.halves:
            parts = [x[:, i : i + pairs] for i in range(0, x.shape[1], pairs)]
            turned = []
            for a, b in zip(parts[::2], parts[1::2], strict=True):
                turned += [a * cos - b * sin, b * cos + a * sin]
            return jnp.concatenate(turned, 1)
        lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % self.kernel.head_dim
        after, before = pltpu.roll(x, x.shape[1] - pairs, 1), pltpu.roll(x, pairs, 1)
        return x * cos + jnp.where(lane < pairs, after, before) * sin

    def _weights(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return weights that are not normalized yet, and their sums, float32."""
        scores = _dot(q, k, 1, 1) * self._scale
        if "bias" in self.refs:
            scores = scores + self.refs["bias"][0].astype(jnp.float32)
        weights = jnp.exp(scores - scores.max(1, keepdims=True))
        return weights, weights.sum(1, keepdims=True)


def _dot(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Return the float32 product over a dimension of each.

    The precision is explicit, for the compiler refuses others for bfloat16.
    """
    dims, precision = (((of_a,), (of_b,)), ((), ())), jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)
