"""Runs in this process with less (devices, no model in a step), or with another recipe."""

import jax
import pytest
from support.runs import fake_step

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.recipe.schema import Recipe
from vadapter.stages import run, stage


def use_fake_step(patch: pytest.MonkeyPatch) -> None:
    """Let stages train with `fake_step`."""
    patch.setattr(stage, "make_train_step", fake_step)


def use_devices(patch: pytest.MonkeyPatch, count: int, mesh: MeshConfig | None = None) -> None:
    """Let runs use the first `count` devices alone, arranged as `mesh` or as their recipe says."""

    def make(config: MeshConfig) -> jax.sharding.Mesh:
        return make_mesh(mesh or config, jax.devices()[:count])

    patch.setattr(run, "make_mesh", make)


def with_recipe(loaded: stage.Stage, recipe: Recipe) -> stage.Stage:
    """Return a restored stage with its parameters, as if its run had that recipe."""
    other = stage.Stage(
        recipe, loaded.name, loaded.mesh, workdir=loaded.workdir, tokenizer=loaded.tokenizer
    )
    other.params, other.step, other.digests = dict(loaded.params), loaded.step, loaded.digests
    return other
