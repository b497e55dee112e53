"""Where arrays live: the device mesh, and one table from logical axes to mesh axes.

`W[embed_fsdp, mlp_tensor]` reads: the embed axis is split over `fsdp`, the mlp axis over `tensor`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vadapter.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
# Every logical axis used by `vadapter.models`; an axis that is missing here is an error.
RULES: dict[str, str | None] = {
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "layers": None,
    "norm": None,
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; one of them may be -1: all that remain."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
    """The mesh over all devices, or over those given.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    shape = [config.data, config.fsdp, config.tensor]
    if shape.count(-1) == 1:
        known = -int(np.prod(shape))
        if known and devices.size % known == 0:
            shape[shape.index(-1)] = devices.size // known
    if int(np.prod(shape)) != devices.size or min(shape) < 1:
        raise ConfigError(
            f"mesh data={config.data} fsdp={config.fsdp} tensor={config.tensor} does not cover "
            f"{devices.size} devices; the axes must multiply to {devices.size} (one may be -1)"
        )
    # Auto axes: newer JAX would otherwise make them explicit and refuse sharded norms.
    return Mesh(devices.reshape(shape), AXES, axis_types=(AxisType.Auto,) * 3)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch, over `data` and `fsdp` together."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def to_mesh(batch: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Host rows -> global arrays, rows over all devices."""
    sharding = batch_sharding(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()
    }


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(boxed: Any, mesh: Mesh) -> Any:
    """One sharding per leaf of an abstract parameter tree with logical-axis boxes.

    A dimension that does not divide by its mesh axis stays whole. Leaves without a box are
    replicated.
    """

    def one(leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return replicated(mesh)
        spec = []
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            axis = RULES[name] if name is not None else None
            spec.append(axis if axis is not None and size % mesh.shape[axis] == 0 else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
