"""One writer a directory: a lock that the kernel releases however its process ends.

In a bucket, where no kernel helps, see `lease`.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from vadapter.errors import ConfigError
from vadapter.io import buckets, storage

log = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process, or refuses; creates it where it is missing.

    Two runs in one directory would both report successful saves and lose them. In a run of several
    hosts the first one takes the lock. `flock` locks belong to the open file, so a second lock in
    the same process is refused too, and no stale lock outlives a `kill -9`. The file `.lock` stays
    behind: it says who held the lock, whether it is held only the kernel knows.

    Raises:
      ConfigError: another run holds the lock, or the directory cannot be written.
    """
    directory = storage.as_path(directory)
    path = directory / ".lock"
    if storage.remote(directory):
        from vadapter.io.gcs_lock import lease

        with lease(path):
            yield
        return
    with _refuse_unwritable(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+") as file:
        try:
            _flock(file.fileno(), wait=False)
        except BlockingIOError:
            raise ConfigError(
                f"{directory} is in use by another run: {_holder(path)}. "
                "Stop that run, or choose another directory."
            ) from None
        probe(directory)
        with _refuse_unwritable(directory):
            file.truncate()
            me = {"host": socket.gethostname(), "pid": os.getpid(), "started": _now()}
            file.write(json.dumps(me) + "\n")
            file.flush()
        yield


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Holds the lock file `path`, after waiting for whoever holds it: for short, shared writes."""
    if storage.remote(path):
        from vadapter.io.gcs_lock import lease

        with lease(path, wait=True):
            yield
        return
    with open(path, "a") as file:
        _flock(file.fileno(), wait=True)
        yield


def _flock(descriptor: int, *, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError as e:  # some network file systems have no locks
        log.warning("no file locks here (%s): make sure that only one run writes", e.strerror)


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"process {who['pid']} on {who['host']}, started {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return f"see {path}"  # it has the lock but has not yet written its name


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")


@contextlib.contextmanager
def _refuse_unwritable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ConfigError(
            f"cannot write {directory}: {e.strerror or e}. "
            "Choose a directory that exists or can be created, on a disk with space left."
        ) from e


def probe(directory: Path) -> None:
    """Writes a page through to the disk: permissions and space are known before compiling.

    Raises:
      ConfigError: it cannot.
    """
    path = directory / f".probe-{socket.gethostname()}-{os.getpid()}"
    if storage.remote(path):
        with buckets.bucket_errors():
            path.write_bytes(bytes(4096))
            path.unlink()
        return
    with _refuse_unwritable(directory):
        try:
            with open(path, "wb") as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
        finally:
            path.unlink(missing_ok=True)
