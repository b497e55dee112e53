"""Follow the metrics of the steps: read one step late, logged now and then, always acted upon."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vadapter.errors import DataError, NonFiniteError
from vadapter.recipe.schema import StageConfig
from vadapter.train.metric_writer import MetricWriter

MAX_SKIPPED = 3  # updates in a row that may be dropped
FEW_BAD = 10  # unusable samples that never stop a run, and that are reported one by one


class Monitor:
    """The metrics of one attempt at a stage.

    The metrics of a step are read while the next one runs, so that the devices never wait for the
    host; `flush` reads them at once. A row of metrics.jsonl covers the steps since the row before:
    it counts dropped updates and unusable samples, which are acted upon at every step, and has the
    means of everything else over the other updates, including the step time (without compilation
    and evaluation). Single batches say little, because images and clips alternate.

    Args:
      writer, name, config: of the stage.
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
        values["lr"] = float(self._rates[step - 1])
        values["step_ms"] = 1000 * (now - self._clock) / self._steps
        if self._compile_s:
            values["compile_s"] = self._compile_s
        self._new_line(now)
        self._writer.write(step, values)
