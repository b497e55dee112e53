"""Memory that a program needs besides its arguments, estimated from its trace.

For chips whose compiler is not installed. A value counts from the operation that computes it to the
last one that reads it; a chain of cheap operations counts as one, since compilers fuse it.
BUILD_NOTES, "Plan", compares the estimates with the TPU compiler's.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from vadapter.stages.flops import subprograms

# Operations that compilers compute where the result is read: the result is never stored.
FREE = {
    "broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "transpose", "slice", "rev",
    "convert_element_type", "copy", "name", "sharding_constraint", "stop_gradient",
}  # fmt: skip
# Products, and operations that read or write whole arrays; any other with one reader is fused.
STORED = {
    "dot_general", "conv_general_dilated", "scan", "while", "cond", "gather", "scatter",
    "scatter-add", "scatter_add", "sort", "concatenate", "dynamic_update_slice",
}  # fmt: skip


def temporaries(
    fn: Callable[..., Any], *arguments: Any, rows: int, scale: float, share: float
) -> int:
    """Return the largest number of bytes in use on a device, without arguments and results.

    Results replace donated arguments, so they need no memory of their own.

    Args:
      rows: B, a number that no other dimension has as a factor: arrays with it belong to the batch.
      scale: rows of a device, as a multiple of B.
      share: share of a device in all other arrays.
    """

    def size(v: Any) -> float:
        batched = any(dim and dim % rows == 0 for dim in v.aval.shape)
        return v.aval.size * v.aval.dtype.itemsize * (scale if batched else share)

    return round(_peak(jax.make_jaxpr(fn)(*arguments).jaxpr, size))


def _peak(jaxpr: Any, size: Callable[[Any], float]) -> float:
    last, free = _last_reads(jaxpr)
    used, peak = 0.0, 0.0
    released: dict[int, float] = {}  # operation -> bytes that are released after it
    for index, eqn in enumerate(jaxpr.eqns):
        for v in (v for v in eqn.outvars if v not in free):
            used += size(v)
            end = last.get(v, index)
            released[end] = released.get(end, 0.0) + size(v)
        inner = max((_peak(program, size) for program in subprograms(eqn.params)), default=0.0)
        peak = max(peak, used + inner)
        used -= released.pop(index, 0.0)
    return peak


def _last_reads(jaxpr: Any) -> tuple[dict[Any, int], set[Any]]:
    """Return variable -> last operation that needs it, and the variables that are not stored."""
    readers: dict[Any, list[int]] = {}
    for index, eqn in enumerate(jaxpr.eqns):
        for v in {v for v in eqn.invars if isinstance(v, core.Var)}:
            readers.setdefault(v, []).append(index)
    results = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    free = set(results)
    last = {v: max(indices) for v, indices in readers.items()}
    last |= dict.fromkeys(results, len(jaxpr.eqns))
    for index, eqn in reversed(list(enumerate(jaxpr.eqns))):
        name = eqn.primitive.name
        single = all(len(readers.get(v, ())) <= 1 for v in eqn.outvars)
        fused = name in FREE or (single and name not in STORED and not subprograms(eqn.params))
        if not fused or any(v in results for v in eqn.outvars):
            continue
        free.update(eqn.outvars)
        end = max((last.get(v, index) for v in eqn.outvars), default=index)
        for v in (v for v in eqn.invars if isinstance(v, core.Var)):
            last[v] = max(last.get(v, index), end)
    return last, free
