"""Settings of a process whose only device is the CPU: memory, and code of its compiler.

They are made before anything initializes the backend, and hold for the whole process.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import sys

import jax

from vadapter.distributed.compile import CPU_PROCESS

_FLAG = "--xla_backend_extra_options"


def prepare() -> None:
    """Make the settings, if the CPU is the only device; keep those of a variable.

    JAX is imported, but has no backend yet.
    """
    if not _cpu_alone():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if _FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FLAG}={','.join(CPU_PROCESS)}".strip()
    if sys.platform.startswith("linux"):
        _keep_memory()


def _keep_memory() -> None:
    """Make glibc keep freed memory (BUILD_NOTES, "CPU memory").

    XLA:CPU allocates its temporaries with malloc at every step. glibc maps large blocks again each
    time, so that page faults cost a step up to a third of its CPU time. Threads keep the arena of
    their first allocation, and only the main one grows without bounds: hence before the backend.
    """
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
