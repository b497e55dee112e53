"""Stop a run by SIGTERM or Ctrl-C, on all hosts at the same step, with its state saved."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np

from vadapter.distributed import hosts, watchdog
from vadapter.errors import ConfigError, Preempted

T = TypeVar("T")


class Stop:
    """A request to stop, set by a signal and checked wherever stopping loses nothing.

    On several hosts a signal to one of them stops all at the same point. While training, each host
    marks its rows of a batch with the signal it has received, the step returns the maximum over all
    rows, and every host reads it one step later. Elsewhere the hosts exchange their signals.
    """

    signal = 0  # number of the signal that this process has received; 0: none
    _agreed = 0  # signal of any host, once all hosts have seen it
    _mark: Any = None  # result of the step that is running
    _handler: Any = None  # of SIGTERM

    @property
    def requested(self) -> int:
        """The number of the signal that stops the run here; 0: continue."""
        return self.signal if hosts.count() == 1 else self._agreed

    def require_handlers(self) -> None:
        """Raise ConfigError if another handler of SIGTERM has been installed since `signals`."""
        handler = signal.getsignal(signal.SIGTERM)
        if self._handler is not None and handler is not self._handler:
            raise ConfigError(
                f"SIGTERM is handled by {handler!r}, so a run that is asked to stop would not be "
                "saved: remove that handler, or install it before the run"
            )

    def check(self, doing: str) -> None:
        """Raise Preempted if a signal was received, with nothing to save; all hosts call it."""
        if not self.requested and hosts.count() > 1:
            self._agreed = max(hosts.exchange(self.signal, doing))
        if self.requested:
            name = signal.Signals(self.requested).name
            raise Preempted(f"{doing}: stopped by {name}; run the same command again to resume")

    def watch(self, items: Iterable[T], *point: str) -> Iterator[T]:
        """Yield the items under the watchdog, until a signal; `point` is the work, for messages."""
        for i, item in enumerate(watchdog.watch(items)):
            self.check(", ".join(point))
            if not i:  # it compiles
                watchdog.beat(slow=True)
            yield item

    def mark(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch, on several hosts with `stop` i32[B]: the signal of this host."""
        if hosts.count() == 1:
            return dict(batch)
        return {**batch, "stop": np.full(len(batch["id"]), self.signal, np.int32)}

    def read_mark(self, mark: jax.Array | None) -> None:
        """Keep the maximum of `stop` from the running step, and read that of the step before."""
        before, self._mark = self._mark, mark
        if before is not None and not self._agreed:
            self._agreed = int(before)


@contextlib.contextmanager
def signals() -> Iterator[Stop]:
    """Let SIGTERM and the first Ctrl-C request a stop; the second Ctrl-C exits at once.

    A process that reaches no point where it can stop exits after VADAPTER_DEADLINE seconds.
    """
    stop, limit = Stop(), hosts.deadline()

    def request(number: int, _: Any) -> None:
        if stop.signal and number == signal.SIGINT:
            os._exit(130)
        if not stop.signal:
            again = "; press Ctrl-C again to stop immediately" * (number == signal.SIGINT)
            print(f"\nstopping after this step and saving a checkpoint{again}", file=sys.stderr)
            watchdog.exit_within(limit)
        stop.signal = number

    stop._handler = request
    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        watchdog.disarm()
        for s, handler in old.items():
            signal.signal(s, handler)
