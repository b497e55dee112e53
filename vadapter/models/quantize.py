"""Weight-only int8 and int4 for frozen language models, by qwix: a half or quarter of bfloat16.

Legend: I inputs and O outputs of a linear layer, G groups of inputs that share a scale; in a stack
a leading axis for the layers.

A kernel is int8 or int4 [I, O] with one scale per group and output, float32 [G, O]. Zero stays
zero, and integer · scale is off by at most half a step, 1/255 of the largest weight of a group and
output (int4: 1/15). Activations keep their dtype. Attention, feed-forward and an untied head are
integers; embeddings, norms and biases are not. The steps are plain roundings: a calibrated method
(GPTQ, AWQ) loses less with int4.
"""

import functools
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vadapter.errors import ConfigError
from vadapter.models.paths import flatten, nest

# field of a component -> dtype of its kernels
STORED = {"int8": jnp.dtype(jnp.int8), "int4": jnp.dtype(jnp.int4)}
SCALE = "_scale"  # the scale of the leaf `kernel` is the leaf `kernel_scale`


def quantized(spec: Mapping[str, Any]) -> str:
    """Return the field of a component's spec that makes its kernels integers; "": none does."""
    return next((name for name in STORED if spec.get(name)), "")


def library() -> ModuleType:
    """Return qwix, an optional dependency; raise ConfigError if it is not installed."""
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(
            f"int8 and int4 need qwix ({error}): pip install 'vadapter[int8]', or leave them out"
        ) from error
    return qwix


def full_precision(abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shapes to read for a module of integer kernels: those that it has with floats.

    `abstract` is a tree of `jax.ShapeDtypeStruct`, with shardings where there is a mesh; the result
    has float32 kernels in the place of integers.
    """
    out = {}
    for path, leaf in flatten(abstract).items():
        if leaf.dtype in STORED.values():
            leaf = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)
        if not path.endswith("/kernel" + SCALE):
            out[path] = leaf
    return nest(out)


def quantize(
    leaves: Iterable[tuple[str, jax.Array]], abstract: Mapping[str, Any]
) -> dict[str, Any]:
    """Quantize the kernels that are integers in `abstract`, one leaf at a time.

    A leaf is released before the next one is requested: with a generator that reads from a file,
    no more than one kernel of full precision is in memory.

    Args:
      leaves: (path, array) of `full_precision(abstract)` in any order and float dtype; paths are
        joined by "/".
      abstract: tree of shapes, with the shardings of the result where there is a mesh; leaves that
        are no integers in it are unchanged.

    Raises:
      ConfigError: qwix is not installed.
    """
    flat, out = flatten(abstract), {}
    for path, array in leaves:
        if flat[path].dtype in STORED.values():
            names = (path, path + SCALE)
            shardings = tuple(flat[name].sharding for name in names)
            to_integers = functools.partial(
                _quantized, dtype=flat[path].dtype, groups=flat[path + SCALE].shape[-2]
            )
            pair = jax.jit(to_integers, out_shardings=shardings)(array)
            out.update(zip(names, jax.block_until_ready(pair), strict=True))
        else:
            out[path] = array
        del array
    return nest(out)


def _quantized(
    kernel: Float[Array, "*n I O"], *, dtype: np.dtype, groups: int
) -> tuple[Int[Array, "*n I O"], Float[Array, "*n G O"]]:
    """Return kernel and scale. Computed in float32, as bfloat16 would round the steps."""
    inputs = kernel.ndim - 2
    axes = [axis for axis in range(kernel.ndim) if axis != inputs]
    tiles = {inputs: kernel.shape[inputs] // groups} if groups > 1 else None
    result = library().quantize(
        kernel.astype(jnp.float32), dtype, channelwise_axes=axes, tiled_axes=tiles
    )
    return result.qvalue, result.scale
