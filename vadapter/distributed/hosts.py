"""Several processes as one job: how they start, and what they tell each other.

A launcher sets for each process, one a host or several on one host,
  VADAPTER_COORDINATOR  host:port of process 0, which listens there
  VADAPTER_PROCESSES    how many there are
  VADAPTER_PROCESS      which one this is, from 0
or, where JAX knows the cluster (TPU pods, GKE, SLURM, Open MPI), VADAPTER_DISTRIBUTED=auto. Without
either nothing is started. VADAPTER_DEADLINE (300) is how many seconds a host is waited for.

What hosts tell each other goes as JSON through the key-value store of JAX's coordinator and not
over the devices, where nothing has a deadline and nobody knows who is missing. JAX's client of that
store and its search for a cluster are private: only this file knows them.
"""

import contextlib
import faulthandler
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed

from vadapter.config import differences
from vadapter.console import truncate
from vadapter.distributed.startup import answer, call
from vadapter.errors import ConfigError, HostError, UserError

T = TypeVar("T")

_COORDINATOR = ("VADAPTER_COORDINATOR", "VADAPTER_PROCESSES", "VADAPTER_PROCESS")
WORK = 12  # times the deadline: how long the others wait while one host works
_numbers = itertools.count()


def deadline() -> float:
    """Seconds that a host is waited for.

    Raises:
      ConfigError: the variable holds no number above 0.
    """
    return seconds("VADAPTER_DEADLINE", 300.0, least=1.0)


def seconds(variable: str, default: float, least: float = 0.0) -> float:
    """An environment variable that holds seconds.

    Raises:
      ConfigError: it holds something else.
    """
    text = os.environ.get(variable) or str(default)
    with contextlib.suppress(ValueError):
        if float(text) >= least:
            return float(text)
    raise ConfigError(f"{variable}={text!r}: must be seconds, {least:g} or more")


# -- start -------------------------------------------------------------------------------------


def start() -> None:
    """Joins the other processes of the job, if the environment speaks of any.

    Comes before anything that touches a device.

    Raises:
      ConfigError: variables that make no sense.
      HostError: a host that did not come, by its number.
    """
    told = [name for name in _COORDINATOR if os.environ.get(name)]
    mode = os.environ.get("VADAPTER_DISTRIBUTED", "")
    if mode not in ("", "auto"):
        raise ConfigError(f"VADAPTER_DISTRIBUTED={mode!r}: auto, or not set")
    if told and len(told) < len(_COORDINATOR):
        raise ConfigError(f"{', '.join(told)} without {', '.join({*_COORDINATOR} - {*told})}")
    # Signals are the loop's (`train.interrupts`): JAX's own notice fires at one step number only,
    # and not at all beside a Python handler.
    jax.config.update("jax_enable_preemption_service", False)
    if told or mode:
        faulthandler.enable()  # JAX aborts a process whose peers are gone: it says where it was
    if told:
        _start_explicit()
    elif mode:
        _start_detected()


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
            f"{host!r}: must be host:port, a number above 0, and one below that"
        ) from None
    _join(address, n, i)


def _start_detected() -> None:
    def late() -> None:
        _end(
            f"no cluster, or not all of its hosts, within {deadline():g} s; look at the logs of "
            "the others"
        )

    alarm = threading.Timer(deadline(), late)
    alarm.daemon = True
    alarm.start()
    try:
        found = _detect()
        if found is None:
            _initialize()  # JAX looks, and waits, itself: it names nobody
            return
    except ValueError as error:
        raise _no_cluster(f" ({error})") from None
    finally:
        alarm.cancel()
    *job, devices = found
    if None in job:
        raise _no_cluster()
    _join(*job, local_device_ids=devices)


def _detect() -> Any:
    """(address, processes, index, devices), None for what JAX does not find; None: it changed."""
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
        f"VADAPTER_DISTRIBUTED=auto: JAX finds no cluster here{why}; set "
        f"{', '.join(_COORDINATOR)}, or none of them for a single process"
    )


def _join(address: str, n: int, i: int, **settings: Any) -> None:
    """Starts JAX's service once all are there: it would end without a word of who is missing."""
    name, _, port = address.rpartition(":")
    local = name in ("127.0.0.1", "localhost")
    if n > 1:
        if i == 0:
            call("127.0.0.1" if local else "", int(port), n, deadline())
        else:
            answer(name, int(port), n, i, deadline())
    _initialize(
        coordinator_address=address,
        num_processes=n,
        process_id=i,
        coordinator_bind_address=address if local else None,  # nobody else needs to reach it
        cluster_detection_method="deactivate",
        **settings,
    )


def _initialize(**settings: Any) -> None:
    limit = int(deadline())
    jax.distributed.initialize(
        initialization_timeout=limit + 30,  # others speak up before it does
        heartbeat_timeout_seconds=max(10, min(100, limit // 3)),
        shutdown_timeout_seconds=limit,
        **settings,
    )


def _end(text: str) -> None:
    os.write(2, f"vadapter: {text}\n".encode())
    os._exit(HostError.exit_code)


# -- who is there ------------------------------------------------------------------------------


def count() -> int:
    """How many processes the job has; 1 unless JAX's distributed service was started."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def index() -> int:
    """Which of them this is."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def first() -> bool:
    """Whether this is process 0, which writes all that is text."""
    return index() == 0


def _client() -> Any:
    return distributed.global_state.client


# -- what they tell each other -----------------------------------------------------------------


def exchange(value: Any, what: str, *, patience: float = 1) -> list[Any]:
    """A JSON value of every host, in order; all hosts make the same calls in the same order.

    Args:
      value: of this host.
      what: what is being done, for messages; the same everywhere.
      patience: times the deadline.

    Raises:
      HostError: a host that did not come in time, or that was doing something else.
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
        missing = [i for i in range(count()) if i not in _values(folder)]
        raise HostError(
            f"{hosts_of(missing)} of {count()} did not come within {wait:g} s: {what}. Look at the "
            "log there; VADAPTER_DEADLINE says how long hosts wait for each other"
        ) from None
    told = _values(folder)
    if first() and number:  # nobody reads what was told before
        client.key_value_delete(f"vadapter/{number - 1}/")
    doing = {i: told[i][0] for i in range(count())}
    if len(set(doing.values())) > 1:
        lines = "".join(f"\n  host {i}: {text}" for i, text in doing.items())
        raise HostError(f"the hosts do different things, which is a mistake in vadapter:{lines}")
    return [told[i][1] for i in range(count())]


def _values(folder: str) -> dict[int, Any]:
    found = _client().key_value_dir_get(f"{folder}/")
    return {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}


def hosts_of(numbers: list[int]) -> str:
    """`host 2`, or `hosts 2, 3`."""
    return f"host{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def of_first(value: T, what: str) -> T:
    """The first host's JSON value, on every host."""
    return exchange(value if first() else None, what)[0]


def in_turn(make: Callable[[], T], what: str) -> T:
    """What the first host makes, for which the others wait: they then find its files.

    Raises:
      UserError: of `make`; where it failed on the first host, on all.
    """
    if count() == 1:
        return make()
    made, error = None, None
    if first():
        try:
            made = make()
        except UserError as failed:
            error = failed
    failure = exchange(str(error or ""), what, patience=WORK)[0]
    if error is not None:
        raise error
    if failure:
        raise ConfigError(f"host 0: {failure}")
    return made if first() else make()  # type: ignore[return-value]


def require_same(facts: Mapping[str, Any], what: str) -> None:
    """Refuses hosts that would run different programs, which no collective would notice.

    Args:
      facts: nested dicts of JSON values.

    Raises:
      ConfigError: on all hosts; it names the keys that differ, and their values.
    """
    told = exchange(dict(facts), what)
    rows = [
        f"host {i}: {key} = {here}, host 0: {there}"
        for i, other in enumerate(told)
        for key, there, here in differences(told[0], other)
    ]
    if rows:
        raise ConfigError(
            f"the hosts differ in {what}:\n  "
            + "\n  ".join(truncate(rows))
            + "\nStart all of them with the same command, program and data."
        )


# -- what a host leaves behind -----------------------------------------------------------------


def report_end(record: Mapping[str, Any]) -> None:
    """Tells the others that, and how, this process ends."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another host was first: that stays
        _client().key_value_set("cause/0", json.dumps([index(), dict(record)]))
    _client().key_value_set(f"ended/{index()}", "true", allow_overwrite=True)


def first_to_end() -> tuple[int, dict[str, Any]] | None:
    """The host whose report came first, and its record; None while all go on.

    The coordinator keeps the order: the clocks of machines differ.

    Raises:
      JaxRuntimeError: the coordinator is gone.
    """
    found = _values("cause")
    return tuple(found[0]) if found else None


def all_end() -> bool:
    """Whether every host has reported its end."""
    return len(_values("ended")) == count()


@contextlib.contextmanager
def if_connected() -> Iterator[None]:
    """What the coordinator cannot be told any more is left untold."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        yield
