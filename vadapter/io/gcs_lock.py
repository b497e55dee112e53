"""Lock objects in buckets, which no kernel releases when their holder is killed.

The holder creates the object and writes it again every `BEAT` seconds, but only if nobody else
has. A process that sees it unchanged for `STALE` seconds, by its own clock, takes it over; on the
holder's machine it is enough that the process is gone.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.console import note
from vadapter.errors import USER_ERROR
from vadapter.io import buckets
from vadapter.io.lock import holder_name, in_use, parse_holder, this_process

BEAT = 15.0
STALE = 60.0
_POLL = 1.0  # seconds between two looks at the lock of another process


@contextlib.contextmanager
def hold_object(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock object `path`, see `lock.lock`."""
    buckets.require_bucket(path)
    held = _LockObject(path)
    with buckets.bucket_errors():
        held.acquire(wait)
    over = threading.Event()
    thread = threading.Thread(target=held.keep, args=(over,), name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(Exception):  # of the network: the object becomes stale
            held.delete()


class _LockObject:
    """A lock object; its generation changes with each write, which requests can require."""

    def __init__(self, path: Path):
        self.path = path
        _, _, bucket, self._name = str(path).split("/", 3)
        self._bucket = buckets.client().bucket(bucket)
        self._me = this_process() | {"machine": machine(), "token": secrets.token_hex(8)}
        self._generation = 0  # 0: the object does not exist

    def acquire(self, wait: bool) -> None:
        """Create the object as soon as no living process holds it."""
        seen, since = None, 0.0
        while not self._write():
            holder, generation = self._read()
            if generation == 0:
                continue  # just released
            gone = _is_gone(holder)
            if seen != generation:
                if seen is not None and not wait:
                    raise in_use(self.path, holder_name(holder))
                if seen is None and not wait and not gone:
                    note(
                        f"{self.path} is held by {holder_name(holder)}; waiting up to "
                        f"{STALE:.0f} s to see whether it is alive (if you know that it is not, "
                        f"delete {self.path})"
                    )
                seen, since = generation, time.monotonic()
            if gone or time.monotonic() - since > STALE:
                self.delete(generation)
            else:
                time.sleep(_POLL)

    def keep(self, over: threading.Event) -> None:
        """Write the object every `BEAT` seconds; end the process if another one has taken it."""
        while not over.wait(BEAT):
            try:
                if self._write():
                    continue
                holder, generation = self._read()
            except Exception as error:  # no network: try again at the next beat
                note(f"{self.path}: {error!r:.160}")
                continue
            taken = f"was taken over by {holder_name(holder)}" if generation else "was deleted"
            note(
                f"{self.path} {taken} while this run could not write it; this run ends, because "
                "both would write to the same directory"
            )
            os._exit(USER_ERROR)

    def _write(self) -> bool:
        """Write the object if it is as we left it; return False if another process holds it."""
        blob = self._bucket.blob(self._name)
        text = json.dumps(self._me | {"beat": time.time()})
        with _changed_meanwhile():
            blob.upload_from_string(text, if_generation_match=self._generation)
            self._generation = blob.generation
            return True
        holder, generation = self._read()
        if holder.get("token") != self._me["token"]:
            return False
        self._generation = generation  # our own write, whose reply was lost
        return True

    def _read(self) -> tuple[dict[str, Any], int]:
        """Return (holder, generation); generation 0: there is no object."""
        while (blob := self._bucket.get_blob(self._name)) is not None:
            with _changed_meanwhile():
                text = blob.download_as_bytes(if_generation_match=blob.generation)
                return parse_holder(text), blob.generation
        return {}, 0

    def delete(self, generation: int | None = None) -> None:
        """Delete the object if it is of that generation, by default of that which we wrote."""
        with _changed_meanwhile():
            self._bucket.blob(self._name).delete(if_generation_match=generation or self._generation)


def _changed_meanwhile() -> contextlib.suppress:
    """Ignore that a request did not find the object, or the generation that it requires."""
    from google.api_core.exceptions import NotFound, PreconditionFailed

    return contextlib.suppress(NotFound, PreconditionFailed)


def machine() -> str:
    """Return the same text in all processes that see each other's ids: boot and PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_gone(holder: dict[str, Any]) -> bool:
    """Return whether the holder ran on this machine and has ended."""
    if not holder.get("machine") or holder["machine"] != machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        pass
    return False
