"""Compiler options for short runs on a CPU and for sharded weights on a TPU; CPU memory."""

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import jax

# XLA:CPU spends most of a short run optimizing code: these halve its compile time, and leave the
# matrix products, which are library calls, as fast as they were (BUILD_NOTES, "Compile time").
_CPU = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
# Where weights are sharded over all chips, XLA:TPU cuts each product that gathers them into as many
# small ones as there are chips: a step of 244 ms takes 321 (BUILD_NOTES, "Plan").
TPU = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6}


@functools.cache
def options() -> dict[str, Any] | None:
    """Return compiler options for the default backend; None if a variable sets one of them."""
    preferred = {"cpu": _CPU, "tpu": TPU}.get(jax.default_backend(), {})
    flags = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    if not preferred or any(name in flags for name in preferred):
        return None
    for subset in (preferred, dict([next(iter(preferred.items()))])):  # some compilers lack one
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x + 1, compiler_options=subset)(0)
            return subset
    return None


def jit(fn: Callable, **kwargs: Any) -> Any:
    """Return `jax.jit(fn, **kwargs)` with these options."""
    return jax.jit(fn, compiler_options=options(), **kwargs)


def keep_memory() -> None:
    """Make glibc keep freed memory, if the CPU is the device (BUILD_NOTES, "CPU memory").

    XLA:CPU allocates its temporaries with malloc at every step, and glibc returns blocks of that
    size to the kernel each time: page faults cost a small step a fifth of its CPU time. With other
    devices the single arena would only slow down the compiler's many threads.
    """
    if not sys.platform.startswith("linux") or jax.default_backend() != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mmap_threshold, trim_threshold, top_pad, arena_max = -3, -1, -2, -8  # malloc.h
    mallopt(mmap_threshold, 32 << 20)  # the largest value it accepts
    mallopt(trim_threshold, 2000 << 20)
    mallopt(top_pad, 256 << 20)
    mallopt(arena_max, 1)  # other arenas consist of mapped blocks
