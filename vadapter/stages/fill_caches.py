"""The feature caches of a recipe, filled before any stage trains on them."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vadapter.config import require_one_of
from vadapter.data.config import DataConfig
from vadapter.data.features import FeatureSource, Stored
from vadapter.data.open import make_source
from vadapter.distributed.mesh import make_mesh
from vadapter.errors import ConfigError
from vadapter.models.registry import make_module
from vadapter.recipe.schema import DTYPES, STAGES, Recipe, StageConfig, trained, used_data
from vadapter.stages import initialization
from vadapter.stages.abstract_state import abstract_encoder
from vadapter.stages.feature_cache import Watch, encoded
from vadapter.stages.stage import NO_RUN


def write_caches(
    recipe: Recipe, names: tuple[str, ...] = (), *, workdir: Path | None = None,
    out: Path | None = None, stored: Stored | None = None,
    watch: Callable[[str], Watch] = lambda name: iter,
) -> Iterator[tuple[str, DataConfig, FeatureSource]]:  # fmt: skip
    """Encode data sets with the frozen encoders of the stages that use them; skip complete caches.

    Yields the data set's name, its configuration, and the source that reads the cache.

    Args:
      names: of data sets; by default those with `cache`.
      workdir: the run directory; needed if the run trains the encoder.
      out, stored: replace the recipe's `cache_dir` and `cache_dtype`.
      watch: for a data set, see `feature_cache.encoded`.

    Raises:
      ConfigError: a data set is unknown or used with no frozen encoder; no folder is given.
      CheckpointError, DataError: an encoder or data are missing.
    """
    names = names or tuple(name for name, data in recipe.data.items() if data.cache)
    if not names:
        raise ConfigError("no data set of the recipe has cache=True: name some with --data=NAME,…")
    mesh, dtype = make_mesh(recipe.mesh), DTYPES[recipe.dtype]
    for name in names:
        require_one_of(f"--data={name}", name, recipe.data)
        config = recipe.data[name]
        folder = str(out or config.cache_dir or (workdir / "features" if workdir else ""))
        if not folder:
            raise ConfigError(
                f"data.{name}: no folder to write to; give --out=DIR, --workdir=RUN or cache_dir"
            )
        config = dataclasses.replace(
            config, cache=True, cache_dir=folder, cache_dtype=stored or config.cache_dtype
        )
        for component, stage in _encoders(recipe, name):
            source = stage.start.get(component)
            if workdir is None and source in recipe.stages:
                raise ConfigError(
                    f"data.{name}: the encoder is trained by stage {source}: pass --workdir=RUN, "
                    "a run in which it is finished"
                )
            module: Any = make_module(component, recipe.components[component], dtype=dtype)
            abstract, root = abstract_encoder(module, mesh), workdir or NO_RUN
            start = initialization.find(recipe, stage, root, component, abstract)
            digest = start.digest
            if start.weights is not None:
                digest = start.weights.digest(root / initialization.STORE, write=False)
            yield name, config, encoded(
                make_source(name, config), config, root, encoder=module, digest=digest, mesh=mesh,
                params=initialization.load(start, abstract, None, dtype), watch=watch(name),
            )  # fmt: skip


def _encoders(recipe: Recipe, data: str) -> list[tuple[str, StageConfig]]:
    """Return the frozen encoders that a data set is used with, each with its first stage."""
    encoders: dict[tuple[str, str], tuple[str, StageConfig]] = {}
    evaluated = {evaluation.data for evaluation in recipe.evals.values()}  # on request, any of them
    for stage in (recipe.stages[name] for name in recipe.chain):
        frozen = STAGES[stage.kind].visual and stage.encoder not in trained(stage)
        if frozen and data in evaluated.union(used_data(recipe, stage)):
            start = stage.start.get(stage.encoder, "")
            encoders.setdefault((stage.encoder, start), (stage.encoder, stage))
    if not encoders:
        raise ConfigError(
            f"data.{data}: no stage of the recipe's chain uses it with a frozen encoder"
        )
    return list(encoders.values())
