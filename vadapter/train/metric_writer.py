"""Write the metrics of a stage: metrics.jsonl is the record, screen and TensorBoard show it.

In a bucket the whole of metrics.jsonl is uploaded before each save, with each evaluation, every
half minute and at the end. A kill loses the rows since then, never those of steps before the
newest checkpoint. There are no TensorBoard files in buckets.
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
    """The metrics of one stage; a progress bar on a terminal, plain lines elsewhere.

    Args:
      directory: of the stage; metrics.jsonl is appended to.
      title: shown before every line.
      total: number of steps of the stage.
    """

    def __init__(self, directory: Path, title: str, total: int):
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        before = list(rows(path))
        self._attempt = 1 + max((row.get("attempt", 0) for row in before), default=0)
        self._evaluated = {row["step"] for row in before if any("/" in key for key in row)}
        content = path.read_bytes() if path.is_file() else b""
        if storage.remote(path):
            self._file: Any = storage.Uploaded(path, content)
        else:
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed in __exit__
        self._flushed = time.monotonic()
        self._unwritten = b""  # bytes that did not fit on the disk yet
        if content and not content.endswith(b"\n"):
            self._append(b"\n")  # end the line that a kill has torn
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
        """Append a row; print it if `loud`, at the last step, or every ten seconds."""
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
        """Upload the file if it is in a bucket, so that its rows survive a kill."""
        self._flushed = time.monotonic()
        if not isinstance(self._file, storage.Uploaded):
            return
        try:
            self._file.flush()
        except OSError as error:
            self.say(f"cannot write {self._file.name} ({error.strerror}); trying again later")

    def evaluated(self, step: int) -> bool:
        """Return whether an earlier attempt has written evaluation scores of that step."""
        return step in self._evaluated

    def _append(self, line: bytes) -> None:
        """Write a line after those that did not fit on the disk ; a full disk is no error here."""
        waited, self._unwritten = bool(self._unwritten), self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                self.say(f"cannot write {self._file.name} ({error.strerror}); trying again later")

    def _view(self, show: Callable[["_TensorBoard"], None]) -> None:
        """Write to TensorBoard; give up on the first error, since these files are only a view."""
        if self._tensorboard is not None:
            try:
                show(self._tensorboard)
            except OSError as error:
                self._tensorboard = None
                self.say(f"cannot write TensorBoard files ({error.strerror}); continuing")

    def tell(self, text: str) -> None:
        """Print a line about this host alone."""
        self.say(text)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is None:
            print(f"{self._title}: {text}", flush=True)
        else:
            self._bar.say(text)


class SilentWriter(MetricWriter):
    """The writer of all hosts but the first, which writes and prints for all of them."""

    def __init__(self, title: str):
        self._title, self._bar = title, None

    def __enter__(self) -> "SilentWriter":
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def write(self, step: int, values: Mapping[str, Any], *, loud: bool = False) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def evaluated(self, step: int) -> bool:
        """Return False: only the first host knows, and it is asked."""
        return False

    def say(self, text: str) -> None:
        """Do nothing."""

    def tell(self, text: str) -> None:
        """Print a line about this host alone."""
        print(f"{self._title}, host {hosts.index()}: {text}", flush=True)


def open_writer(directory: Path, title: str, total: int) -> MetricWriter:
    """Return the writer of a stage; on all hosts but the first it writes nothing."""
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
