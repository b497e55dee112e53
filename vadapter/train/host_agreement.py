"""What the hosts of a run must have in common, found before anything is compiled.

Hosts with different configurations would train one model together without a word: the same
collectives, with other numbers in them.
"""

import contextlib
import platform
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from vadapter import __version__
from vadapter.config import plain
from vadapter.distributed import hosts
from vadapter.errors import ConfigError
from vadapter.io import storage
from vadapter.io.lock import probe, run_lock
from vadapter.recipe.schema import Recipe

_PATIENCE = 20.0  # seconds until a file that one host wrote is seen by another
_PAUSE = 0.1


@contextlib.contextmanager
def shared_run(recipe: Recipe, workdir: Path) -> Iterator[None]:
    """Holds the run directory for this run, on whatever hosts it has; the first takes the lock.

    Raises:
      ConfigError: another run holds it, it cannot be written, it is not the same directory on all
        hosts, or they were started with different recipes or versions.
      HostError: a host that does not come.
    """
    _require_started()
    facts = {"recipe": plain(recipe), "vadapter": __version__, "jax": jax.__version__,
             "numpy": np.__version__, "python": platform.python_version(),
             "devices": [jax.devices()[0].device_kind, jax.device_count()]}  # fmt: skip
    hosts.require_same(facts, "recipe or versions")
    with run_lock(workdir) if hosts.first() else contextlib.nullcontext():
        if hosts.count() > 1:
            _require_same_directory(workdir)
        yield


def _require_started() -> None:
    if jax.process_count() != hosts.count():
        raise ConfigError(
            f"JAX sees {jax.process_count()} hosts, but nothing has connected them: set "
            "VADAPTER_DISTRIBUTED=auto on all of them"
        )


def _require_same_directory(workdir: Path) -> None:
    """The first host leaves a note there, which the others find; all of them can write."""
    note = f".hosts-{secrets.token_hex(8)}"
    if hosts.first():
        (workdir / note).touch()
    note = hosts.of_first(note, "run directory")
    found = hosts.exchange(_appears(workdir / note), "the same run directory")
    if hosts.first():
        (workdir / note).unlink()
    if not all(found):
        others = hosts.hosts_of([i for i, there in enumerate(found) if not there])
        raise ConfigError(
            f"{storage.absolute(workdir)} is not the same directory on {others} as on host 0; "
            "--workdir must be on a file system that all hosts share"
        )
    probe(workdir)


def _appears(path: Path) -> bool:
    """Network file systems may take a while."""
    end = time.monotonic() + min(_PATIENCE, hosts.deadline() / 2)
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def require_own_rows(mesh: jax.sharding.Mesh) -> None:
    """Every host has devices for as many rows of a batch, and for those alone.

    Raises:
      ConfigError: the mesh has the same rows on devices of several hosts.
    """
    if hosts.count() == 1:
        return
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.shape["tensor"])  # a line: devices that have the same rows
    shares = np.bincount(owners[:, 0], minlength=hosts.count())
    if (owners != owners[:, :1]).any() or len(set(shares.tolist())) > 1:
        raise ConfigError(
            f"mesh {dict(mesh.shape)} on {hosts.count()} hosts of {jax.local_device_count()} "
            "devices: mesh.tensor must divide the devices of a host, since every host reads rows "
            "of its own; lower it, and raise mesh.fsdp"
        )
