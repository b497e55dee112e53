"""One writer a folder of a bucket: an object that one process creates and keeps writing.

Nothing releases such a lock when its holder is killed. So the holder writes it again every `BEAT`
seconds, each time only if nobody else has; whoever finds it unchanged for `STALE` seconds, by its
own clock, takes it over. On the machine of the holder, it is enough that the process is gone.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.errors import USER_ERROR, ConfigError
from vadapter.io import buckets

BEAT = 15.0
STALE = 60.0
_LOOK = 1.0  # seconds between two looks at the lock of another one


@contextlib.contextmanager
def lease(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Holds the object `path`.

    Args:
      wait: for whoever holds it, however long; else refuse as soon as the holder is known to live.

    Raises:
      ConfigError: another process holds it; or the bucket cannot be written.
    """
    buckets.require_bucket(path)
    held = _Held(path)
    with buckets.bucket_errors():
        held.take(wait)
    over = threading.Event()
    thread = threading.Thread(target=held.beat, args=(over,), name="run lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        held.release()


class _Held:
    def __init__(self, path: Path):
        self.path = path
        _, _, bucket, name = str(path).split("/", 3)
        self._bucket, self._name = buckets.client().bucket(bucket), name
        self._me = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(),
                    "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
                    "token": secrets.token_hex(8)}  # fmt: skip
        self._generation = 0  # 0: the object does not exist

    def take(self, wait: bool) -> None:
        """Creates the object, once it is free."""
        seen, since = None, 0.0
        while not self._write():
            who, generation = self._look()
            if generation == 0:
                continue  # just released
            if seen != generation:
                if seen is not None and not wait:
                    raise ConfigError(
                        f"{self.path.parent} is in use by another run: {_name(who)}. Stop that "
                        "run, or choose another directory."
                    )
                if seen is None and not wait and not _gone(who):
                    print(
                        f"vadapter: {self.path} is of {_name(who)}; waiting up to {STALE:.0f} s "
                        f"to see whether it lives (sure that it does not? delete {self.path})",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                seen, since = generation, time.monotonic()
            if _gone(who) or time.monotonic() - since > STALE:
                self._delete(generation)
            else:
                time.sleep(_LOOK)

    def beat(self, over: threading.Event) -> None:
        """Writes the object again and again; ends the process if another one has taken it."""
        while not over.wait(BEAT):
            try:
                if self._write():
                    continue
                who, generation = self._look()
            except Exception as error:  # no network: another try at the next beat
                print(f"vadapter: {self.path}: {error!r:.160}", file=sys.stderr, flush=True)
                continue
            taken = _name(who) if generation else "nobody: it was deleted"
            print(
                f"vadapter: {self.path} was taken over by {taken}, while this run could not write "
                "it; it ends, or both would write there",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            os._exit(USER_ERROR)

    def release(self) -> None:
        """Deletes the object, if it is still ours; if that fails it becomes stale."""
        with contextlib.suppress(Exception):
            self._delete(self._generation)

    def _write(self) -> bool:
        """Writes the object if it is as we left it; False if it is another's."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        blob = self._bucket.blob(self._name)
        try:
            text = json.dumps(self._me | {"beat": time.time()})
            blob.upload_from_string(text, if_generation_match=self._generation)
            self._generation = blob.generation
        except (NotFound, PreconditionFailed):
            who, generation = self._look()
            if who.get("token") != self._me["token"]:
                return False
            self._generation = generation  # written by a request whose answer was lost
        return True

    def _look(self) -> tuple[dict[str, Any], int]:
        """(who holds it, generation); generation 0: nobody."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        while (blob := self._bucket.get_blob(self._name)) is not None:
            with contextlib.suppress(NotFound, PreconditionFailed):  # written again meanwhile
                text = blob.download_as_bytes(if_generation_match=blob.generation)
                return _parse(text), blob.generation
        return {}, 0

    def _delete(self, generation: int) -> None:
        from google.api_core.exceptions import NotFound, PreconditionFailed

        with contextlib.suppress(NotFound, PreconditionFailed):
            self._bucket.blob(self._name).delete(if_generation_match=generation)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _machine() -> str:
    """Of processes that see each other's ids: the machine since it booted, and its container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _gone(who: dict[str, Any]) -> bool:
    """Whether its process ran on this machine and does no more."""
    if not who.get("machine") or who["machine"] != _machine():
        return False
    try:
        os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, KeyError, ValueError):
        pass
    return False


def _name(who: dict[str, Any]) -> str:
    known = [who.get(key, "?") for key in ("pid", "host", "started")]
    return "process {} on {}, started {}".format(*known)
