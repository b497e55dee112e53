"""Who is there, before JAX starts: it ends a job that lacks a host without saying which one.

Process 0 listens where JAX's coordinator will, takes every other process's number, and answers all
of them once the last has come or the time is up: a line of JSON each way, {"host", "of"} and
{"error"}, which is empty if JAX can start.
"""

import contextlib
import json
import socket
import time
from typing import Any

from vadapter.errors import ConfigError, HostError

_PAUSE = 0.1  # seconds between two tries to reach process 0
_PATIENCE = 10.0  # seconds for a line from somebody who is connected


def call(name: str, port: int, n: int, limit: float) -> None:
    """Waits, as process 0, until processes 1 to n - 1 have come.

    Args:
      name, port: where to listen; "": at every address.
      limit: seconds.

    Raises:
      ConfigError: nothing can listen there, or the others were started differently.
      HostError: hosts that did not come, by their numbers.
    """
    end, here = time.monotonic() + limit, {}
    with contextlib.ExitStack() as stack:
        both = not name and socket.has_dualstack_ipv6()  # as JAX does
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(
                (name, port), family=family, backlog=n, dualstack_ipv6=both
            )
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen at port {port} ({error.strerror}); choose another one, "
                "in VADAPTER_COORDINATOR, which names the host that process 0 runs on, or, with "
                "VADAPTER_DISTRIBUTED=auto, in JAX_COORDINATOR_PORT"
            ) from None
        stack.enter_context(server)
        told = ""
        while len(here) < n - 1 and not told and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(min(_PATIENCE, limit))
                told = _enter(here, peer, json.loads(_line(peer)), n)
        missing = [i for i in range(1, n) if i not in here]
        late = f"host{'s' * (len(missing) > 1)} {', '.join(map(str, missing))} of {n} did not come "
        late += f"within {limit:g} s"
        error = told or (late if missing else "")
        for peer in here.values():
            with contextlib.suppress(OSError):
                peer.sendall(json.dumps({"error": error}).encode() + b"\n")
                peer.settimeout(_PATIENCE)
                peer.recv(1)  # it closes first, which leaves the port free for JAX
    if error:
        raise (ConfigError if told else HostError)(error)


def _enter(here: dict[int, socket.socket], peer: socket.socket, said: Any, n: int) -> str:
    """Takes down who has come; returns what is wrong with it."""
    if said["of"] != n:
        here.setdefault(-1, peer)
        return f"host {said['host']} was told of {said['of']} processes, host 0 of {n}"
    if said["host"] in here or said["host"] == 0:
        here.setdefault(-1, peer)
        return f"two processes were told that they are number {said['host']}"
    here[said["host"]] = peer
    return ""


def answer(name: str, port: int, n: int, i: int, limit: float) -> None:
    """Tells process 0, as process i of n, that this one is there, and waits for the others.

    Raises:
      ConfigError: the processes were started differently.
      HostError: process 0, or another one, did not come.
    """
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((name, port), timeout=left) as peer:
                peer.sendall(json.dumps({"host": i, "of": n}).encode() + b"\n")
                # Process 0 may have begun to wait later than this one.
                peer.settimeout(limit + _PATIENCE)
                error = json.loads(_line(peer))["error"]
        except (OSError, ValueError):  # not there yet, or something else listens there
            time.sleep(_PAUSE)
            continue
        if error:
            raise (HostError if "did not come" in error else ConfigError)(error)
        return
    raise HostError(f"host 0 of {n} did not come within {limit:g} s: nobody at {name}:{port}")


def _line(peer: socket.socket) -> bytes:
    """Up to the end of the line, at most 1,000 bytes."""
    text = b""
    while not text.endswith(b"\n"):
        part = peer.recv(1000 - len(text))
        if not part:
            raise ValueError("no line")
        text += part
    return text
