"""`jax.jit`, with compiler options for the backend at hand."""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax

# XLA:CPU spends most of a short run optimising code: these halve its compile time, and leave the
# matrix products, which are library calls, as fast as they were (BUILD_NOTES, "Compile time").
_CPU = {"xla_backend_optimization_level": 1, "xla_cpu_use_fusion_emitters": False}


@functools.cache
def options() -> dict[str, Any] | None:
    """Compiler options of the default backend, unless XLA_FLAGS set them; None for the defaults."""
    chosen = "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda x: x + 1, compiler_options=_CPU)(0)
    except jax.errors.JaxRuntimeError:
        return None
    return _CPU


def jit(fn: Callable, **kwargs: Any) -> Any:
    """As `jax.jit`."""
    return jax.jit(fn, compiler_options=options(), **kwargs)
