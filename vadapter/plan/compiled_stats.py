"""Memory, traffic and estimated time of one program on accelerators that are not here.

Of TPUs they are those of the program that the TPU compiler makes. Other compilers are not here:
their memory is estimated from the trace, and what is sent is what the same program sends when it
is compiled for as many devices of this host's CPU. `Figures.how` says which.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from vadapter.distributed.compile import TPU
from vadapter.distributed.topology import Topology
from vadapter.plan import flops, hlo, liveness
from vadapter.stages.abstract_state import bytes_per_device

ROWS = 1009  # of a traced micro-batch: a prime, so that no other dimension has it as a factor


@dataclasses.dataclass(frozen=True)
class Figures:
    """A program on one device, in bytes.

    Attributes:
      how: where these figures come from.
      arguments: what is there before: weights, optimizer, batch.
      temporaries: activations, gradients, logits; None where the compiler stopped before.
      peak: the most at a time; of a program that the compiler stopped at, what it needs.
      limit: what programs may use.
      flops: of the traced program on all devices, recomputed products included.
      compiled_flops: the same in the compiled one; None where nothing was compiled.
      collectives: kind -> what is sent.
      cycles: the compiler's estimate, see `hlo.Work`; estimated_ms: at the chip's clock.
      unestimated: of `compiled_flops`, those without an estimate; in `cycles` at the chip's peak.
      compile_s: None where nothing was compiled.
    """

    how: str
    arguments: int
    temporaries: int | None
    peak: int
    limit: int
    flops: int
    collectives: dict[str, hlo.Sent]
    compiled_flops: int | None = None
    cycles: int = 0
    estimated_ms: float | None = None
    compile_s: float | None = None
    unestimated: int = 0

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def of_compiler(topology: Topology, traced: Any, arguments: Any, loops: int = 1) -> Figures:
    """Those of the TPU compiler.

    Args:
      traced: a program for the topology's devices, from `jax.jit(fn).trace(*arguments)`.
      loops: how often the body of a `while` runs.
    """
    limit, how = int(topology.row.hbm), f"compiled for {topology} by libtpu {versions()['libtpu']}"
    total = flops.count_traced(traced.jaxpr.jaxpr, loops)
    began = time.perf_counter()
    try:
        with _uncached():
            compiled = traced.lower().compile(compiler_options=TPU)
    except jax.errors.JaxRuntimeError as error:
        if (needs := memory_needed(str(error))) is None:
            raise
        spent = time.perf_counter() - began
        kept = bytes_per_device(arguments)
        return Figures(how, kept, None, needs, limit, total, {}, compile_s=spent)
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    work, row = hlo.walk(compiled.as_text() or ""), topology.row
    cycles = work.cycles + round(work.unestimated / row.peak * row.clock)
    return Figures(
        how, memory.argument_size_in_bytes, memory.temp_size_in_bytes,
        memory.peak_memory_in_bytes, limit, total, work.collectives,
        work.flops * topology.chips, cycles, 1000 * cycles / row.clock, seconds,
        work.unestimated * topology.chips,
    )  # fmt: skip


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Without jax's cache on disk: a program for devices that are not here cannot be read back."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", None)
    reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        reset_cache()


def of_trace(topology: Topology, traced: Any, arguments: Any, held: int, loops: int = 1) -> Figures:
    """Those of an analysis; something is compiled only where there are several chips.

    Args:
      traced, arguments, loops: as of `of_compiler`, for as many devices of this host's CPU.
      held: bytes of temporaries, from `estimate`.
    """
    work, seconds = None, None
    how = "memory estimated from the trace (of TPUs 13 % under to 61 % over the compiler's)"
    if topology.chips > 1:
        began = time.perf_counter()
        compiled = traced.lower().compile()
        seconds = time.perf_counter() - began
        work = hlo.walk(compiled.as_text() or "")
        how += f", collectives from compiling for {topology.chips} devices of this host's CPU"
    kept, limit = bytes_per_device(arguments), int(topology.row.hbm)
    total = flops.count_traced(traced.jaxpr.jaxpr, loops)
    return Figures(
        how, kept, held, kept + held, limit, total, work.collectives if work else {},
        work and work.flops * topology.chips, compile_s=seconds,
    )  # fmt: skip


def estimate(fn: Callable[..., Any], arguments: Any, mesh: Mapping[str, int], rows: int) -> int:
    """Bytes of temporaries on a device.

    Args:
      fn, arguments: the program for one device and micro-batches of `ROWS`.
      mesh: axis -> devices, of the mesh that it will run on.
      rows: of its micro-batches, on all devices together.
    """
    scale = rows / (mesh["data"] * mesh["fsdp"]) / ROWS
    share = 1 / (mesh["fsdp"] * mesh["tensor"])
    return liveness.temporaries(fn, *arguments, rows=ROWS, scale=scale, share=share)


def memory_needed(message: str) -> int | None:
    """Bytes that the TPU compiler says a program needs; None if it stopped for something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in (r"\(([\d.]+)([KMGT]?)\) exceeds", r"Used ([\d.]+)([KMGT]?) of"):
        if found := re.search(pattern, message):
            return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return None


def versions() -> dict[str, str]:
    """Of what plans depend on; without libtpu where that is not installed."""
    found = {}
    for name in ("vadapter", "jax", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
