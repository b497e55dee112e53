"""What runs in the tests' own process do with less: fewer devices, a step without a model."""

import jax
import pytest
from support.runs import fake_step

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.stages import run, stage


def use_fake_step(patch: pytest.MonkeyPatch) -> None:
    """Let stages train with `fake_step`."""
    patch.setattr(stage, "make_train_step", fake_step)


def use_devices(patch: pytest.MonkeyPatch, count: int, mesh: MeshConfig | None = None) -> None:
    """Let runs use the first `count` devices alone, arranged as `mesh` or as their recipe says."""

    def make(config: MeshConfig) -> jax.sharding.Mesh:
        return make_mesh(mesh or config, jax.devices()[:count])

    patch.setattr(run, "make_mesh", make)
