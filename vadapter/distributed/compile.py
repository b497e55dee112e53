"""Compiler options for short runs on a CPU and for sharded weights on a TPU; CPU memory."""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
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

# Device -> the deepest stack whose loop is unrolled in a train step, and the fewest steps of a
# stage for that. XLA:CPU then copies no weights and gradients in and out of stacks: up to 9 % of a
# step, for 0.05 to 0.25 s of compiling a layer (BUILD_NOTES, "Steps on a CPU").
_UNROLL = {"cpu": (8, 100)}


def unrolled_depth(device: str, steps: int) -> int:
    """Return the depth up to which stacks are unrolled in a stage of so many steps; 0: none is."""
    depth, at_least = _UNROLL.get(device, (0, 0))
    return depth if steps >= at_least else 0


@functools.cache
def options(**of_cpu: Any) -> dict[str, Any] | None:
    """Return compiler options for the default backend; None if a variable sets one of them."""
    preferred = {"cpu": _CPU | of_cpu, "tpu": TPU}.get(jax.default_backend(), {})
    flags = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    if not preferred or any(name in flags for name in preferred):
        return None
    from vadapter.io import results  # importing the training loop does without

    compiler = jax.devices()[0].client.platform_version
    return results.kept("options", [preferred, compiler], lambda: _accepted(preferred))


def _accepted(preferred: dict[str, Any]) -> dict[str, Any] | None:
    """Return those of the options that the compiler accepts: all, the first, or None."""
    for subset in (preferred, dict([next(iter(preferred.items()))])):  # some compilers lack one
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda x: x + 1, compiler_options=subset)(0)
            return subset
    return None


def jit(fn: Callable, of_cpu: dict[str, Any] = {}, **kwargs: Any) -> Any:  # noqa: B006
    """Return `jax.jit(fn, **kwargs)` with these options; `of_cpu` are others for a CPU."""
    return jax.jit(fn, compiler_options=options(**of_cpu), **kwargs)


def keep_memory() -> None:
    """Make glibc keep freed memory, if the CPU is the device (BUILD_NOTES, "CPU memory").

    XLA:CPU allocates its temporaries with malloc at every step. glibc maps large blocks again each
    time, so that page faults cost a step up to a third of its CPU time. Call it before anything
    initializes the backend: threads keep the arena of their first allocation, and only the main one
    grows without bounds.
    """
    if not sys.platform.startswith("linux") or not _cpu_alone():
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # malloc.h
    mallopt(trim_threshold, -1)  # never return memory
    mallopt(top_pad, 64 << 20)
    mallopt(mmap_max, 0)
    mallopt(arena_max, 1)  # other arenas consist of mapped blocks


def _cpu_alone() -> bool:
    """Return whether JAX can only use the CPU, without initializing a backend.

    With an accelerator, the single arena would slow down the compiler's many threads.
    """
    if platforms := getattr(jax.config, "jax_platforms", None):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    return not plugins and not any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
