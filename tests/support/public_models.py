"""Small random checkpoints in the layout of public ones, written without their libraries."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors.numpy import save_file

from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint, Report
from vadapter.weights.safetensors import TensorFiles


@dataclasses.dataclass(frozen=True)
class Counting(TensorFiles):
    """Tensor files that record every read: name and number of elements."""

    reads: list[tuple[str, int]] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, files: TensorFiles) -> "Counting":
        return cls(files.path, files.tensors, files.files)

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        out = super().read(name, index)
        self.reads.append((name, out.size))
        return out

    def blocks(self, name: str, index: tuple[slice, ...], size: int) -> Iterator[np.ndarray]:
        count = 0
        for block in super().blocks(name, index, size):
            count += block.size
            yield block
        self.reads.append((name, count))


def write_model(
    folder: Path,
    config: dict[str, Any],
    prefix: str = "",
    spoil: Callable[[dict], Any] = lambda tensors: None,
    **more: Any,
) -> Path:
    """Write config.json and model.safetensors; files that are there already stay.

    Args:
      config: of the model, `model_type` among its keys.
      prefix: in front of every tensor's name.
      spoil: changes the tensors before they are written.
      more: further tensors, by their names.
    """
    family = FAMILIES[config["model_type"]]
    spec = family.spec(config)
    module = make_module("model", spec)
    size = spec.get("image_size", 0)
    example = np.zeros((1, 1, size, size, 3)) if size else jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), example)
    rng, tensors = np.random.default_rng(0), {k: np.asarray(v, np.float32) for k, v in more.items()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])[0]:
        source = family.names(spec)[0].source("/".join(k.key for k in path), leaf.shape)
        assert source is not None
        for name in source.names:
            draw = rng.standard_normal(source.expected) * 0.2
            tensors[prefix + name] = (draw + (path[-1].key == "scale")).astype(np.float32)
    spoil(tensors)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_checkpoint(checkpoint: Checkpoint, abstract: Any, dtype: Any = None) -> tuple[Any, Report]:
    """The tree of arrays of a checkpoint, and how its tensors match."""
    leaves = dict(checkpoint.leaves(abstract, dtype))
    return traverse_util.unflatten_dict(leaves, sep="/"), checkpoint.match(abstract)
