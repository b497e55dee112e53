"""How a job of several processes ends: all of them, with one exit code, and soon.

JAX's own way out waits for hosts that will never come, and then every process dies of a signal,
whatever was wrong. So a process that ends early tells the others why and goes at once; they look
for such news once a second, and follow with the same code. Process 0 goes last: it holds the news.
Where nobody can say what to mend (code 1), each prints where all of its threads are.
"""

import faulthandler
import os
import sys
import threading
import time

import jax

from vadapter.distributed import hosts, watchdog
from vadapter.errors import HostError

_EVERY = 1.0  # seconds between two looks at the news
_GRACE = 3.0  # seconds to find by oneself what another host has found
_LINGER = 10.0  # seconds that process 0 waits for the others to follow

_leaving = threading.Lock()  # taken once, by whoever ends this process
_over = threading.Event()


def follow() -> None:
    """From now on this process ends when another one does, even while it waits for a device."""
    if hosts.count() > 1:
        _over.clear()
        threading.Thread(target=_follow, name="news of other hosts", daemon=True).start()


def _follow() -> None:
    try:
        while not _over.wait(_EVERY):
            if of_another := _news():
                if not _over.wait(_GRACE):
                    _go(*of_another)
                return
    except jax.errors.JaxRuntimeError:
        return  # the coordinator is gone: JAX ends this process


def _news() -> tuple[int, str] | None:
    """Exit code and reason of the host that was the first to end; None while all go on."""
    if not (first := hosts.first_to_end()):
        return None
    i, record = first
    return record["code"], f"host {i} of {hosts.count()} stopped: {record['reason']}"


def end_job(code: int, reason: str = "") -> int:
    """Ends a job of several processes; in a single one, and in success, it returns the code.

    Args:
      code: the exit code, see `vadapter.errors`.
      reason: for the other hosts.
    """
    watchdog.off()
    if hosts.count() == 1:
        return code
    if code:
        _go(code, reason, quiet=True)
    try:
        hosts.exchange("", "the end", patience=hosts.WORK)
    except (HostError, jax.errors.JaxRuntimeError) as error:
        _go(HostError.exit_code, str(error))
    _over.set()
    watchdog.hurry(hosts.deadline() + _LINGER)
    jax.distributed.shutdown()
    watchdog.off()
    return code


def cause(error: BaseException) -> tuple[int, str] | None:
    """Exit code and reason of the host that broke a collective; None if it was not another host."""
    if hosts.count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    end = time.monotonic() + _GRACE
    with hosts.if_connected():
        while time.monotonic() < end:
            if of_another := _news():
                return of_another
            time.sleep(_EVERY / 10)
    return None


def _go(code: int, reason: str, *, quiet: bool = False) -> None:
    if not _leaving.acquire(blocking=False):
        time.sleep(_LINGER + hosts.deadline())  # another thread is ending this process
    if code == HostError.exit_code:
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)  # whatever sys.stderr is by then
    if not quiet:
        print(f"vadapter: {reason}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    watchdog.hurry(_LINGER + _GRACE)
    with hosts.if_connected():
        hosts.report_end({"code": code, "reason": reason})
        end = time.monotonic() + _LINGER
        while hosts.first() and time.monotonic() < end and not hosts.all_end():
            time.sleep(_EVERY / 10)
    os._exit(code or HostError.exit_code)
