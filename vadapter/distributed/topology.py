"""Accelerators that are not here: what they can do, how they are named, and meshes of them.

`v5e:4x4` is a slice of TPU v5e with 4 × 4 chips, `2*v5e:4x4` two of them, `h100:8` eight GPUs.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np

from vadapter.errors import ConfigError

GIB = 2**30
SPARE = 8  # times as many CPU devices are asked for, so that larger topologies can be tried


@dataclasses.dataclass(frozen=True)
class Chip:
    """A row of the table of chips.

    Attributes:
      kind: tpu | gpu | cpu.
      peak: FLOP/s of bfloat16 products.
      hbm: bytes that programs may use: of TPUs, what the compiler says when a program needs more;
        of GPUs, the whole card, of which jax takes 3/4 (XLA_PYTHON_CLIENT_MEM_FRACTION).
      bandwidth: bytes/s from and to that memory.
      clock: Hz of the compiler's cycles; 0 where it does not estimate any.
      per_host: chips of a host.
      shapes: of the slices that there are, `{chips: shape}`; of GPUs none: whole hosts.
      cores: a slice's accelerator type (`v5p-128`) counts so many for a chip.
      options: of `get_topology_desc`, so that a chip is one device.
      kinds: what JAX calls it; of GPUs, how that begins.
    """

    kind: str
    peak: float
    hbm: float
    bandwidth: float
    clock: float = 0.0
    per_host: int = 4
    shapes: dict[int, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    cores: int = 1
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[str, ...] = ()


def _by_size(*shapes: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {math.prod(shape): shape for shape in shapes}


_FLAT = _by_size((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8),
          (8, 8, 16), (8, 16, 16))  # fmt: skip
# TPUs: peak, bandwidth, shapes and chips of a host from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e};
# memory from compiling a program that needs 400 GiB (libtpu 0.0.42); clock: peak over the products
# of a cycle, 8 MXUs of 128 × 128 in v4 and v5p, 4 in v5e, 4 of 256 × 256 in v6e.
# GPUs: nvidia.com data sheets of A100 80GB SXM, H100 SXM and H200 SXM, dense; memory: nvidia-smi.
# A CPU device is a core: its rate is measured (BUILD_NOTES, "Plan"), its memory what clouds give.
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        "tpu", 275e12, 30.75 * GIB, 1228e9, 1.05e9, 4, _by_size(*_CUBES), 2,
        {"chip_config_name": "megacore"}, ("TPU v4",),
    ),
    "v5e": Chip(
        "tpu", 197e12, 15.75 * GIB, 819e9, 1.5e9, 4, _FLAT, kinds=("TPU v5 lite", "TPU v5e")
    ),
    "v5p": Chip(
        "tpu", 459e12, 95.74 * GIB, 2765e9, 1.75e9, 4, _by_size(*_CUBES), 2,
        kinds=("TPU v5p", "TPU v5"),
    ),
    "v6e": Chip(
        "tpu", 918e12, 31.25 * GIB, 1640e9, 1.75e9, 4, _FLAT, kinds=("TPU v6 lite", "TPU v6e")
    ),
    "a100": Chip(
        "gpu", 312e12, 79.2 * GIB, 2039e9, per_host=8,
        kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
    ),
    "h100": Chip("gpu", 989e12, 79.2 * GIB, 3350e9, per_host=8, kinds=("NVIDIA H100",)),
    "h200": Chip("gpu", 989e12, 139.8 * GIB, 4800e9, per_host=8, kinds=("NVIDIA H200",)),
    "cpu": Chip("cpu", 6e10, 4 * GIB, 1e10, per_host=64, kinds=("cpu",)),
}  # fmt: skip
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
# libtpu looks for a TPU VM's metadata server and writes logs: not for a topology that is not there.
QUIET = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips of one generation.

    Attributes:
      chip: a key of `CHIPS`.
      shape: of a slice, in chips.
      slices: as many of them, with a slower network between.
    """

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
    """The topology of a name: `v5e:4x4`, `2*v5e:4x4`, `h100:8`, or an accelerator type, `v5p-128`.

    Accelerator types count chips of v5e and v6e, and cores of v4 and v5p: two a chip.

    Raises:
      ConfigError: no such topology; names the nearest ones.
    """
    found = re.fullmatch(r"(?:(\d+)[*x])?([a-z]\w*?)([:-])([\dx]+)", name.strip().lower())
    if not found:
        raise ConfigError(f"topology {name!r}: write v5e:4x4, 2*v5e:4x4, v5p-128 or h100:8")
    slices, chip, sign, size = int(found[1] or 1), _chip(found[2]), found[3], found[4]
    if chip not in CHIPS:
        near = difflib.get_close_matches(chip, CHIPS, 3, 0.4) or CHIPS
        raise ConfigError(f"topology {name!r}: no chip {chip!r}; there are {', '.join(near)}")
    row, dims = CHIPS[chip], tuple(int(n) for n in size.split("x") if n)
    if slices < 1 or not dims or min(dims) < 1:
        raise ConfigError(f"topology {name!r}: a number in it is below 1")
    if row.kind != "tpu":
        whole = len(dims) == 1 and (dims[0] <= row.per_host or dims[0] % row.per_host == 0)
        if not whole or slices > 1:
            raise ConfigError(
                f"topology {name!r}: {chip}:N with N up to {row.per_host}, or whole hosts of "
                f"{row.per_host}"
            )
        return Topology(chip, dims)
    if sign == "-":
        if len(dims) != 1:
            raise ConfigError(f"topology {name!r}: {chip}-N is a count; a shape is {chip}:{size}")
        shape = row.shapes.get(dims[0] // row.cores) if dims[0] % row.cores == 0 else None
        wanted = dims[0] / row.cores
    else:
        shape, wanted = row.shapes.get(math.prod(dims)), math.prod(dims)
        shape = shape if shape == dims else None
    if shape is None:
        raise ConfigError(f"topology {name!r}: there is none; nearest: {_nearest(chip, wanted)}")
    return Topology(chip, shape, slices)


def _chip(name: str) -> str:
    """A generation's key in `CHIPS`, if there is one by that name."""
    name = name.strip().lower()
    return ALIASES.get(name, name)


def _nearest(chip: str, wanted: float) -> str:
    """The three slices that come nearest in chips, under both of their names."""
    row = CHIPS[chip]
    sizes = sorted(row.shapes, key=lambda n: abs(math.log(n / max(wanted, 0.5))))[:3]
    unit = "chips" if row.cores == 1 else "cores"
    return ", ".join(
        f"{Topology(chip, row.shapes[n])} ({chip}-{n * row.cores}, {n * row.cores} {unit})"
        for n in sorted(sizes)
    )


def smallest(name: str) -> Topology | None:
    """The smallest slice, or one GPU, of a generation named alone (`v5e`); None of other names."""
    chip = _chip(name)
    if chip not in CHIPS:
        return None
    return Topology(chip, next(iter(CHIPS[chip].shapes.values()), (1,)))


def here() -> str:
    """What the devices that are here are called, as `parse` and `smallest` read it; "": unknown."""
    there = jax.devices()
    kind = there[0].device_kind
    slices = len({getattr(device, "slice_index", 0) for device in there})
    for name, row in CHIPS.items():
        if row.kind != "tpu" and kind.startswith(row.kinds):
            whole = len(there) <= row.per_host or len(there) % row.per_host == 0
            return str(Topology(name, (len(there),))) if whole else name
        if kind in row.kinds:
            shape = row.shapes.get(len(there) // slices)
            return str(Topology(name, shape, slices)) if shape else name
    return ""


def larger(topology: Topology) -> Topology | None:
    """The next larger slice, or twice as many GPUs; None if there is none."""
    row, chips = topology.row, math.prod(topology.shape)
    if row.kind != "tpu":
        more = 2 * chips if chips >= row.per_host else min(2 * chips, row.per_host)
        return Topology(topology.chip, (more,))
    sizes = [n for n in sorted(row.shapes) if n > chips]
    if not sizes:
        return None
    return dataclasses.replace(topology, shape=row.shapes[sizes[0]])


def devices(topology: Topology) -> np.ndarray:
    """Devices to compile for: those of the topology, or as many of this host's CPU.

    Programs for the devices of a TPU topology can be compiled, not run.

    Raises:
      ConfigError: a TPU topology without libtpu, or more CPU devices than a process that has
        computed before can have.
    """
    if topology.row.kind != "tpu":
        return _of_cpu(topology.chips)
    require_compiler(topology)
    from jax.experimental import topologies

    options = dict(topology.row.options)
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    one = dataclasses.replace(topology, slices=1)
    made = topologies.get_topology_desc(str(one), platform="tpu", **options)
    return np.asarray(made.devices)


def require_compiler(topology: Topology) -> None:
    """Sets the environment of the TPU compiler.

    Raises:
      ConfigError: it is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology {topology}: its compiler is not installed; pip install 'vadapter[tpu]'"
        )
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"v5litepod-{math.prod(topology.shape)}")


def reserve(count: int) -> None:
    """So many devices of this host's CPU, if the process has not computed anything yet."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the backend is there
            jax.config.update("jax_num_cpu_devices", count)


def _of_cpu(count: int) -> np.ndarray:
    """So many devices of this host's CPU: at first it may be asked for any number."""
    reserve(SPARE * count)
    there = jax.devices("cpu")
    if len(there) < count:
        raise ConfigError(f"{count} devices: this process has {len(there)}; plan in a new one")
    return np.asarray(there[:count])
