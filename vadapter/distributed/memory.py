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


def require_room(stage: str, sizes: dict[str, int], limit: int | None) -> None:
    """Raise ConfigError if the bytes per device of a stage's arrays, by name, exceed the limit."""
    if limit is None or (total := sum(sizes.values())) <= limit:
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in sizes.items())
    raise ConfigError(
        f"{stage}: {size(total)} are needed on each device without activations ({parts}), "
        f"but {_device()} has {size(limit)} for programs. {_advice()}"
    )


@contextlib.contextmanager
def memory_errors(activity: Callable[[], str]) -> Iterator[None]:
    """Turn out-of-memory errors of devices into ConfigError, since a restart would fail again.

    The message begins with what `activity` returns, and says how to find a setting that fits.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise ConfigError(f"{activity()}: {described(error)}") from error


def exhausted(error: BaseException) -> bool:
    """Return whether a device ran out of memory, while compiling or running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def described(error: BaseException) -> str:
    """Return a message: what happened, and what to do."""
    line = str(error).strip().splitlines()[0].rstrip(".")
    return f"{_device()} is out of memory ({line}). {_advice()}"


def _advice() -> str:
    from vadapter.distributed.topology import present  # training does not need it

    return (
        f"`vadapter plan --config=… --topology={present() or '…'}` finds a setting that fits: a "
        "smaller batch, more accumulate, components.NAME.remat=full, a larger mesh.fsdp"
    )


def _device() -> str:
    return jax.devices()[0].device_kind
