"""What surrounds a train step without training: watchdog, stop signals, metrics, compile times."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vadapter.data.batch import Batch, check_batch
from vadapter.data.pipeline import Schedule
from vadapter.distributed import watchdog
from vadapter.errors import DataError, NonFiniteError
from vadapter.recipe.optim import learning_rate
from vadapter.recipe.schema import StageConfig
from vadapter.train.metric_writer import MetricWriter

if TYPE_CHECKING:
    from vadapter.stages.stage import Stage

MAX_SKIPPED = 3  # updates in a row that may be dropped
FEW_BAD = 10  # unusable samples that never stop a run, and that are reported one by one


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
        """Take the metrics of a step that was started; raises as `Monitor.add`."""
        if self._compiles:
            self.monitor.exclude(time.monotonic() - self._began, compiling=True)
        assert self._batch is not None, "no step was started"
        mark = metrics.pop("stop", None)
        self.monitor.add(step, metrics, self._batch["id"][self._batch["bad"]])
        self.stage.stop.read_mark(mark)
        if self._compiles:
            self._compiles = False
            self.flush()


class Monitor:
    """The metrics of one attempt at a stage.

    The metrics of a step are read while the next one runs, so that the devices never wait for the
    host; `flush` reads them at once. A row of metrics.jsonl covers the steps since the row before:
    it counts dropped updates and unusable samples, which are acted upon at every step, and has the
    means of everything else over the other updates, including the step time (without compilation
    and evaluation). Single batches say little, because images and clips alternate.

    Args:
      rate: learning rate at each optimizer step, from 0.
      describe: (step, id in the source) -> the name of an unusable sample.
    """

    def __init__(
        self, writer: MetricWriter, name: str, config: StageConfig, rate: optax.Schedule,
        describe: Callable[[int, int], str],
    ):  # fmt: skip
        self._writer, self._name, self._config, self._describe = writer, name, config, describe
        # All at once, now: while a step runs, the device would compute a rate only after it.
        self._rates = np.asarray(jax.vmap(rate)(jnp.arange(config.steps)))
        self._pending: tuple[int, Any, Sequence[int]] | None = None
        self._seen, self._bad = 0, 0  # samples of this attempt
        self._named: list[str] = []  # unusable samples
        self._new_line(time.monotonic())

    def _new_line(self, now: float) -> None:
        self._clock, self._steps = now, 0
        self._compile_s, self._sums = 0.0, {"skipped": 0, "bad": 0}
        self._values: list[dict[str, float]] = []  # of the updates that were not dropped

    def exclude(self, seconds: float, *, compiling: bool = False) -> None:
        """Exclude time from the step time; what a step spent compiling is reported."""
        self._clock += seconds
        self._compile_s += seconds * compiling

    def add(self, step: int, metrics: Any, bad: Sequence[int]) -> None:
        """Take the metrics of a running step, from 1, and read those of the step before.

        `bad` are the ids of this host's unusable samples.

        Raises:
          NonFiniteError: too many updates in a row were dropped.
          DataError: too many samples cannot be used.
        """
        for value in metrics.values():
            value.copy_to_host_async()
        previous, self._pending = self._pending, (step, metrics, bad)
        if previous is not None:
            self._read(*previous)

    def flush(self) -> None:
        """Wait for the last step and read its metrics; raises as `add`."""
        previous, self._pending = self._pending, None
        if previous is not None:
            self._read(*previous)

    def _read(self, step: int, metrics: Any, bad: Sequence[int]) -> None:
        c = self._config
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        row, count = (int(values.pop(key)) for key in ("skipped", "bad"))
        self._steps += 1
        self._sums["skipped"] += row > 0
        self._sums["bad"] += count
        self._seen += c.batch
        self._bad += count
        if row:
            self._writer.say(f"step {step}: gradients not finite, update dropped ({row} in a row)")
        else:
            self._values.append(values)
        for index in bad:
            if len(self._named) < FEW_BAD:
                self._named.append(self._describe(step, index))
                self._writer.tell(f"step {step}: left out {self._named[-1]}")
        if step % c.log_every == 0 or step in (1, c.steps) or row >= MAX_SKIPPED:
            self._log(step, values)
        if row >= MAX_SKIPPED:
            raise NonFiniteError(
                f"{self._name}: gradients were not finite for {row} steps in a row, up to step "
                f"{step}; the last checkpoint is finite. Lower optim.lr or inspect the data of "
                "these steps."
            )
        if self._bad > max(c.max_bad * self._seen, FEW_BAD):
            raise DataError(
                f"{self._name}: {self._bad} of {self._seen} samples could not be used, more than "
                f"{c.max_bad:.1%}: {'; '.join(self._named)}. Fix or remove them, or allow more "
                f"with --config.stages.{self._name}.max_bad={self._bad / self._seen:.2g}"
            )

    def _log(self, step: int, last: dict[str, float]) -> None:
        now = time.monotonic()
        updates = self._values or [last]
        values = {k: float(np.mean([v[k] for v in updates])) for k in last} | self._sums
        values["lr"] = rate = float(self._rates[step - 1])
        values |= {f"lr_{name}": rate * x for name, x in self._config.optim.lr_mults.items()}
        values["step_ms"] = 1000 * (now - self._clock) / self._steps
        if self._compile_s:
            values["compile_s"] = self._compile_s
        self._new_line(now)
        self._writer.write(step, values)
