"""Digests of arrays that do not depend on how the arrays are laid out over devices.

Orbax restores an array with a flipped bit without complaint, so every checkpoint carries a digest
of every leaf and every restore recomputes them. The same digests prove that a frozen component is
bit for bit what it was when training began. They guard against accidents, not against attackers.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
Digests = dict[str, list]  # path -> [shape, dtype name, digest], ready for JSON

_GOLDEN = 2654435761  # 2**32 / golden ratio: spreads neighboring indices
_BLOCK = 2**16  # elements that fit a CPU's cache


def leaf_digest(x: jax.Array) -> jax.Array:
    """Return the sum of the bits of `x`, each element weighted by its index, uint32[].

    Elementwise work and one sum: no reshape and no gather, so a sharded array stays sharded, and an
    integer sum is the same in any order. The weights are odd, hence invertible modulo 2**32, so one
    changed element always changes the sum. int4 counts as int8; complex and other sub-byte elements
    are a TypeError.
    """
    bits = _bits(jnp.asarray(x))
    index = jnp.zeros(bits.shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(bits.ndim)):
        iota = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        index += iota * jnp.uint32(stride % 2**32)
        stride *= bits.shape[axis]
    weight = (index * jnp.uint32(_GOLDEN) + jnp.uint32(1)) | jnp.uint32(1)
    return jnp.sum(bits * weight, dtype=jnp.uint32)


def is_key(x: Any) -> bool:
    """Return whether `x` is an array of typed PRNG keys; files and arithmetic need its uint32."""
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _bits(x: jax.Array) -> jax.Array:
    """Return `x` as uint32, one word per element; two, on a trailing axis, for 8-byte elements."""
    if is_key(x):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}
    x = _of_bytes(x)
    return jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)


def _of_bytes(x: Any) -> Any:
    """Return an array of whole bytes: int4 as int8, others as they are.

    Raises TypeError for a dtype without digest: complex, or of less than a byte.
    """
    if x.dtype == jnp.int4:
        return x.astype(jnp.int8)
    sub_byte = jnp.dtype(x.dtype).name in ("int2", "uint2", "uint4", "float4_e2m1fn")
    if jnp.issubdtype(x.dtype, jnp.complexfloating) or sub_byte:
        raise TypeError(f"no digest for dtype {x.dtype}")
    return x


def host_digest(x: np.ndarray) -> int:
    """Return the same as `leaf_digest`, of an array in the host's memory; compiles nothing."""
    x = _of_bytes(x)
    words = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}
    flat = np.ascontiguousarray(x).reshape(-1).view(words[x.dtype.itemsize])
    weights = np.arange(_BLOCK, dtype=np.uint32) * np.uint32(_GOLDEN) + np.uint32(1)
    total = 0
    for start in range(0, flat.size, _BLOCK):
        bits = flat[start : start + _BLOCK].astype(np.uint32)
        shift = np.uint32(start * _GOLDEN % 2**32)
        bits *= (weights[: bits.size] + shift) | np.uint32(1)
        total += int(bits.sum(dtype=np.uint32))
    return total % 2**32


_leaf_digests = jax.jit(lambda leaves: [leaf_digest(x) for x in leaves])


def leaf_paths(tree: PyTree) -> dict[str, Any]:
    """Return the leaves of a tree by dotted path, such as `params.adapter.block_0.kernel`.

    Two leaves of the same path (a key that itself contains a dot) are a ValueError.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in leaves:
            raise ValueError(f"two leaves of the tree are called {name!r}")
        leaves[name] = leaf
    return leaves


def tree_digests(tree: PyTree) -> Digests:
    """Return `{path: [shape, dtype, digest]}` of all leaves.

    Leaves on a single CPU device are read where they are, others by one compiled program. All must
    be on the same set of devices. On several hosts all make the call, and all get the same result.
    """
    leaves = leaf_paths(tree)
    if all(map(_on_one_cpu, leaves.values())):
        values = [host_digest(np.asarray(x)) for x in leaves.values()]
    else:
        values = jax.device_get(_leaf_digests(list(leaves.values())))
    return {
        path: [list(leaf.shape), str(leaf.dtype), int(value)]
        for (path, leaf), value in zip(leaves.items(), values, strict=True)
    }


def _on_one_cpu(x: Any) -> bool:
    """Return whether the host can read an array without a copy."""
    if is_key(x) or not isinstance(x, jax.Array):
        return False
    return [device.platform for device in x.devices()] == ["cpu"]


def combined(digests: Digests) -> str:
    """Return one SHA-256 (hex) over paths, shapes, dtypes and digests, in any order."""
    text = json.dumps(digests, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
