"""Compiler options, and which loops over layers are unrolled: what pays on which device."""

import contextlib
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

# XLA:CPU spends most of a short run optimizing code: these halve its compile time, and leave the
# matrix products, which are library calls, as fast as they were (BUILD_NOTES, "Compile time").
_CPU = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}
# Device and use -> options.
OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("cpu", ""): _CPU,
    # Separate layers, see `models.layered`: the emitters compile what is equal in all of them once,
    # and products of few rows are faster by Eigen than by YNNPACK, with the widest vectors.
    ("cpu", "layered"): _CPU | {
        "xla_cpu_use_fusion_emitters": True, "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_cpu_prefer_vector_width": 512,
    },
    # Where weights are sharded over all chips, XLA:TPU cuts each product that gathers them into as
    # many small ones as there are chips: a step of 244 ms takes 321 (BUILD_NOTES, "Plan").
    ("tpu", ""): {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 10**6},
}  # fmt: skip
# What XLA:CPU takes for a whole process only, see `cpu.prepare`. Kernels are short loops: unrolled,
# they run no faster and are 30 % of what compiling costs (BUILD_NOTES, "Compile time").
CPU_PROCESS = ("xla_cpu_disable_loop_unrolling",)


class Loop(NamedTuple):
    """What a loop over layers costs on one core of a CPU, and what it costs to unroll it."""

    copying: float  #: seconds a layer and byte, for copies in and out of the stacks
    compiling: float  #: seconds that a layer takes longer to compile
    deepest: float = float("inf")  #: number of layers above which no loop is unrolled


# Use -> its loop; bytes are those of the arrays that enter a layer in training, of which a loop
# copies all that the backward pass needs, and of a layer's weights in decoding. On other devices
# copies are hidden behind products (BUILD_NOTES, "Steps on a CPU", "Decoding on a CPU").
LOOPS = {"train": Loop(5e-10, 0.07, 8), "decode": Loop(2.5e-11, 0.2)}


def unrolls(use: str, depth: int, size: float, times: float) -> bool:
    """Return whether a CPU saves more by unrolling a loop over layers than that takes to compile.

    Args:
      use: of `LOOPS`.
      depth: number of layers.
      size: bytes of a layer, see `LOOPS`.
      times: how often the program will run every layer.
    """
    loop = LOOPS[use]
    return 0 < depth <= loop.deepest and times * size * loop.copying > loop.compiling


@functools.cache
def options(use: str = "") -> dict[str, Any] | None:
    """Return compiler options for the default backend; None if a variable sets one of them."""
    device = jax.default_backend()
    preferred = OPTIONS.get((device, use)) or OPTIONS.get((device, ""), {})
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


def jit(fn: Callable, use: str = "", **kwargs: Any) -> Any:
    """Return `jax.jit(fn, **kwargs)` with the options of a use."""
    return jax.jit(fn, compiler_options=options(use), **kwargs)
