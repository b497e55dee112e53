"""Device memory: how much there is, and errors that say what to do when it is used up."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from vadapter.console import size
from vadapter.errors import ConfigError


def limit(mesh: jax.sharding.Mesh) -> int | None:
    """Return the bytes that programs may use on a device of this host; None if unknown."""
    reports = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((stats["bytes_limit"] for stats in reports if "bytes_limit" in stats), default=None)


def require_room(where: str, sizes: dict[str, int], limit: int | None) -> None:
    """Refuse parameters and optimizer state that do not fit on a device.

    Args:
      where: the stage, for the message.
      sizes: name -> bytes on each device.
      limit: bytes that programs may use; None if unknown.

    Raises:
      ConfigError: the sum is above the limit.
    """
    if limit is None or (total := sum(sizes.values())) <= limit:
        return
    parts = ", ".join(f"{what} {size(used)}" for what, used in sizes.items())
    raise ConfigError(
        f"{where}: {size(total)} are needed on each device without activations ({parts}), "
        f"but {_device()} has {size(limit)} for programs. {advice()}"
    )


@contextlib.contextmanager
def memory_errors(where: Callable[[], str]) -> Iterator[None]:
    """Turn out-of-memory errors of devices into user errors: a restart would fail again.

    Args:
      where: returns what was being done.

    Raises:
      ConfigError: says how to find what fits.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise ConfigError(f"{where()}: {described(error)}") from error


def exhausted(error: BaseException) -> bool:
    """Return whether a device ran out of memory, while compiling or running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def described(error: BaseException) -> str:
    """Return a message: what happened, and what to do."""
    line = str(error).strip().splitlines()[0].rstrip(".")
    return f"{_device()} is out of memory ({line}). {advice()}"


def advice() -> str:
    """Return how to find a setting that fits on the present devices."""
    from vadapter.distributed.topology import here

    return (
        f"`vadapter plan --config=… --topology={here() or '…'}` finds a setting that fits: a "
        "smaller batch, more accumulate, components.NAME.remat=full, a larger mesh.fsdp"
    )


def _device() -> str:
    return jax.devices()[0].device_kind
