"""Weight-only int8 for frozen language models, by qwix: half of bfloat16's bytes.

Legend: I inputs and O outputs of a linear layer; in a stack a leading axis for the layers.

A kernel is int8 [I, O] with one scale per output, float32 [1, O]. Zero stays zero, and int8 · scale
is off by at most 1/255 of the output's largest weight, half a step. Activations keep their dtype.
Attention, feed-forward and an untied head are int8; embeddings, norms and biases are not.
"""

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from vadapter.errors import ConfigError
from vadapter.models.paths import flatten, nest

SCALE = "_scale"  # the scale of the leaf `kernel` is the leaf `kernel_scale`


def library() -> ModuleType:
    """Return qwix, an optional dependency; raise ConfigError if it is not installed."""
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            f"int8=True needs qwix ({error}): pip install 'vadapter[int8]', or leave int8 out"
        ) from error
    return qwix


def full_precision(abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes to read for a module with int8 kernels: those that it has without int8.

    `abstract` is a tree of `jax.ShapeDtypeStruct`, with shardings where there is a mesh; the result
    has float32 kernels in the place of int8.
    """
    out = {}
    for path, leaf in flatten(abstract).items():
        if leaf.dtype == jnp.int8:
            leaf = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        if not path.endswith("/kernel" + SCALE):
            out[path] = leaf
    return nest(out)


def quantize(
    leaves: Iterable[tuple[str, jax.Array]], abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """Quantize the kernels that are int8 in `abstract`, one leaf at a time.

    A leaf is released before the next one is requested: with a generator that reads from a file,
    no more than one kernel of full precision is in memory.

    Args:
      leaves: (path, array) of `full_precision(abstract)` in any order and float dtype; paths are
        joined by "/".
      abstract: tree of shapes, with the shardings of the result where there is a mesh; leaves that
        are not int8 in it are unchanged.

    Raises:
      ConfigError: qwix is not installed.
    """
    flat, out = flatten(abstract), {}
    for path, array in leaves:
        if flat[path].dtype == jnp.int8:
            names = (path, path + SCALE)
            shardings = tuple(flat[name].sharding for name in names)
            pair = jax.jit(_quantized, out_shardings=shardings)(array)
            out.update(zip(names, jax.block_until_ready(pair), strict=True))
        else:
            out[path] = array
        del array
    return nest(out)


def _quantized(
    kernel: Float[Array, "*n I O"],
) -> tuple[Int8[Array, "*n I O"], Float[Array, "*n 1 O"]]:
    """Return kernel and scale. Computed in float32, as bfloat16 would round the steps."""
    axes = [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]
    result = library().quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=axes)
    return result.qvalue, result.scale
