"""The device mesh, and a table of which logical axes are sharded over which mesh axes.

`W[embed_fsdp, mlp_tensor]` reads: embed is sharded over `fsdp`, mlp over `tensor`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.dtypes import itemsize_bits
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from vadapter.console import size
from vadapter.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# Every logical axis that `vadapter.models` names, and the mesh axes that it is sharded over. The
# dimensions of an array take mesh axes in the order of this table; each mesh axis is taken once.
RULES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor", "fsdp"),  # gather the few inputs of a head, not its weights
    "batch": ("data", "fsdp"),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "embed": ("fsdp", "tensor"),
    "layers": (),
    "norm": (),
}
LARGE = 2**20  # elements of a parameter that counts as large


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis; one may be -1: all that remain.

    `slices` are groups of devices with a fast network within, such as TPU slices. Only `data`
    crosses from one to another: it is a multiple of `slices`.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    slices: int = 1


def axes(shape: Mapping[str, int]) -> str:
    """Return the sizes of a mesh's axes as text."""
    return " ".join(f"{axis}={size}" for axis, size in shape.items())


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """Return the mesh over some devices, by default all of them.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or do not fit the slices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) == 1:
        others = -int(np.prod(shape))
        if others and devices.size % others == 0:
            shape[shape.index(-1)] = devices.size // others
    if int(np.prod(shape)) != devices.size or min(shape) < 1:
        raise ConfigError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{devices.size} devices; the axes must multiply to {devices.size} (one may be -1)"
        )
    # Auto axes: newer JAX would otherwise make them explicit and refuse sharded norms.
    return Mesh(arrange(devices, shape, config.slices), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(devices: np.ndarray, shape: Sequence[int], slices: int) -> np.ndarray:
    """Arrange devices [n] as a mesh of this shape, with slices along its first axis.

    Within a slice, TPUs that are neighbors in the mesh are neighbors in the network. ConfigError if
    the devices are in another number of slices, or `data` is not a multiple of it.
    """
    data, *rest = shape
    present = len({getattr(device, "slice_index", 0) for device in devices})
    if slices < 1 or present not in (1, slices):
        raise ConfigError(
            f"mesh.slices={slices}, but the devices are in {present} slices: set "
            f"mesh.slices={present}"
        )
    if data % slices:
        raise ConfigError(f"mesh.data={data} must be a multiple of mesh.slices={slices}")
    if devices[0].platform != "tpu" or devices.size == 1:
        return devices.reshape(shape)
    from jax.experimental import mesh_utils

    split = {"allow_split_physical_axes": True}
    if present == 1:
        return mesh_utils.create_device_mesh(shape, devices.tolist(), **split)
    local, across = (data // slices, *rest), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(local, across, devices.tolist(), **split)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def filled(rows: int, mesh: Mesh) -> int:
    """Round rows up to a multiple of the devices, so that a batch divides evenly."""
    return -(-rows // mesh.size) * mesh.size


def to_mesh(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays of the rows of all hosts, sharded over the devices."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()
    }


def _identity(x: jax.Array) -> jax.Array:
    return x


def to_host(x: jax.Array) -> np.ndarray:
    """Return a whole global array, on every host; all of them must call it."""
    if not x.is_fully_addressable:
        everywhere = replicated(cast(Any, x.sharding).mesh)
        x = jax.jit(_identity, out_shardings=everywhere)(x).addressable_data(0)
    return np.asarray(x)


def local_rows(x: jax.Array) -> np.ndarray:
    """Return the rows on the devices of this host, of an array sharded as by `to_mesh`."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def shardings_of(tree: Any) -> Any:
    """Return the sharding of every leaf, an array or a shape."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device has in full."""
    return NamedSharding(mesh, PartitionSpec())


def read_sharded(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read: Callable[[Any], np.ndarray]
) -> jax.Array:
    """Return an array of which this host reads the shards of its own devices, each of them once.

    `read` takes the slices of a shard. JAX asks once per device, also where devices hold the same.
    """
    shards: dict[str, np.ndarray] = {}

    def shard(index: Any) -> np.ndarray:
        if (key := str(index)) not in shards:
            shards[key] = read(index)
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, shard)


def partition(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Apply `RULES` to an array whose dimensions have these logical axes.

    A dimension takes each of its mesh axes, in order, by which it is divisible.

    Raises:
      ValueError: an unknown name, or not one name per dimension.
    """
    if unknown := set(names) - {None, *RULES}:
        raise ValueError(f"unknown logical axes {sorted(map(str, unknown))}; RULES has {[*RULES]}")
    if len(names) != len(shape):
        raise ValueError(f"{len(names)} logical axes {tuple(names)} for shape {tuple(shape)}")
    free = {axis: size for axis, size in mesh.shape.items() if size > 1}
    spec: list[Any] = [None] * len(shape)
    for name, axes in RULES.items():
        for dim in (i for i, own in enumerate(names) if own == name):
            taken, left = [], shape[dim]
            for axis in axes:
                if axis in free and left % free[axis] == 0:
                    left //= free.pop(axis)
                    taken.append(axis)
            spec[dim] = tuple(taken) if len(taken) > 1 else (taken or [None])[0]
    return PartitionSpec(*spec)


def poorly_sharded(tree: Any, at_least: int = LARGE) -> list[str]:
    """Return a line for each leaf of `at_least` elements that `fsdp` and `tensor` do not divide.

    Such a leaf, of a vocabulary with an odd size for example, costs every device more memory. More
    rows, or another mesh, fix that. The leaves are arrays or shapes, with shardings.
    """
    lines = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        mesh, name = leaf.sharding.mesh, keystr(path, simple=True, separator="/")
        parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
        shard = math.prod(leaf.sharding.shard_shape(leaf.shape))
        if leaf.size >= at_least and shard * parts > leaf.size:
            lines.append(
                f"{name} {leaf.dtype}{[*leaf.shape]}: {leaf.size // shard} parts instead of "
                f"{parts}, {size(shard * itemsize_bits(leaf.dtype) // 8)} on every device"
            )
    return lines


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation; do nothing if no mesh is active, see `with_mesh`.

    The names are logical axes of its leading dimensions; the others, and None, are not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    names = (*names, *(None,) * (x.ndim - len(names)))
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh))


def platform() -> str:
    """Return the platform that a program is traced for: "cpu", "gpu" or "tpu"."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def with_mesh(mesh: Mesh, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` with this mesh active while it is traced; `fn` itself for a single device.

    On a single TPU it is active too: it tells models what they are compiled for.
    """
    if mesh.size == 1 and mesh.devices.flat[0].platform != "tpu":
        return fn

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args, **kwargs)

    return traced
