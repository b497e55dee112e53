"""Several processes as one job: start them, and exchange values between them with a deadline.

A launcher sets for each process, of which a host may run one or several,
  VADAPTER_COORDINATOR  host:port of process 0, which listens there
  VADAPTER_PROCESSES    the number of processes
  VADAPTER_PROCESS      the index of this one, from 0
or, where JAX detects the cluster (TPU pods, GKE, SLURM, Open MPI), VADAPTER_DISTRIBUTED=auto.
Without either nothing is started. Hosts wait VADAPTER_DEADLINE (300) seconds for each other.

Values are exchanged as JSON through the key-value store of JAX's coordinator, not over the devices:
a collective has no deadline, and a host that waits in one cannot say which host is missing. The
client of that store and the detection of clusters are private parts of JAX; only `_client` and
`_detect` use them.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

from vadapter.config import differences
from vadapter.console import truncate
from vadapter.errors import ConfigError, HostError, UserError

T = TypeVar("T")

_COORDINATOR = ("VADAPTER_COORDINATOR", "VADAPTER_PROCESSES", "VADAPTER_PROCESS")
SUPPORTED_JAX = "jax>=0.10,<0.13"
WORK = 12  # deadlines that the other hosts wait while one host works
_numbers = itertools.count()  # of exchanges, the same on every host
_joined: tuple[int, int] | None = None  # (index, count) of this process, as `start` joined it


def deadline() -> float:
    """Return VADAPTER_DEADLINE: how many seconds hosts wait for each other."""
    return seconds("VADAPTER_DEADLINE", 300.0, least=1.0)


def seconds(variable: str, default: float, least: float = 0.0) -> float:
    """Return an environment variable in seconds; ConfigError if it is below `least` or invalid."""
    text = os.environ.get(variable) or str(default)
    with contextlib.suppress(ValueError):
        if float(text) >= least:
            return float(text)
    raise ConfigError(f"{variable}={text!r}: must be seconds, {least:g} or more")


# -- start -------------------------------------------------------------------------------------


def start() -> None:
    """Join the other processes, if the environment describes a job, before a device is used.

    Raises:
      ConfigError: invalid variables.
      HostError: a host did not connect in time; the message has its index.
    """
    present = [name for name in _COORDINATOR if os.environ.get(name)]
    mode = os.environ.get("VADAPTER_DISTRIBUTED", "")
    if mode not in ("", "auto"):
        raise ConfigError(f"VADAPTER_DISTRIBUTED={mode!r}: must be auto, or not set")
    if present and len(present) < len(_COORDINATOR):
        missing = [name for name in _COORDINATOR if name not in present]
        raise ConfigError(f"{', '.join(present)} is set without {', '.join(missing)}")
    # `preemption` handles signals: JAX's own service reports a signal at one step number only, and
    # not at all beside a Python handler.
    jax.config.update("jax_enable_preemption_service", False)
    if present or mode:
        faulthandler.enable()  # JAX aborts a process whose peers are gone: print where it was
        (_start_explicit if present else _start_detected)()


def _start_explicit() -> None:
    address, hosts, host = (os.environ[name] for name in _COORDINATOR)
    name, _, port = address.rpartition(":")
    try:
        n, i = int(hosts), int(host)
        if not (name and port.isdecimal() and 0 <= i < n):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"VADAPTER_COORDINATOR={address!r} VADAPTER_PROCESSES={hosts!r} VADAPTER_PROCESS="
            f"{host!r}: must be host:port, a number of processes, and an index below it"
        ) from None
    _join(address, n, i)


def _start_detected() -> None:
    limit = deadline()

    def end() -> None:
        problem = f"no cluster was detected, or not all of its hosts connected, within {limit:g} s"
        os.write(2, f"vadapter: {problem}; see the logs of the other hosts\n".encode())
        os._exit(HostError.exit_code)

    alarm = threading.Timer(limit, end)
    alarm.daemon = True
    alarm.start()
    try:
        cluster = _detect()
        if cluster is None:
            _initialize()  # JAX alone cannot say which host is missing
            return
    except ValueError as error:
        raise _no_cluster(f" ({error})") from None
    finally:
        alarm.cancel()
    *job, devices = cluster
    if None in job:
        raise _no_cluster()
    _join(*job, local_device_ids=devices)


def _detect() -> Any:
    """Return (address, processes, index, devices) as JAX detects them, None for unknown ones.

    Returns None where this version of JAX has no such function: `jax.distributed.initialize` then
    detects the cluster itself.
    """
    try:
        from jax._src.clusters import ClusterEnv

        *job, devices = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=None,
            process_id=None,
            local_device_ids=None,
            cluster_detection_method=None,
            initialization_timeout=int(deadline()),
        )
    except (ImportError, AttributeError, TypeError):
        return None
    return *job, None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else devices  # JAX reads it


def _no_cluster(why: str = "") -> ConfigError:
    return ConfigError(
        f"VADAPTER_DISTRIBUTED=auto: JAX detects no cluster here{why}; set "
        f"{', '.join(_COORDINATOR)}, or none of them for a single process"
    )


def _join(address: str, n: int, i: int, **settings: Any) -> None:
    """Start JAX's service once all hosts have checked in: it does not say which one is missing."""
    global _joined
    name, _, port = address.rpartition(":")
    local = name in ("127.0.0.1", "localhost")
    if n > 1:
        from vadapter.distributed import startup  # only several hosts need it

        if i == 0:
            startup.gather("127.0.0.1" if local else "", int(port), n, deadline())
        else:
            startup.check_in(name, int(port), n, i, deadline())
    _initialize(
        coordinator_address=address,
        num_processes=n,
        process_id=i,
        coordinator_bind_address=address if local else None,  # no other machine needs to reach it
        cluster_detection_method="deactivate",
        **settings,
    )
    _joined = (i, n)


def _initialize(**settings: Any) -> None:
    limit = int(deadline())
    jax.distributed.initialize(
        initialization_timeout=limit + 30,  # our own message comes first
        heartbeat_timeout_seconds=max(10, min(100, limit // 3)),
        shutdown_timeout_seconds=limit,
        **settings,
    )


# -- identity ----------------------------------------------------------------------------------


def count() -> int:
    """Return the number of processes of the job; 1 unless JAX's distributed service is running."""
    return _identity()[1]


def index() -> int:
    """Return the index of this process."""
    return _identity()[0]


def first() -> bool:
    """Return whether this is process 0, the only one that writes text."""
    return index() == 0


def _identity() -> tuple[int, int]:
    """Return (index, count) without a device, unless the program connected the hosts itself."""
    if not jax.distributed.is_initialized():
        return 0, 1
    return _joined or (jax.process_index(), jax.process_count())


def require_connected() -> None:
    """Raise ConfigError if JAX sees hosts that this module cannot exchange values with."""
    if jax.process_count() != count():
        raise ConfigError(
            f"JAX sees {jax.process_count()} hosts, but they are not connected: set "
            "VADAPTER_DISTRIBUTED=auto on all of them"
        )


def _client() -> Any:
    """Return JAX's client of the coordinator's key-value store; ConfigError if it has none."""
    try:
        from jax._src.distributed import global_state

        client: Any = global_state.client
        _ = client.key_value_set, client.key_value_dir_get, client.wait_at_barrier
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"JAX {jax.__version__} has no key-value store that vadapter can use on several hosts "
            f"({error}); pip install '{SUPPORTED_JAX}'"
        ) from None
    return client


# -- exchange ----------------------------------------------------------------------------------


def exchange(value: Any, what: str, *, patience: float = 1) -> list[Any]:
    """Return the JSON values of all hosts, which must make the same calls in the same order.

    Args:
      value: of this host.
      what: name of the exchange in messages; the same on every host.
      patience: number of deadlines to wait.

    Raises:
      HostError: a host did not come in time, or called with another `what`.
    """
    if count() == 1:
        return [value]
    client, number = _client(), next(_numbers)
    folder, wait = f"vadapter/{number}", deadline() * patience
    client.key_value_set(f"{folder}/{index()}", json.dumps([what, value]))
    try:
        client.wait_at_barrier(folder, int(1000 * wait))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        present = _values(folder)
        missing = [i for i in range(count()) if i not in present]
        raise HostError(
            f"{host_names(missing)} of {count()} did not come within {wait:g} s: {what}. See the "
            "log there; VADAPTER_DEADLINE sets how long hosts wait for each other"
        ) from None
    values = _values(folder)
    if first() and number:  # every host has read the values of the exchange before
        client.key_value_delete(f"vadapter/{number - 1}/")
    tasks = {i: values[i][0] for i in range(count())}
    if len(set(tasks.values())) > 1:
        lines = "".join(f"\n  host {i}: {text}" for i, text in tasks.items())
        raise HostError(f"the hosts do different things, which is a bug in vadapter:{lines}")
    return [values[i][1] for i in range(count())]


def _values(folder: str) -> dict[int, Any]:
    pairs = _client().key_value_dir_get(f"{folder}/")
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in pairs}


def host_names(indices: list[int]) -> str:
    """Return `host 2`, or `hosts 2, 3`."""
    return f"host{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"


def of_first(value: T, what: str, *, patience: float = 1) -> T:
    """Return the JSON value of the first host, on every host; see `exchange`."""
    return exchange(value if first() else None, what, patience=patience)[0]


def in_turn(make: Callable[[], T], what: str) -> T:
    """Call `make` on the first host, then on the others, which read the files it has written.

    Raises:
      UserError: from `make`; if it fails on the first host, on all of them.
    """
    if count() == 1:
        return make()
    result, error = None, None
    if first():
        try:
            result = make()
        except UserError as raised:
            error = raised
    failure = of_first(str(error or ""), what, patience=WORK)
    if error:
        raise error
    if failure:
        raise ConfigError(f"host 0: {failure}")
    return result if first() else make()  # type: ignore[return-value]


def require_same(facts: Mapping[str, Any], what: str) -> None:
    """Refuse hosts that would run different programs, which no collective would notice.

    The facts are nested dicts of JSON values, and `what` is their name in messages.

    Raises:
      ConfigError: on all hosts, with the keys that differ, and their values.
    """
    values = exchange(dict(facts), what)
    rows = [
        f"host {i}: {key} = {own}, host 0: {first_value}"
        for i, other in enumerate(values)
        for key, first_value, own in differences(values[0], other)
    ]
    if rows:
        raise ConfigError(
            f"the hosts differ in {what}:\n  "
            + "\n  ".join(truncate(rows))
            + "\nStart all of them with the same command, program and data."
        )


# -- end ---------------------------------------------------------------------------------------


def report_end(code: int, reason: str) -> None:
    """Report to the other hosts that this process ends, with which exit code, and why."""
    reason = f"host {index()} of {count()} stopped: {reason}"
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host has reported before
        _client().key_value_set("cause/0", json.dumps([code, reason]))
    _client().key_value_set(f"ended/{index()}", "true", allow_overwrite=True)


def first_to_end() -> tuple[int, str] | None:
    """Return exit code and reason of the first host to end, as the coordinator saw it.

    Returns None if none has; raises JaxRuntimeError if the coordinator is gone.
    """
    reports = _values("cause")
    return tuple(reports[0]) if reports else None


def all_end() -> bool:
    """Return whether every host has reported its end."""
    return len(_values("ended")) == count()
