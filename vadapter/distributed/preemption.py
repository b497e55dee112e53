"""How a run is stopped from outside, and the hook by which tests do it at a chosen point."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from vadapter.distributed import hosts, watchdog
from vadapter.errors import ConfigError, Preempted

T = TypeVar("T")


class Stop:
    """Set by a signal; whatever works for long looks at it where it can stop without loss.

    On several hosts a signal to one of them stops all, at the same point: while training each host
    signs its rows of a batch, and what the step makes of that, all of them read one step later;
    elsewhere they ask each other.

    Attributes:
      signal: the number of the signal that this process got; 0: none.
    """

    signal = 0
    _agreed = 0  # of any host, as all of them know
    _flag: Any = None  # of the step under way
    _handler: Any = None  # of SIGTERM

    @property
    def asked(self) -> int:
        """The number of the signal that stops the run here; 0: go on."""
        return self.signal if hosts.count() == 1 else self._agreed

    def require_handlers(self) -> None:
        """Refuses to train where a signal would not come here.

        Raises:
          ConfigError: something else has taken SIGTERM since `signals`.
        """
        taken = signal.getsignal(signal.SIGTERM)
        if self._handler is not None and taken is not self._handler:
            raise ConfigError(
                f"SIGTERM goes to {taken!r}, so a run that is asked to stop would not be saved: "
                "take that handler away, or install it before the run"
            )

    def check(self, doing: str) -> None:
        """Raises Preempted if a signal has come; for where there is nothing to save."""
        if not self.asked and hosts.count() > 1:
            self._agreed = max(hosts.exchange(self.signal, doing))
        if self.asked:
            name = signal.Signals(self.asked).name
            raise Preempted(f"{doing}: stopped by {name}; run the same command again to go on")

    def watch(self, items: Iterable[T], *point: str) -> Iterator[T]:
        """The items, until a signal comes; `point` says in words what is being done."""
        for i, item in enumerate(watchdog.watch(items)):
            fault(*point, i)
            self.check(", ".join(point))
            if not i:  # it compiles
                watchdog.beat(slow=True)
            yield item

    def sign(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch, with `stop` i32[B] on several hosts: the signal that this one got."""
        if hosts.count() == 1:
            return dict(batch)
        return {**batch, "stop": np.full(len(batch["id"]), self.signal, np.int32)}

    def hear(self, flag: jax.Array | None) -> None:
        """Takes the largest `stop` of a step under way; reads that of the step before."""
        before, self._flag = self._flag, flag
        if before is not None and not self._agreed:
            self._agreed = int(before)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """SIGTERM and the first Ctrl-C ask for a stop; the second Ctrl-C ends at once.

    A process that does not come to a point where it can stop, ends after VADAPTER_DEADLINE seconds.
    """
    stop, limit = Stop(), hosts.deadline()

    def ask(number: int, _: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            os._exit(130)
        if not stop.signal:
            print("\nstopping after this step, saving (Ctrl-C again: at once)", file=sys.stderr)
            watchdog.hurry(limit)
        stop.signal = number

    stop._handler = ask
    old = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        watchdog.off()
        for s, handler in old.items():
            signal.signal(s, handler)


def fault(*point: str | int) -> None:
    """Test hook: with `VADAPTER_FAULT=KILL:decoder:step:7` the process kills itself there.

    TERM and INT, in place of KILL, are the signals of a scheduler and of Ctrl-C; RAISE is an error
    that nobody foresaw, HANG one that nobody sees. The points:
    STAGE:begin, STAGE:step:N (not yet saved), STAGE:saving:N (save in flight), STAGE:evaluate:I and
    STAGE:features:I (batch I of these), STAGE:finish, STAGE:stored (components, but not done.json).
    """
    name, _, at = os.environ.get("VADAPTER_FAULT", "").partition(":")
    if not name or at != ":".join(map(str, point)):
        return
    if name == "RAISE":
        raise RuntimeError(f"injected at {at}")
    if name == "HANG":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.Signals[f"SIG{name}"])
