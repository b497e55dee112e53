"""The hosts of a run: they agree before anything is compiled, and share one run directory.

Hosts with different configurations would train one model together without an error: the collectives
are the same, only the numbers differ.
"""

import contextlib
import platform
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from vadapter import __version__
from vadapter.config import plain
from vadapter.distributed import hosts
from vadapter.distributed.mesh import axes
from vadapter.errors import ConfigError
from vadapter.io import buckets, storage
from vadapter.io.json_files import is_comparison, is_export, write_json
from vadapter.io.lock import lock, probe
from vadapter.recipe.schema import Recipe

_PATIENCE = 20.0  # seconds until a file that one host wrote is seen by another
_PAUSE = 0.1


@contextlib.contextmanager
def shared_run(recipe: Recipe, workdir: Path) -> Iterator[None]:
    """Hold the lock of the run directory, for all hosts of this run.

    Raises:
      ConfigError: another run holds it, it is an exported adapter, it cannot be written, it is not
        the same directory on all hosts, or they were started with different recipes or versions.
      HostError: a host did not come in time.
    """
    hosts.require_connected()
    devices = [jax.devices()[0].device_kind, jax.device_count()]
    facts = {"recipe": plain(recipe), **_versions(), "devices": devices}
    hosts.require_same(facts, "recipe or versions")
    with buckets.bucket_errors():
        if is_export(workdir):
            raise ConfigError(
                f"--workdir={workdir} is an exported adapter; choose another directory"
            )
        if is_comparison(workdir):
            raise ConfigError(
                f"--workdir={workdir} is a comparison, not a run; choose another directory"
            )
    with lock(workdir / ".lock") if hosts.first() else contextlib.nullcontext():
        if hosts.count() > 1:
            _require_same_directory(workdir)
        yield


def _versions() -> dict[str, str]:
    libraries = {"jax": jax.__version__, "numpy": np.__version__}
    return {"vadapter": __version__, "python": platform.python_version(), **libraries}


def write_record(recipe: Recipe, workdir: Path) -> None:
    """Write the recipe and the environment; call it after the recipe is known to fit the run."""
    if hosts.first():
        devices = [str(device) for device in jax.devices()]
        environment = {"devices": devices, "hosts": hosts.count(), "command": sys.argv}
        write_json(workdir / "config.json", plain(recipe))
        write_json(workdir / "env.json", _versions() | environment)


def _require_same_directory(workdir: Path) -> None:
    """Refuse a directory where the others do not see a file of the first host, or cannot write."""
    note = f".hosts-{secrets.token_hex(8)}"
    if hosts.first():
        (workdir / note).touch()
    note = hosts.of_first(note, "run directory")
    visible = hosts.exchange(_appears(workdir / note), "the same run directory")
    if hosts.first():
        (workdir / note).unlink()
    if not all(visible):
        others = hosts.host_names([i for i, sees in enumerate(visible) if not sees])
        raise ConfigError(
            f"{storage.absolute(workdir)} is not the same directory on {others} as on host 0; "
            "--workdir must be on a file system that all hosts share"
        )
    probe(workdir)


def _appears(path: Path) -> bool:
    """Return whether the file becomes visible; network file systems may take a while."""
    end = time.monotonic() + min(_PATIENCE, hosts.deadline() / 2)
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def require_own_rows(mesh: jax.sharding.Mesh) -> None:
    """Raise ConfigError if two hosts need the same rows of a batch: each reads its own."""
    if hosts.count() == 1:
        return
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    owners = owners.reshape(-1, mesh.shape["tensor"])  # one row: devices with the same rows
    shares = np.bincount(owners[:, 0], minlength=hosts.count())
    if (owners != owners[:, :1]).any() or len(set(shares.tolist())) > 1:
        raise ConfigError(
            f"mesh {axes(mesh.shape)} on {hosts.count()} hosts of {jax.local_device_count()} "
            "devices: mesh.tensor must divide the devices of a host, as every host reads its own "
            "rows; lower it, and raise mesh.fsdp"
        )
