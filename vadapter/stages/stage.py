"""A stage of a run, made ready: model, shardings, parameters, identity and data."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import optax

from vadapter.config import plain
from vadapter.data.open import make_stream
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import shardings_of
from vadapter.distributed.preemption import Stop
from vadapter.models.adapter_model import component_seed
from vadapter.models.coca import CoCa
from vadapter.recipe.schema import (
    DTYPES,
    STAGES,
    Recipe,
    StageConfig,
    components,
    make_model,
    trained,
)
from vadapter.stages import initialization
from vadapter.stages.abstract_state import (
    Model,
    abstract_params,
    abstract_state,
    init_params,
    view_of,
)
from vadapter.stages.feature_cache import encoded
from vadapter.stages.preflight import check_batch_size
from vadapter.stages.run import Run
from vadapter.stages.steps import CaptionObjective, CocaObjective, make_train_step, split


def stage_step(
    recipe: Recipe, config: StageConfig, model: Model, tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """The train step of a stage, see `steps.make_train_step`."""
    coca = isinstance(model, CoCa)
    objective = CocaObjective(model) if coca else CaptionObjective(model, config.chunk_rows)
    return make_train_step(
        objective, tx, seed=recipe.seed, accumulate=config.accumulate, dropout=config.dropout
    )


class Stage:
    """One stage of a run: model, shardings, starts, and what identifies it when it resumes."""

    def __init__(self, run: Run, name: str, stop: Stop | None = None):
        self.run, self.name, self.stop = run, name, stop or Stop()
        self.recipe, self.mesh = run.recipe, run.mesh
        self.at = "before its first step"  # what it is doing, for messages
        self.config: StageConfig = run.recipe.stages[name]
        self.directory = run.workdir / name
        self.tokenizer = run.tokenizer(self.config)
        self.model = make_model(run.recipe, self.config, self.tokenizer.vocab_size)
        check_batch_size(name, self.config, self.mesh.size)
        self.abstract = abstract_params(self.model, self.mesh)
        self.view = view_of(self.model)
        self.starts = initialization.plan(run.recipe, self.config, run.workdir, self.abstract)

    # -- parameters ----------------------------------------------------------------------------

    def load_params(self, *, resumed: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, frozen) parameters as the hand-over decided; frozen ones in compute dtype.

        Args:
          resumed: the trained ones come from a checkpoint: leave them out.
        """
        starts = {
            n: s for n, s in self.starts.items() if not (resumed and n in trained(self.config))
        }
        names = [n for n, s in starts.items() if s.fresh or s.source == "random"]
        rng = jax.random.fold_in(jax.random.key(self.recipe.seed), component_seed(self.name))
        make = lambda key: {n: nn.meta.unbox(init_params(self.model, key))[n] for n in names}  # noqa: E731
        where = {n: shardings_of(self.abstract[n]) for n in names}
        initial = jit(make, out_shardings=where)(rng)
        learns = trained(self.config)
        params = {
            name: initialization.load(
                start, self.abstract[name], initial.get(name),
                None if name in learns else DTYPES[self.recipe.dtype],
            )
            for name, start in starts.items()
        }  # fmt: skip
        return split(params, tuple(n for n in learns if n in params))

    def abstract_state(self, tx: optax.GradientTransformation) -> Any:
        """Shapes and shardings of the train state; optimizer moments lie as their parameters."""
        trainable = {n: self.abstract[n] for n in trained(self.config)}
        return abstract_state(trainable, tx, self.mesh)

    # -- identity ------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint of this stage to be resumed.

        Data and starts count by their content, wherever they lie.
        """
        without = lambda group, keys: {k: v for k, v in plain(group).items() if k not in keys}  # noqa: E731
        names = components(self.config)
        return {
            "stage": self.name,
            "config": without(self.config, (*StageConfig.FREE, "start")),
            "components": {n: without(self.recipe.components[n], ("weights",)) for n in names},
            "data": {
                n: without(self.recipe.data[n], ("source", "cache_dir")) for n in self.config.data
            },
            "fingerprints": {n: self.run.source(n).fingerprint() for n in self.config.data},
            "tokenizer": self.tokenizer.digest,
            "start": {n: self.starts[n].digest for n in names},
            "seed": self.recipe.seed,
            "dtype": self.recipe.dtype,
        }

    # -- data ----------------------------------------------------------------------------------

    def stream(self, name: str, frozen: dict[str, Any]) -> tuple[Any, Any]:
        """(items, transform) of a data set; with `cache`, over tokens of the frozen encoder."""
        config, source = self.recipe.data[name], self.run.source(name)
        if config.cache and STAGES[self.config.kind].visual and self.model.encoder in frozen:
            source = self.features(name, frozen)
        return make_stream(name, config, source, self.tokenizer, self.view)

    def features(self, name: str, frozen: dict[str, Any]) -> Any:
        """The data set's source with the frozen encoder's tokens in place of its images."""
        encoder = self.model.encoder
        return encoded(
            self.run.source(name),
            self.recipe.data[name],
            self.run.workdir,
            encoder=self.model.modules[encoder],
            params=frozen[encoder],
            digest=self.starts[encoder].digest,
            mesh=self.mesh,
            watch=lambda batches: self.stop.watch(batches, self.name, "features"),
        )
