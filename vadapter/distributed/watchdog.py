"""What does not come on is ended: with the stacks of all threads, and exit code 1.

A host that hangs keeps its heartbeat, so the others would wait for it forever. Whatever works in
steps says so at every step (`beat`); if that stops for VADAPTER_WATCHDOG seconds (600; 0: never
mind), the process prints where each thread is and ends. A step that compiles, and the time
between loops of a job of several hosts, may take `SLOW` times as long. In a single process at a
terminal there is no limit unless it is set: somebody is watching, who may also have stopped it.
"""

import faulthandler
import math
import os
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from vadapter.distributed import hosts

T = TypeVar("T")

SLOW = 6
_STDERR = 2  # whatever sys.stderr is by then
_OFTEN = 1.0  # seconds: arming costs half a millisecond

_armed = (-math.inf, 0.0)  # when, for how many seconds
_end = math.inf


def beat(*, slow: bool = False) -> None:
    """Something was done; the next thing may take a while (`slow`: a long one)."""
    watched = hosts.count() == 1 and os.isatty(0)
    if limit := hosts.seconds("VADAPTER_WATCHDOG", 0.0 if watched else 600.0):
        _arm(limit * SLOW if slow else limit)


def rest() -> None:
    """A loop is over: in a single process nothing is expected until the next one begins."""
    global _armed
    if hosts.count() > 1:
        beat(slow=True)
    elif _end == math.inf:
        faulthandler.cancel_dump_traceback_later()
        _armed = (-math.inf, 0.0)


def watch(items: Iterable[T]) -> Iterator[T]:
    """The items, each with the time of a step until the next one is asked for and has come."""
    try:
        for item in items:
            beat()
            yield item
            beat()
    finally:
        rest()


def hurry(limit: float) -> None:
    """The process was asked to end: it has so many seconds, however lively it is."""
    global _end
    _end = min(_end, time.monotonic() + limit)
    _arm(limit)


def off() -> None:
    """No limit any more: the work is done."""
    global _end, _armed
    _end, _armed = math.inf, (-math.inf, 0.0)
    faulthandler.cancel_dump_traceback_later()


def _arm(limit: float) -> None:
    global _armed
    now = time.monotonic()
    limit = max(min(limit, _end - now), 0.001)
    at, before = _armed
    if _end < math.inf or limit != before or now - at > _OFTEN:
        _armed = (now, limit)
        faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
