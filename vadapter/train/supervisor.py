"""What surrounds a train step without training: watchdog, stop signals, metrics, compile times."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vadapter.data.batch import Batch, check_batch
from vadapter.data.pipeline import Schedule
from vadapter.distributed import watchdog
from vadapter.recipe.optim import learning_rate
from vadapter.train.metric_writer import MetricWriter
from vadapter.train.monitor import Monitor

if TYPE_CHECKING:
    from vadapter.stages.stage import Stage


class Supervisor:
    """Wraps the steps of a stage.

    A step that hangs ends the process (`watchdog`), a step that compiles may take longer, the
    metrics of a step are read while the next one runs (`Monitor`), and a signal to any host stops
    all of them after the same step (`Stop`).
    """

    def __init__(self, stage: "Stage", writer: MetricWriter):
        c, schedule = stage.config, Schedule(stage.config.data)

        def describe_sample(step: int, index: int) -> str:
            from vadapter.data.open import describe  # with the readers of data

            name, *_ = schedule(step - 1)
            return describe(name, stage.source(name), index)

        rate = learning_rate(c.optim, c.steps)
        self.stage, self.monitor = stage, Monitor(writer, stage.name, c, rate, describe_sample)
        self.flush = self.monitor.flush
        self._shapes: set[str] = set()  # of batches for which the step is compiled
        self._compiles = False
        self._batch: Batch | None = None
        self._began = 0.0

    @property
    def stopping(self) -> bool:
        """Whether the run stops after this step; every host gives the same answer."""
        return bool(self.stage.stop.requested)

    @contextlib.contextmanager
    def pause(self, activity: str) -> Iterator[None]:
        """Do something else between two steps, such as an evaluation, that is not step time."""
        began, self.stage.activity = time.monotonic(), activity
        yield
        self.monitor.exclude(time.monotonic() - began)

    def steps(self, batches: Iterable[Batch], start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (step, batch) for the steps after `start`; each batch is marked for `Stop`."""
        for step, batch in enumerate(watchdog.watch(batches), start + 1):
            self.stage.activity = f"step {step}"
            shapes = str({name: x.shape for name, x in batch.items()})
            if shapes not in self._shapes:
                self._shapes.add(shapes)
                self._compiles = True
                watchdog.beat(slow=True)
                check_batch(batch, self.stage.tokenizer.vocab_size)
                self.flush()  # the step before would otherwise seem to take as long
            self._batch, self._began = batch, time.monotonic()
            yield step, self.stage.stop.mark(batch)

    def after(self, step: int, metrics: dict[str, Any]) -> None:
        """Take the metrics of a step that was started; read and act on those of the step before.

        Raises:
          NonFiniteError, DataError: see `Monitor.add`.
        """
        if self._compiles:
            self.monitor.exclude(time.monotonic() - self._began, compiling=True)
        assert self._batch is not None, "no step was started"
        mark = metrics.pop("stop", None)
        self.monitor.add(step, metrics, self._batch["id"][self._batch["bad"]])
        self.stage.stop.read_mark(mark)
        if self._compiles:
            self._compiles = False
            self.flush()
