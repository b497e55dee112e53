"""Check that every host is there before JAX starts, which would not say which one is missing.

Process 0 listens at the address of JAX's coordinator, receives the index of every other process,
and replies to all of them once the last has connected or the time is over. Each message is a line
of JSON: {"host", "of"} to process 0, {"error"} back, empty if JAX can start.
"""

import contextlib
import json
import socket
import time
from typing import Any

from vadapter.distributed import hosts
from vadapter.errors import ConfigError, HostError

_PAUSE = 0.1  # seconds between two attempts to reach process 0
_PATIENCE = 10.0  # seconds for a line from a peer that is connected


def gather(name: str, port: int, n: int, limit: float) -> None:
    """Wait, as process 0, until processes 1 to n - 1 have connected; at most `limit` seconds.

    It listens at this address; name "": at every address.

    Raises:
      ConfigError: the port is taken, or the processes were started with different numbers.
      HostError: processes that did not connect; the message has their indices.
    """
    end, peers = time.monotonic() + limit, dict[int, socket.socket]()
    with contextlib.ExitStack() as stack:
        both = not name and socket.has_dualstack_ipv6()  # as JAX does
        family = socket.AF_INET6 if both else socket.AF_INET
        try:
            server = socket.create_server(
                (name, port), family=family, backlog=n, dualstack_ipv6=both
            )
        except OSError as error:
            raise ConfigError(
                f"process 0 cannot listen on port {port} ({error.strerror}); choose another one in "
                "VADAPTER_COORDINATOR, which has the address of process 0's host, or in "
                "JAX_COORDINATOR_PORT with VADAPTER_DISTRIBUTED=auto"
            ) from None
        stack.enter_context(server)
        mismatch = ""
        while len(peers) < n - 1 and not mismatch and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(min(_PATIENCE, limit))
                message = _receive(peer)
                host, of = message["host"], message["of"]
                if of != n:
                    mismatch = f"host {host} was started with {of} processes, host 0 with {n}"
                elif host == 0 or host in peers:
                    mismatch = f"two processes were started with index {host}"
                peers[-1 if mismatch else host] = peer
        missing = [i for i in range(1, n) if i not in peers]
        error = mismatch
        if missing and not mismatch:
            error = f"{hosts.host_names(missing)} of {n} did not come within {limit:g} s"
        for peer in peers.values():
            with contextlib.suppress(OSError):
                _send(peer, {"error": error})
                peer.settimeout(_PATIENCE)
                peer.recv(1)  # it closes first, which leaves the port free for JAX
    if error:
        raise (ConfigError if mismatch else HostError)(error)


def check_in(name: str, port: int, n: int, i: int, limit: float) -> None:
    """Report to process 0 as process i of n, and wait until all have done so; see `gather`."""
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        try:
            with socket.create_connection((name, port), timeout=left) as peer:
                _send(peer, {"host": i, "of": n})
                # Process 0 may have begun to wait later than this one.
                peer.settimeout(limit + _PATIENCE)
                error = _receive(peer)["error"]
        except (OSError, ValueError):  # not listening yet, or something else listens there
            time.sleep(_PAUSE)
            continue
        if error:
            raise (HostError if "did not come" in error else ConfigError)(error)
        return
    address = f"{name}:{port}"
    raise HostError(f"host 0 of {n} did not come within {limit:g} s: nothing listens at {address}")


def _send(peer: socket.socket, message: dict[str, Any]) -> None:
    peer.sendall(json.dumps(message).encode() + b"\n")


def _receive(peer: socket.socket) -> Any:
    """Return the next message, of at most 1,000 bytes; ValueError if it is none."""
    with peer.makefile("rb") as file:
        return json.loads(file.readline(1000))
