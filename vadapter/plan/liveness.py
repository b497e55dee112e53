"""The memory that a program needs beside its arguments, estimated from its trace.

For chips whose compiler is not here. Values are counted from where they are made to where they are
last read; chains of cheap operations count as one, as compilers fuse them. Against what the TPU
compiler reports, see BUILD_NOTES, "Plan".
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from vadapter.plan.flops import programs_in

# What a compiler computes where it is read: never kept of itself.
FREE = {
    "broadcast_in_dim", "iota", "reshape", "squeeze", "expand_dims", "transpose", "slice", "rev",
    "convert_element_type", "copy", "name", "sharding_constraint", "stop_gradient",
}  # fmt: skip
# Products, and what reads or writes whole arrays at once; all else of one reader is fused.
KEPT = {
    "dot_general", "conv_general_dilated", "scan", "while", "cond", "gather", "scatter",
    "scatter-add", "scatter_add", "sort", "concatenate", "dynamic_update_slice",
}  # fmt: skip


def temporaries(
    fn: Callable[..., Any], *arguments: Any, rows: int, scale: float, share: float
) -> int:
    """The most bytes at a time on a device, arguments and results left out: these replace those.

    Args:
      fn: a function of shapes.
      rows: B, a number that no other dimension has as a factor: arrays with it are of the batch.
      scale: rows of a device for one of these; share: of a device in all other arrays.
    """
    size = lambda v: v.aval.size * v.aval.dtype.itemsize  # noqa: E731
    batched = lambda v: any(dim and dim % rows == 0 for dim in v.aval.shape)  # noqa: E731
    jaxpr = jax.make_jaxpr(fn)(*arguments).jaxpr
    return round(_peak(jaxpr, lambda v: size(v) * (scale if batched(v) else share)))


def _peak(jaxpr: Any, size: Callable[[Any], float]) -> float:
    """The most that is held while a program runs, beside what it is given and gives back."""
    last, free = _last_reads(jaxpr)
    now, most = 0.0, 0.0
    ends: dict[int, float] = {}
    for at, eqn in enumerate(jaxpr.eqns):
        for v in (v for v in eqn.outvars if v not in free):
            now += size(v)
            until = last.get(v, at)
            ends[until] = ends.get(until, 0.0) + size(v)
        inner = max((_peak(program, size) for program in programs_in(eqn.params)), default=0.0)
        most = max(most, now + inner)
        now -= ends.pop(at, 0.0)
    return most


def _last_reads(jaxpr: Any) -> tuple[dict[Any, int], set[Any]]:
    """Variable -> the operation that last needs it; and the variables that are never kept."""
    end = len(jaxpr.eqns)
    readers: dict[Any, list[int]] = {}
    for at, eqn in enumerate(jaxpr.eqns):
        for v in {v for v in eqn.invars if isinstance(v, core.Var)}:
            readers.setdefault(v, []).append(at)
    results = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    free = set(results)
    last = {v: end if v in results else max(ats) for v, ats in readers.items()}
    last |= dict.fromkeys(results, end)
    for at in reversed(range(end)):
        eqn = jaxpr.eqns[at]
        name = eqn.primitive.name
        once = all(len(readers.get(v, ())) <= 1 for v in eqn.outvars)
        fused = name in FREE or (once and name not in KEPT and not programs_in(eqn.params))
        if not fused or any(v in results for v in eqn.outvars):
            continue
        free.update(eqn.outvars)
        until = max((last.get(v, at) for v in eqn.outvars), default=at)
        for v in (v for v in eqn.invars if isinstance(v, core.Var)):
            last[v] = max(last.get(v, at), until)
    return last, free
