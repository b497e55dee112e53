"""How a run is stopped from outside, and the hook by which tests do it at a chosen point."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from vadapter.errors import Preempted

T = TypeVar("T")


class Stop:
    """Set by a signal; whatever works for long looks at it where it can stop without loss.

    Attributes:
      signal: the number of the signal that came; 0: none.
    """

    signal = 0

    def check(self, doing: str) -> None:
        """Raises Preempted if a signal has come; for where there is nothing to save."""
        if self.signal:
            name = signal.Signals(self.signal).name
            raise Preempted(f"{doing}: stopped by {name}; run the same command again to go on")

    def watch(self, items: Iterable[T], *point: str) -> Iterator[T]:
        """The items, until a signal comes; `point` says in words what is being done."""
        for i, item in enumerate(items):
            fault(*point, i)
            self.check(", ".join(point))
            yield item


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C ask for a stop; the second Ctrl-C ends at once."""
    stop = Stop()

    def ask(number: int, _: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            os._exit(130)
        if not stop.signal:
            print("\nstopping after this step, saving (Ctrl-C again: at once)", file=sys.stderr)
        stop.signal = number

    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def fault(*point: str | int) -> None:
    """Test hook: with `VADAPTER_FAULT=KILL:decoder:step:7` the process kills itself there.

    TERM and INT, in place of KILL, are the signals of a scheduler and of Ctrl-C. The points:
    STAGE:begin, STAGE:step:N (not yet saved), STAGE:saving:N (save in flight), STAGE:evaluate:I and
    STAGE:features:I (batch I of these), STAGE:finish, STAGE:stored (components, but not done.json).
    """
    name, _, at = os.environ.get("VADAPTER_FAULT", "").partition(":")
    if name and at == ":".join(map(str, point)):
        os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
