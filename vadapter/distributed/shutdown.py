"""End a job of several processes: all of them soon, and with the same exit code.

JAX's own shutdown waits for hosts that will never come, and then every process dies of a signal,
whatever the reason was. So a process that fails reports the reason to the coordinator and exits at
once; the others look for such a report every second and exit with the same code. Process 0 exits
last, because the coordinator runs in it. If the reason is unknown (code 1), each process prints the
stacks of all its threads.
"""

import contextlib
import faulthandler
import os
import sys
import threading
import time

import jax

from vadapter.console import note
from vadapter.distributed import hosts, watchdog
from vadapter.errors import HostError

_EVERY = 1.0  # seconds between two looks for a report
_GRACE = 3.0  # seconds for this process to raise by itself what another host has reported
_LINGER = 10.0  # seconds that process 0 waits for the others to exit

_IGNORE_LOST_COORDINATOR = contextlib.suppress(jax.errors.JaxRuntimeError)
_exiting = threading.Lock()  # acquired once, by the thread that ends this process
_over = threading.Event()
_looking = threading.Lock()  # held while reports are asked for, which JAX's client must outlive


def follow() -> None:
    """Start a thread that ends this process when another host fails, even during a step."""
    if hosts.count() > 1:
        _over.clear()
        threading.Thread(target=_follow, name="reports of other hosts", daemon=True).start()


def _follow() -> None:
    with _IGNORE_LOST_COORDINATOR:  # then JAX ends this process
        while not _over.wait(_EVERY):
            with _looking:
                report = None if _over.is_set() else hosts.first_to_end()
            if report:
                if not _over.wait(_GRACE):
                    _exit(*report)
                return


def end_job(code: int, reason: str = "") -> int:
    """End a job with the exit code of this process, see `vadapter.errors`.

    Returns the code if it is 0 or the process is the only one; otherwise the process exits, after
    it has reported the reason to the other hosts.
    """
    watchdog.disarm()
    if hosts.count() == 1:
        return code
    if code:
        _exit(code, reason, quiet=True)
    try:
        hosts.exchange("", "the end", patience=hosts.WORK)
    except (HostError, jax.errors.JaxRuntimeError) as error:
        _exit(HostError.exit_code, str(error))
    with _looking:
        _over.set()
    watchdog.exit_within(hosts.deadline() + _LINGER)
    jax.distributed.shutdown()
    watchdog.disarm()
    return code


def cause(error: BaseException) -> tuple[int, str] | None:
    """Return exit code and reason of the host whose failure broke a collective; None if none has.

    The error of the collective itself does not say why.
    """
    if hosts.count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    end = time.monotonic() + _GRACE
    with _IGNORE_LOST_COORDINATOR:
        while time.monotonic() < end:
            if report := hosts.first_to_end():
                return report
            time.sleep(_EVERY / 10)
    return None


def _exit(code: int, reason: str, *, quiet: bool = False) -> None:
    if not _exiting.acquire(blocking=False):
        time.sleep(_LINGER + hosts.deadline())  # another thread is ending this process
    if code == HostError.exit_code:
        sys.stderr.flush()
        faulthandler.dump_traceback(file=2)  # sys.stderr may have been replaced
    if not quiet:
        note(reason)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    watchdog.exit_within(_LINGER + _GRACE)
    with _IGNORE_LOST_COORDINATOR:
        hosts.report_end(code, reason)
        end = time.monotonic() + _LINGER
        while hosts.first() and time.monotonic() < end and not hosts.all_end():
            time.sleep(_EVERY / 10)
    os._exit(code or HostError.exit_code)
