"""Device memory: how much there is, and what to do once it is used up."""

import contextlib
from collections.abc import Callable, Iterator

import jax

from vadapter.console import size
from vadapter.errors import ConfigError


def limit(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes that programs may use on each device of this host; None: the backend does not tell."""
    told = [device.memory_stats() or {} for device in mesh.local_devices]
    return min((stats["bytes_limit"] for stats in told if "bytes_limit" in stats), default=None)


def require_room(where: str, sizes: dict[str, int], limit: int | None) -> None:
    """What stays on a device leaves room there.

    Args:
      where: for the message.
      sizes: what -> bytes of it on each device.
      limit: bytes that programs may use; None: nobody knows.

    Raises:
      ConfigError: it does not.
    """
    if limit is None or (total := sum(sizes.values())) <= limit:
        return
    parts = ", ".join(f"{what} {size(used)}" for what, used in sizes.items())
    raise ConfigError(
        f"{where}: {size(total)} stay on each device, activations not counted ({parts}), "
        f"but {_device()} has {size(limit)} for programs. {advice()}"
    )


@contextlib.contextmanager
def memory_errors(where: Callable[[], str]) -> Iterator[None]:
    """A program for which there is no memory is something to mend: it would fail again.

    Args:
      where: what was being done, once it is asked.

    Raises:
      ConfigError: says what does fit.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not exhausted(error):
            raise
        raise ConfigError(f"{where()}: {described(error)}") from error


def exhausted(error: BaseException) -> bool:
    """The error says that the memory of a device is used up, in compiling or in running."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def described(error: BaseException) -> str:
    """What happened, and what to do."""
    line = str(error).strip().splitlines()[0].rstrip(".")
    return f"{_device()} is out of memory ({line}). {advice()}"


def advice() -> str:
    """How to find what fits on devices as they are here."""
    from vadapter.distributed.topology import here

    return (
        f"`vadapter plan --config=… --topology={here() or '…'}` finds a setting that fits: a "
        "smaller batch, more accumulate, components.NAME.remat=full, a larger mesh.fsdp"
    )


def _device() -> str:
    return jax.devices()[0].device_kind
