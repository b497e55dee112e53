"""What a stage of a recipe would compile, from the recipe alone: no data, no weights.

Legend: B batch, F frames, S pixels a side, P prompt tokens, T text tokens, M targets.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from vadapter.data.batch import EOS, fake_batch
from vadapter.distributed.mesh import batch_sharding, shardings_of, with_mesh
from vadapter.models.coca import CoCa
from vadapter.models.generate import Decode
from vadapter.recipe.optim import make_optimizer
from vadapter.recipe.schema import DTYPES, Recipe, make_model, trained
from vadapter.stages.abstract_state import (
    abstract_params,
    abstract_state,
    at_rest,
    init_params,
    row_shapes,
    view_of,
)
from vadapter.stages.stage import stage_step
from vadapter.stages.steps import init_state, split

PROMPT = 8  # P: "Describe the following:" is four to seven tokens in most vocabularies


class Program:
    """A stage on a mesh.

    Args:
      recipe, name: the stage.
      mesh: of devices that are here, or of a topology that is not.
      batch: rows of a step, on all devices together; 0: as the stage says.
      frames: F; 0: as the data set says, 1 where it does not say that it has clips.
      data: the data set whose rows it reads; the stage's first if "".
      remat: instead of every component's own; "": as the recipe says.
    """

    def __init__(
        self, recipe: Recipe, name: str, mesh: jax.sharding.Mesh, *, batch: int = 0,
        frames: int = 0, data: str = "", remat: str = "",
    ):  # fmt: skip
        config = recipe.stages[name]
        config = dataclasses.replace(config, batch=batch or config.batch)
        if remat:
            components = {
                key: {**spec, "remat": remat} if "remat" in spec else spec
                for key, spec in recipe.components.items()
            }
            recipe = dataclasses.replace(recipe, components=components)
        self.recipe, self.name, self.config, self.mesh = recipe, name, config, mesh
        self.learns = trained(config)
        self.model = make_model(recipe, config, recipe.tokenizer.vocab_size)
        self.tx = make_optimizer(config.optim, config.steps)
        self.data = data or next(iter(config.data))
        rows = recipe.data[self.data]
        view = view_of(self.model)
        self.sizes = {"P": PROMPT, "T": rows.text_len, "M": rows.target_len or rows.text_len}
        if rows.task == "document":
            self.sizes["P"] = 0
        if view is not None:
            clip = rows.frames if rows.media == "clip" else 1
            self.sizes |= {"F": frames or clip, "S": rows.view(view).size}
        self.step = with_mesh(mesh, stage_step(recipe, config, self.model, self.tx))

    def again(self, mesh: jax.sharding.Mesh, *, batch: int, remat: str = "") -> "Program":
        """The same program on another mesh, for another number of rows, or with other `remat`."""
        frames = self.sizes.get("F", 0)
        return Program(
            self.recipe, self.name, mesh, batch=batch, frames=frames, data=self.data, remat=remat
        )

    @property
    def repeats(self) -> bool:
        """Its backward pass computes parts of the forward again."""
        specs = self.recipe.components.values()
        return any(spec.get("remat", "none") != "none" for spec in specs)

    # -- shapes --------------------------------------------------------------------------------

    @functools.cached_property
    def params(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, frozen) shapes with shardings, frozen ones in the dtype of the computation."""
        trainable, frozen = split(abstract_params(self.model, self.mesh), self.learns)
        return trainable, at_rest(frozen, DTYPES[self.recipe.dtype])

    def arguments(self) -> tuple[Any, Any, Any]:
        """(state, frozen, batch) of the train step, as shapes with shardings."""
        trainable, frozen = self.params
        return abstract_state(trainable, self.tx, self.mesh), frozen, self.batch_shapes()

    def batch_shapes(self, rows: int = 0) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch of the step, or of so many rows."""
        shapes = row_shapes(self.sizes, visual="S" in self.sizes, rows=rows or self.config.batch)
        where = batch_sharding(self.mesh)
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
        return {key: put(x) for key, x in shapes.items()}

    def train_step(self) -> Any:
        """The jitted train step as `train.loop` has it, but for its compiler options."""
        state, _, _ = self.arguments()
        return jax.jit(self.step, donate_argnums=0, out_shardings=(shardings_of(state), None))

    def decode(self, how: Decode) -> Any:
        """Writing the texts of a batch: (params of every component, batch) -> texts."""
        from vadapter.models.beam import decode

        assert not isinstance(self.model, CoCa), "see `captions`"
        return with_mesh(self.mesh, functools.partial(decode, self.model, how=how, stop=(EOS,)))

    # -- arrays --------------------------------------------------------------------------------

    def random(self) -> tuple[Any, Any, Any]:
        """The arguments with random content, on the devices."""
        trainable, frozen = self.params
        state, _, batch = self.arguments()

        def make(names: tuple[str, ...], like: Any) -> Any:
            both = {name: nn.meta.unbox(tree) for name, tree in self._init().items()}
            return jax.tree.map(lambda x, s: x.astype(s.dtype), {n: both[n] for n in names}, like)

        put = lambda like: jax.jit(  # noqa: E731
            functools.partial(make, tuple(like), like), out_shardings=shardings_of(like)
        )()
        begin = jax.jit(lambda p: init_state(p, self.tx), out_shardings=shardings_of(state))
        sizes = self.sizes
        made = fake_batch(
            self.config.batch, frames=sizes.get("F", 0), size=sizes.get("S", 0),
            prompt_len=sizes["P"], text_len=sizes["T"], segments=1,
            vocab_size=self.recipe.tokenizer.vocab_size,
        )  # fmt: skip
        made |= {key: made[key][:, : sizes["M"]] for key in ("target_at", "targets", "weights")}
        return begin(put(trainable)), put(frozen), jax.device_put(made, shardings_of(batch))

    def _init(self) -> dict[str, Any]:
        return init_params(self.model, jax.random.key(0))

    @property
    def captions(self) -> bool:
        """The stage writes texts about images."""
        return "S" in self.sizes and not isinstance(self.model, CoCa)
