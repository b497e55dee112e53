"""What a run says and writes: metrics.jsonl is the truth; the screen and TensorBoard are views.

In a bucket metrics.jsonl is uploaded whole: before each save, with each loud line, every half
minute and at the end. A kill loses the rows since, never those of steps before the newest
checkpoint. There are no TensorBoard files there.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.console import Progress, number
from vadapter.distributed import hosts
from vadapter.io import storage
from vadapter.io.json_files import rows

_UPLOAD_EVERY = 30.0  # seconds


class MetricWriter:
    """Writes one stage's metrics; a progress bar on a terminal, plain lines elsewhere.

    Args:
      directory: of the stage; metrics.jsonl is appended to.
      title: shown in front of every line.
      total: steps of the stage.
    """

    def __init__(self, directory: Path, title: str, total: int):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        before = list(rows(path))
        self._attempt = 1 + max((row.get("attempt", 0) for row in before), default=0)
        self._evaluated = {row["step"] for row in before if any("/" in key for key in row)}
        known = path.read_bytes() if path.is_file() else b""
        if storage.remote(path):
            self._file: Any = storage.Uploaded(path, known)
        else:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._flushed = time.monotonic()
        self._unwritten = b""  # what a full disk did not take yet
        if known and not known.endswith(b"\n"):
            self._append(b"\n")  # a line torn by a kill stays a line of its own
        self._title, self._total = title, total
        self._tensorboard = None if storage.remote(path) else _tensorboard(directory / "tb")
        self._bar: Progress | None = None
        self._last = 0.0

    def __enter__(self) -> "MetricWriter":
        self._bar = Progress(self._title, self._total)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._append(b"")
        self.flush()
        if not storage.remote(self._file.name):
            self._file.close()
        self._view(lambda tensorboard: tensorboard.close())

    def write(self, step: int, values: Mapping[str, Any], *, loud: bool = False) -> None:
        """Appends a row; shows it if `loud`, at the end, or when some seconds have passed."""
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **values}
        self._append(json.dumps(row).encode() + b"\n")
        self._view(lambda tensorboard: tensorboard.add(step, values))
        note = "  ".join(f"{k} {number(v)}" for k, v in values.items())
        if self._bar is not None and self._bar.live:
            self._bar.update(step, note[:80])
        elif not loud and (time.monotonic() - self._last > 10 or step == self._total):
            self._last = time.monotonic()
            self.say(f"step {step}/{self._total}  {note}")
        if loud:
            self.say(f"step {step}/{self._total}  {note}")
        if loud or time.monotonic() - self._flushed > _UPLOAD_EVERY:
            self.flush()

    def flush(self) -> None:
        """Makes what was written outlive the process; on a disk it does already."""
        self._flushed = time.monotonic()
        if not isinstance(self._file, storage.Uploaded):
            return
        try:
            self._file.flush()
        except OSError as error:
            self.say(f"cannot write {self._file.name} ({error.strerror}); trying again later")

    def evaluated(self, step: int) -> bool:
        """Whether an attempt before this one has written scores of that step."""
        return step in self._evaluated

    def _append(self, line: bytes) -> None:
        """Writes what waits and a line. On a full disk both wait; the checkpoints end the run."""
        waited, self._unwritten = bool(self._unwritten), self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                self.say(f"cannot write {self._file.name} ({error.strerror}); trying again later")

    def _view(self, show: Callable[["_TensorBoard"], None]) -> None:
        """TensorBoard files are a view: where they cannot be written, the run goes on without."""
        if self._tensorboard is not None:
            try:
                show(self._tensorboard)
            except OSError as error:
                self._tensorboard = None
                self.say(f"cannot write TensorBoard files ({error.strerror}); going on without")

    def tell(self, text: str) -> None:
        """Prints a line about what this host alone knows."""
        self.say(text)

    def say(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        if self._bar is None:
            print(f"{self._title}: {text}", flush=True)
        else:
            self._bar.say(text)


class SilentWriter(MetricWriter):
    """What the other hosts of several have for a writer: the first one speaks for all."""

    def __init__(self, title: str):
        self._title, self._bar = title, None

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def write(self, step: int, values: Mapping[str, Any], *, loud: bool = False) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Nothing."""

    def evaluated(self, step: int) -> bool:
        """Nobody knows here."""
        return False

    def say(self, text: str) -> None:
        """Nothing."""

    def tell(self, text: str) -> None:
        """Prints a line about what this host alone knows."""
        print(f"{self._title}, host {hosts.index()}: {text}", flush=True)


def open_writer(directory: Path, title: str, total: int) -> MetricWriter:
    """The stage's writer, see `Writer`; on other hosts than the first one that writes nothing."""
    return MetricWriter(directory, title, total) if hosts.first() else SilentWriter(title)


class _TensorBoard:
    def __init__(self, directory: Path):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(directory))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        value = self._summary.Value
        summary = self._summary(value=[value(tag=k, simple_value=v) for k, v in values.items()])
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        self._writer.close()


def _tensorboard(directory: Path) -> _TensorBoard | None:
    try:
        return _TensorBoard(directory)
    except ImportError:  # the extra [tensorboard] is not installed
        return None
