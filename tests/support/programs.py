"""Stages of a small recipe as programs on meshes of fake devices."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
from support.recipes import tiny_recipe

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.recipe.schema import read, resized
from vadapter.stages.stage import Stage

ROWS = 16
MESHES = {
    "data": MeshConfig(data=8),
    "fsdp": MeshConfig(data=1, fsdp=8),
    "all": MeshConfig(data=2, fsdp=2, tensor=2),
    "tensor": MeshConfig(data=1, fsdp=1, tensor=4),
    "slices": MeshConfig(data=4, fsdp=2, slices=2),
}


@functools.cache
def recipe():
    """Two layers and four heads of everything, so that `tensor` and the stacks have work."""
    config: Any = tiny_recipe(Path("nowhere"))
    config.components.mlp = {"kind": "mlp", "hidden_dim": 32, "width": 0, "frames": 8}
    config.stages.llava = {**config.stages.perceiver, "chain": ("mlp",)}
    config.stages.llava.start = {"llm": "llm", "encoder": "vision"}
    for spec in config.components.values():
        spec.update({key: 2 * spec[key] for key in ("depth", "heads") if key in spec})
    config.components.perceiver.layers = 6
    config.components.llm.update(width=32, mlp_dim=64, kv_heads=2)
    return read(config)


def program(stage, mesh=None, accumulate=1, everything=None):
    """A stage on a mesh, or on one device."""
    everything = everything or recipe()
    config = dataclasses.replace(everything.stages[stage], accumulate=accumulate)
    stages = {**everything.stages, stage: config}
    if mesh is None:
        grid = make_mesh(MeshConfig(), jax.devices()[:1])
    else:
        grid = make_mesh(MESHES[mesh], jax.devices()[: 4 if mesh == "tensor" else 8])
    sized = resized(dataclasses.replace(everything, stages=stages), stage, batch=ROWS)
    return Stage(sized, stage, grid)
