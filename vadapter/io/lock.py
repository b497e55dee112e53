"""Lock files: one process at a time writes a directory.

On a disk the kernel holds the lock (`flock`) and releases it however the process ends. For buckets,
where nothing does that, see `gcs_lock`.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from vadapter.errors import ConfigError
from vadapter.io import buckets, storage

log = logging.getLogger(__name__)


def lock(path: Path, *, wait: bool = False) -> AbstractContextManager[None]:
    """Hold the lock file `path` within the context; create its directory if it is missing.

    Two runs in one directory would both report successful saves and lose them. On several hosts the
    first one takes the lock for all. A second lock in the same process is refused too. On a disk
    the file stays afterwards and names the last holder. With `wait`, for short writes of shared
    files, another holder is waited for, however long; otherwise a lock in use is refused, and the
    directory is checked to be writable.

    Raises:
      ConfigError: another process holds the lock, or the directory cannot be written.
    """
    path = storage.as_path(path)
    if not storage.remote(path):
        return _hold_file(path, wait)
    from vadapter.io.gcs_lock import hold_object

    return hold_object(path, wait)


def probe(directory: Path) -> None:
    """Write a page through to the disk, so that missing permissions or space show up early.

    Raises:
      ConfigError: the directory cannot be written.
    """
    path = directory / f".probe-{socket.gethostname()}-{os.getpid()}"
    if storage.remote(path):
        with buckets.bucket_errors():
            path.write_bytes(bytes(4096))
            path.unlink()
        return
    with _write_errors(directory):
        try:
            with open(path, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _write_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"cannot write {directory}: {e.strerror or e}. "
            "Choose a directory that exists or can be created, on a disk with space left."
        ) from e


@contextlib.contextmanager
def _hold_file(path: Path, wait: bool) -> Iterator[None]:
    with _write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+")
    with file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = parse_holder(path.read_bytes())  # empty until the holder has written its name
            raise in_use(path, holder_name(holder) if holder else f"see {path}") from None
        except OSError as e:  # some network file systems have no locks
            log.warning("no file locks here (%s): make sure that only one run writes", e.strerror)
        if not wait:
            probe(path.parent)
            with _write_errors(path.parent):
                file.truncate()
                file.write(json.dumps(this_process()) + "\n")
                file.flush()
        yield


# -- what a lock records of its holder, in a file and in a bucket alike -------------------------


def this_process() -> dict[str, Any]:
    """Return what a lock file records of its holder."""
    started = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": started}


def parse_holder(text: bytes) -> dict[str, Any]:
    """Return the record in a lock file; {} if it is empty or unreadable."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def holder_name(holder: dict[str, Any]) -> str:
    """Return what messages call the holder of a lock."""
    values = [holder.get(key, "?") for key in ("pid", "host", "started")]
    return "process {} on {}, started {}".format(*values)


def in_use(path: Path, holder: str) -> ConfigError:
    """Return the error for a lock file that another process holds."""
    return ConfigError(
        f"{path.parent} is in use by another run: {holder}. "
        "Stop that run, or choose another directory."
    )
