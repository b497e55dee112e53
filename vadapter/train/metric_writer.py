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

    The first host writes and prints for all; on the others only `tell` does anything. An existing
    metrics.jsonl is appended to, and `title` is printed before every line.
    """

    def __init__(self, directory: Path, title: str, total: int):
        self._title, self._total = title, total
        self._bar: Progress | None = None
        self._evaluated: set[int] = set()
        self._silent = not hosts.first()
        if self._silent:
            return
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
        self._tensorboard = None if storage.remote(path) else _tensorboard(directory / "tb")
        self._last = 0.0

    def __enter__(self) -> "MetricWriter":
        if not self._silent:
            self._bar = Progress(self._title, self._total)
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._silent:
            return
        if self._bar is not None:
            self._bar.close()
        self._append(b"")
        self.flush()
        if not storage.remote(self._file.name):
            self._file.close()
        self._view(lambda tensorboard: tensorboard.close())

    def write(self, step: int, values: Mapping[str, Any], *, loud: bool = False) -> None:
        """Append a row; print it if `loud`, at the last step, or every ten seconds."""
        if self._silent:
            return
        values = {k: float(v) for k, v in values.items()}
        row = {"step": step, "attempt": self._attempt, "time": round(time.time(), 3), **values}
        self._append(json.dumps(row).encode() + b"\n")
        self._view(lambda tensorboard: tensorboard.add_event(_event(step, values)))
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
        if not self._silent and isinstance(self._file, storage.Uploaded):
            try:
                self._file.flush()
            except OSError as error:
                self._say_later(error)

    def evaluated(self, step: int) -> bool:
        """Return whether an earlier attempt has written scores of that step; on the first host."""
        return step in self._evaluated

    def _append(self, line: bytes) -> None:
        """Write a line after those that did not fit on the disk; a full disk is no error here."""
        waited, self._unwritten = bool(self._unwritten), self._unwritten + line
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                self._say_later(error)

    def _say_later(self, error: OSError) -> None:
        self.say(f"cannot write {self._file.name} ({error.strerror}); trying again later")

    def _view(self, show: Callable[[Any], None]) -> None:
        """Write to TensorBoard; give up on the first error, since these files are only a view."""
        if self._tensorboard is not None:
            try:
                show(self._tensorboard)
            except OSError as error:
                self._tensorboard = None
                self.say(f"cannot write TensorBoard files ({error.strerror}); continuing")

    def tell(self, text: str) -> None:
        """Print a line about this host alone."""
        if self._silent:
            print(f"{self._title}, host {hosts.index()}: {text}", flush=True)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._bar is not None:
            self._bar.say(text)
        elif not self._silent:
            print(f"{self._title}: {text}", flush=True)


def _tensorboard(directory: Path) -> Any:
    """Return a writer of TensorBoard files; None if the extra `tensorboard` is not installed."""
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError:
        return None
    return EventFileWriter(str(directory))


def _event(step: int, values: Mapping[str, float]) -> Any:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    scalars = [Summary.Value(tag=name, simple_value=x) for name, x in values.items()]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=scalars))
