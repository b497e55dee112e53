"""A stage of a recipe with random parameters and a batch, without data and compilation.

Legend: N visual tokens a frame, D encoder width.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benches.fake_batch import fake_batch
from vadapter import config
from vadapter.data.batch import Batch
from vadapter.distributed.mesh import make_mesh
from vadapter.recipe.schema import Recipe, read, resized
from vadapter.stages.stage import Stage

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """A stage of a recipe.

    Attributes:
      recipe: its path, in the repository or absolute, with arguments as in `FILE.py:ARGS`.
      stage: its name.
      features: (N, D) of the visual tokens that take the place of frames, as from a cache; the
        encoder is then left out.
    """

    recipe: str
    stage: str
    features: tuple[int, int] | None = None

    def open(self, overrides: Sequence[str] = ()) -> Stage:
        """Return the stage on one device, on images and without dropout; see `config.override`."""
        values: Any = config.load(str(ROOT / self.recipe))
        for spec in values.components.values():
            if "weights" in spec:
                del spec.weights  # random ones
        values.stages[self.stage].use_dropout = False  # the two sides draw different masks
        config.override(values, list(overrides), Recipe)
        recipe = resized(read(values), self.stage, frames=1)
        return Stage(recipe, self.stage, make_mesh(recipe.mesh, jax.devices()[:1]))

    def batch(self, stage: Stage, rows: int = 0) -> Batch:
        """Return a batch of random images and texts; 0 rows: as many as the stage's."""
        sizes, texts = stage.sizes(), 1
        if stage.view is not None:
            texts = stage.recipe.data[next(iter(stage.config.data))].texts
        batch: Any = fake_batch(
            rows or stage.config.batch, frames=sizes.get("F", 0), size=sizes.get("S", 0),
            features=self.features, prompt_len=sizes["P"], text_len=sizes["T"], segments=texts,
            vocab_size=stage.vocab_size,
        )  # fmt: skip
        targets = ("target_at", "targets", "weights")
        return batch | {key: batch[key][:, : sizes["M"]] for key in targets}

    def decoding_parameters(self, stage: Stage, shapes: dict[str, Any]) -> dict[str, Any]:
        """Return parameters of `shapes` as arrays on the device."""
        return jax.device_put(drawn(self.used(stage, shapes)))

    def used(self, stage: Stage, params: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters without those of an encoder whose tokens are given."""
        skipped = stage.model.encoder if self.features else ""
        return {name: tree for name, tree in params.items() if name != skipped}

    def parameters(self, stage: Stage) -> tuple[Any, Any]:
        """Return (train state, frozen parameters) as arrays on the device."""
        trained, frozen = stage.abstract_params()
        frozen = self.used(stage, frozen)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), stage.abstract_state)
        state = zeros.replace(params=drawn(trained))
        return jax.device_put(state), jax.device_put(drawn(frozen))


def drawn(shapes: Any) -> Any:
    """Return random values of parameters, so that states keep about unit variance."""
    random = np.random.default_rng(0)

    def one(path: Any, like: Any) -> np.ndarray:
        name = getattr(path[-1], "key", "")
        if like.dtype == np.int8:  # a kernel
            return random.integers(-127, 128, like.shape, np.int8)
        if constant := {"scale": 1.0, "kernel_scale": 1e-3}.get(name):
            return np.full(like.shape, constant, like.dtype)
        if name == "bias":
            return np.zeros(like.shape, like.dtype)
        fan = {"kernel": -2, "embedding": -1}  # the axis of the inputs
        std = like.shape[fan[name]] ** -0.5 if name in fan else {"queries": 1.0}.get(name, 0.02)
        return (random.standard_normal(like.shape, np.float32) * std).astype(like.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)
