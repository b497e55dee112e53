"""A watchdog: a process that makes no progress prints the stacks of its threads and exits with 1.

A host that hangs still sends heartbeats, so the others would wait for it forever. Everything that
works in steps reports each of them (`beat`); after VADAPTER_WATCHDOG seconds without a report (600;
0: no limit) the process exits. A step that compiles, and the time between two loops of a job on
several hosts, may take `SLOW` times as long. A single process at a terminal has no limit unless the
variable is set: somebody is watching, and may have suspended it.
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
_STDERR = 2  # sys.stderr may have been replaced
_REARM_AFTER = 1.0  # seconds: arming costs half a millisecond

_armed = (-math.inf, 0.0)  # (when, for how many seconds)
_end = math.inf  # set by `exit_within`


def beat(*, slow: bool = False) -> None:
    """Report progress; the next report may take one limit, or several if it is `slow`."""
    attended = hosts.count() == 1 and os.isatty(0)
    if limit := hosts.seconds("VADAPTER_WATCHDOG", 0.0 if attended else 600.0):
        _arm(limit * SLOW if slow else limit)


def pause() -> None:
    """Report the end of a loop: a single process then has no limit until the next report."""
    global _armed
    if hosts.count() > 1:
        beat(slow=True)
    elif _end == math.inf:
        faulthandler.cancel_dump_traceback_later()
        _armed = (-math.inf, 0.0)


def watch(items: Iterable[T]) -> Iterator[T]:
    """Yield the items; using one and getting the next may each take one limit."""
    try:
        for item in items:
            beat()
            yield item
            beat()
    finally:
        pause()


def exit_within(limit: float) -> None:
    """Exit after `limit` seconds, whatever progress is reported, unless `disarm` is called."""
    global _end
    _end = min(_end, time.monotonic() + limit)
    _arm(limit)


def disarm() -> None:
    """Lift every limit: the work is done."""
    global _end, _armed
    _end, _armed = math.inf, (-math.inf, 0.0)
    faulthandler.cancel_dump_traceback_later()


def _arm(limit: float) -> None:
    global _armed
    now = time.monotonic()
    limit = max(min(limit, _end - now), 0.001)
    since, previous = _armed
    if _end < math.inf or limit != previous or now - since > _REARM_AFTER:
        _armed = (now, limit)
        faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
