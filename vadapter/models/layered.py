"""Parameters in the form that a CPU decodes with fastest: each layer's own, and float32.

A scan over a stack copies the weights of every layer out of it, for every token. Here each layer
has arrays of its own, in the memory of the stack, and the layers of a program follow each other: it
decodes up to 1.5 times as fast, but takes longer to compile (BUILD_NOTES, "Decoding on a CPU").
Only on one CPU device: elsewhere parameters stay stacked, so that programs of large models do not
grow with their depth.

Legend: E width of the language model, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vadapter.distributed.compile import unrolls
from vadapter.models.quantize import STORED


def pays(params: Mapping[str, Any], tokens: int) -> bool:
    """Return whether decoding so many tokens, one after the other, saves more than it compiles.

    Args:
      params: of a language model, stacked.
    """
    leaves = jax.tree.leaves(params["stack"]["blocks"])
    depth = len(leaves[0])
    return unrolls("decode", depth, sum(leaf.size * 4 for leaf in leaves) / depth, tokens)


def in_float32(params: Any) -> Any:
    """Return parameters with float32 in the place of bfloat16, which CPUs convert at every use."""
    half = lambda x: x.dtype == jnp.bfloat16  # noqa: E731
    return jax.tree.map(lambda x: x.astype(jnp.float32) if half(x) else x, params)


def layered(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters of a language model with a tuple of layers in the place of their stack.

    On a CPU they share the memory of the stack. A head that is tied to the embedding becomes an
    array of its own, [E, V], as products of a few rows with the embedding [V, E] take five times as
    long: the only one that takes memory.

    Args:
      params: stacked, on one CPU device.
    """
    leaves, structure = jax.tree.flatten(params["stack"]["blocks"])
    (device,) = leaves[0].devices()
    put = functools.partial(jax.device_put, device=device)  # without a copy, if aligned
    rows = zip(*([put(row) for row in np.asarray(leaf)] for leaf in leaves), strict=True)
    layers = tuple(structure.unflatten(row) for row in rows)
    new = {**params, "stack": {"blocks": layers}}
    integers = any(leaf.dtype in STORED.values() for leaf in leaves)
    if "head" not in params and not integers:  # the head of such a model would be, too
        table = np.asarray(params["embedding"]["embedding"])
        new["head"] = {"kernel": put(np.ascontiguousarray(table.T))}
    return new


def is_layered(params: Mapping[str, Any]) -> bool:
    """Return whether the parameters of a language model are those of `layered`."""
    return isinstance(params["stack"]["blocks"], tuple)


def fitted(model: Any, params: Mapping[str, Any], *, float32: bool) -> Any:
    """Return the adapter model for such parameters.

    Args:
      params: of every component.
      float32: compute in float32, whatever the model's own dtype.
    """
    modules = dict(model.modules)
    if float32:
        for name, module in modules.items():
            if hasattr(module, "dtype"):
                modules[name] = module.clone(dtype=jnp.float32)
    lm = modules[model.lm]
    config = dataclasses.replace(lm.config, tied="head" not in params[model.lm])
    modules[model.lm] = lm.clone(config=config)
    return dataclasses.replace(model, modules=modules)
