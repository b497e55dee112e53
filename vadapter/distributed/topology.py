"""Accelerators that need not be present: a table of chips, names of topologies, and their devices.

`v5e:4x4` is a slice of TPU v5e with 4 × 4 chips, `2*v5e:4x4` two of them, `h100:8` eight GPUs.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from vadapter.errors import ConfigError

GIB = 2**30
SPARE = 8  # CPU devices to reserve, as a multiple of those needed: larger topologies are tried next


@dataclasses.dataclass(frozen=True)
class Chip:
    """A generation of accelerators.

    Programs may use `hbm` bytes: of TPUs, up to the compiler's limit; of GPUs, that is the whole
    memory, of which JAX takes 3/4 (XLA_PYTHON_CLIENT_MEM_FRACTION).
    """

    kind: str  # tpu | gpu | cpu
    peak: float  # FLOP/s of bfloat16 products
    hbm: float
    device_kinds: tuple[str, ...]  # its names in JAX; of GPUs, how they begin
    per_host: int = 4  # chips of a host
    clock: float = 0.0  # Hz of the compiler's cycles; 0: it estimates none
    bandwidth: float = 0.0  # bytes/s of the memory; of TPUs
    shapes: Mapping[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # by chips
    cores: int = 1  # of a chip; the number in an accelerator type (`v5p-128`) counts them
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # so a chip is one device

    def fills_hosts(self, chips: int) -> bool:
        """Return whether the chips are part of one host, or all chips of several."""
        return chips <= self.per_host or chips % self.per_host == 0


def _by_size(*shapes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {math.prod(shape): shape for shape in shapes}


_FLAT = _by_size((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = _by_size((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8),
                  (8, 8, 8), (8, 8, 16), (8, 16, 16))  # fmt: skip
# TPUs: peak, bandwidth, shapes and chips of a host from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e};
# memory from compiling a program that needs 400 GiB (libtpu 0.0.42); clock: peak over the products
# of a cycle, 8 MXUs of 128 × 128 in v4 and v5p, 4 in v5e, 4 of 256 × 256 in v6e.
# GPUs: nvidia.com data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense; memory: nvidia-smi.
# A CPU device is a core: measured rate (BUILD_NOTES, "Plan"), and the memory that clouds provide.
CHIPS: dict[str, Chip] = {
    "v4": Chip("tpu", 275e12, 30.75 * GIB, ("TPU v4",), clock=1.05e9, bandwidth=1228e9,
               shapes=_CUBES, cores=2, options={"chip_config_name": "megacore"}),
    "v5e": Chip("tpu", 197e12, 15.75 * GIB, ("TPU v5 lite", "TPU v5e"), clock=1.5e9,
                bandwidth=819e9, shapes=_FLAT),
    "v5p": Chip("tpu", 459e12, 95.74 * GIB, ("TPU v5p", "TPU v5"), clock=1.75e9,
                bandwidth=2765e9, shapes=_CUBES, cores=2),
    "v6e": Chip("tpu", 918e12, 31.25 * GIB, ("TPU v6 lite", "TPU v6e"), clock=1.75e9,
                bandwidth=1640e9, shapes=_FLAT),
    "a100": Chip("gpu", 312e12, 79.2 * GIB, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"), 8),
    "h100": Chip("gpu", 989e12, 79.2 * GIB, ("NVIDIA H100",), 8),
    "h200": Chip("gpu", 989e12, 139.8 * GIB, ("NVIDIA H200",), 8),
    "cpu": Chip("cpu", 6e10, 4 * GIB, ("cpu",), 64),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
# Without these, libtpu looks for the metadata server of a TPU VM, and writes logs.
LIBTPU_VARIABLES = {
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "2",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a chip (a key of `CHIPS`), each of this shape, with a slower network between."""

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def row(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        return self.slices * -(-math.prod(self.shape) // self.row.per_host)

    def __str__(self) -> str:
        many = f"{self.slices}*" if self.slices > 1 else ""
        return f"{many}{self.chip}:{'x'.join(map(str, self.shape))}"


def parse(name: str) -> Topology:
    """Return the topology of a name: `v5e:4x4`, `2*v5e:4x4`, `h100:8`, or the type `v5p-128`.

    Accelerator types count chips of v5e and v6e, and cores of v4 and v5p: two per chip.

    Raises:
      ConfigError: there is no such topology; the message has the nearest ones.
    """

    def invalid(problem: str) -> ConfigError:
        return ConfigError(f"topology {name!r}: {problem}")

    match = re.fullmatch(r"(?:(\d+)[*x])?([a-z]\w*?)([:-])([\dx]+)", name.strip().lower())
    if not match:
        raise invalid("write v5e:4x4, 2*v5e:4x4, v5p-128 or h100:8")
    slices, chip, separator, size = int(match[1] or 1), _chip(match[2]), match[3], match[4]
    if chip not in CHIPS:
        raise invalid(f"unknown chip {chip!r}; known: {', '.join(CHIPS)}")
    row = CHIPS[chip]
    dims: tuple[int, ...] = tuple(int(n) for n in size.split("x") if n)
    if slices < 1 or not dims or min(dims) < 1:
        raise invalid("a number in it is below 1")
    if row.kind != "tpu":
        if len(dims) > 1 or slices > 1 or not row.fills_hosts(math.prod(dims)):
            limit = row.per_host
            raise invalid(f"{chip}:N with N up to {limit}, or whole hosts of {limit}")
        return Topology(chip, dims)
    if separator == "-" and len(dims) > 1:
        raise invalid(f"{chip}-N is a count; a shape is {chip}:{size}")
    unit = row.cores if separator == "-" else 1
    chips, rest = divmod(math.prod(dims), unit)
    shape = row.shapes.get(chips)
    if shape is None or rest or (separator == ":" and shape != dims):
        raise invalid(f"there is none; nearest: {_nearest(chip, math.prod(dims) / unit)}")
    return Topology(chip, shape, slices)


def _chip(name: str) -> str:
    name = name.strip().lower()
    return ALIASES.get(name, name)


def _nearest(chip: str, chips: float) -> str:
    """Return the three slices whose sizes are nearest, under both of their names."""
    row = CHIPS[chip]
    sizes = sorted(row.shapes, key=lambda n: abs(math.log(n / max(chips, 0.5))))[:3]
    unit = "chips" if row.cores == 1 else "cores"
    return ", ".join(
        f"{Topology(chip, row.shapes[n])} ({chip}-{n * row.cores}, {n * row.cores} {unit})"
        for n in sorted(sizes)
    )


def smallest(name: str) -> Topology | None:
    """Return the smallest slice of a generation (`v5e`), or one GPU; None for other names."""
    chip = _chip(name)
    if chip not in CHIPS:
        return None
    return Topology(chip, next(iter(CHIPS[chip].shapes.values()), (1,)))


def present() -> str:
    """Return the name of the devices of this job, for `parse` or `smallest`; "": unknown."""
    devices = jax.devices()
    kind, count = devices[0].device_kind, len(devices)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    for name, row in CHIPS.items():
        if row.kind != "tpu" and kind.startswith(row.device_kinds):
            return str(Topology(name, (count,))) if row.fills_hosts(count) else name
        if kind in row.device_kinds:
            shape = row.shapes.get(count // slices)
            return str(Topology(name, shape, slices)) if shape else name
    return ""


def larger(topology: Topology) -> Topology | None:
    """Return the next larger slice, or twice as many GPUs; None if there is none."""
    row, chips = topology.row, math.prod(topology.shape)
    if row.kind != "tpu":
        more = 2 * chips if chips >= row.per_host else min(2 * chips, row.per_host)
        return Topology(topology.chip, (more,))
    size = min((n for n in row.shapes if n > chips), default=None)
    return None if size is None else dataclasses.replace(topology, shape=row.shapes[size])


def devices(topology: Topology) -> np.ndarray:
    """Return devices to compile for: those of a TPU topology, or as many CPU devices of this host.

    Programs for the devices of a TPU topology can be compiled, not run.

    Raises:
      ConfigError: libtpu is not installed, or a process that has computed before has too few CPU
        devices.
    """
    if topology.row.kind != "tpu":
        count = topology.chips
        reserve(SPARE * count)
        available = jax.devices("cpu")
        if len(available) < count:
            raise ConfigError(
                f"{count} devices: this process has {len(available)}; plan in a new one"
            )
        return np.asarray(available[:count])
    require_compiler(topology)
    from jax.experimental import topologies

    options = dict(topology.row.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = str(dataclasses.replace(topology, slices=1))
    return np.asarray(topologies.get_topology_desc(name, platform="tpu", **options).devices)


def require_compiler(topology: Topology) -> None:
    """Set the environment variables of the TPU compiler; ConfigError if it is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology {topology}: its compiler is not installed; pip install 'vadapter[tpu]'"
        )
    for key, value in LIBTPU_VARIABLES.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"v5litepod-{math.prod(topology.shape)}")


def reserve(count: int) -> None:
    """Let JAX have this many CPU devices, if the process has not computed anything yet."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the backend is initialized
            jax.config.update("jax_num_cpu_devices", count)
