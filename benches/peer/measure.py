"""Time of several sides that take turns; medians and their spread."""

import dataclasses
import math
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

GROUP = 0.5  # seconds of calls between two readings of the clocks
Clock = Callable[[], float]


class Skipped(Exception):  # noqa: N818 - of a row, not of the program
    """A row cannot be measured here; the message says what it needs."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How a row is measured.

    Attributes:
      rounds: turns of each side.
      compiled: also by `torch.compile`.
      threads: of each side.
    """

    rounds: int = 10
    compiled: bool = True
    threads: int = 1


@dataclasses.dataclass
class Times:
    """Milliseconds per call of one side, a number per round."""

    cpu: list[float] = dataclasses.field(default_factory=list)  #: of all threads
    wall: list[float] = dataclasses.field(default_factory=list)


def alternate(
    sides: Mapping[str, Callable[[], Any]], rounds: int, *, calls: int = 0,
    clock: Clock = time.process_time,
) -> dict[str, Times]:  # fmt: skip
    """Time sides that have run once, in turns.

    Args:
      sides: name -> a function that returns when its work is done.
      rounds: number of turns of each.
      calls: of a side in its turn; 0: as many as the slowest makes in half a second.
      clock: of CPU seconds.
    """
    if not calls:
        calls = max(1, math.floor(GROUP / max(_seconds(call) for call in sides.values())))
    times = {name: Times() for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            cpu, wall = clock(), time.perf_counter()
            for _ in range(calls):
                call()
            times[name].wall.append((time.perf_counter() - wall) / calls * 1e3)
            times[name].cpu.append((clock() - cpu) / calls * 1e3)
    return times


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and its CPU seconds."""
    start = time.process_time()
    return call(), time.process_time() - start


def cpu_of_all() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def spread(values: Sequence[float]) -> list[float]:
    """Return the median, the 10th and the 90th percentile."""
    return [statistics.median(values), *map(float, np.percentile(values, (10, 90)))]


def summary(times: Mapping[str, Times]) -> dict[str, Any]:
    """Return name -> `cpu` and `wall` in ms and, beside the first side, `ratio` and `ratio_wall`.

    Each is a `spread` over rounds. A ratio is a side's time over that of the first side in the same
    round: above 1 the first one is faster.
    """
    base = next(iter(times.values()))
    out: dict[str, Any] = {}
    for name, side in times.items():
        out[name] = {"cpu": spread(side.cpu), "wall": spread(side.wall)}
        if side is not base:
            for key, theirs, ours in (
                ("ratio", side.cpu, base.cpu), ("ratio_wall", side.wall, base.wall),
            ):  # fmt: skip
                out[name][key] = spread([a / b for a, b in zip(theirs, ours, strict=True)])
    return out
