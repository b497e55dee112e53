"""A trained stage, ready to use, from its run directory alone.

What trained comes from the stage's newest checkpoint that verifies; what was frozen comes from the
run's component store or from public weights, by the digests which that checkpoint names. The data
and other runs may be gone. Nothing is written, so a run may be opened while it trains.
"""

import dataclasses
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vadapter.checkpoints import array_io
from vadapter.checkpoints.array_io import DamagedError
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import leaf_paths
from vadapter.checkpoints.manager import steps
from vadapter.config import build, nearest, override, plain, with_new_keys
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import buckets, storage
from vadapter.recipe.schema import STAGES, Recipe, StageConfig, read
from vadapter.stages import initialization
from vadapter.stages.identity import upgrade
from vadapter.stages.initialization import STORE
from vadapter.stages.run import tokenizer_path
from vadapter.stages.stage import Stage
from vadapter.weights.reference import PREFIX, Reference

# What may be changed on the command line once a stage is trained; the rest is part of its result.
OPEN = ("data", "evals", "mesh", "workers", "components.NAME.weights")

log = logging.getLogger(__name__)


def read_run(workdir: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe that a run was started with.

    Args:
      workdir: the run directory.
      overrides: `a.b=VALUE`, of the keys in `OPEN`.

    Raises:
      CheckpointError: there is no run.
      ConfigError: an override that is unknown, or not possible any more.
    """
    workdir = storage.as_path(workdir)
    buckets.require_bucket(workdir)
    path = workdir / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no run in {workdir}: there is no {path.name}. Give the directory that was --workdir "
            "of `vadapter train`"
        )
    try:
        values = with_new_keys(Recipe, json.loads(path.read_text(encoding="utf-8")))
        config = ConfigDict(_tuples(values))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); bring back a copy") from None
    overrides = list(overrides)
    for item in overrides:
        group, *keys = item.partition("=")[0].split(".")
        if group not in OPEN and (group != "components" or keys[1:] != ["weights"]):
            raise ConfigError(
                f"--config.{item}: part of what was trained; of a finished stage only "
                f"{', '.join(OPEN)} can be changed"
            )
    override(config, overrides, Recipe)
    return read(config)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which is what a recipe has, so that overrides meet the same types."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def open_run(
    workdir: Path,
    stage: str | None = None,
    *,
    step: int | None = None,
    overrides: Iterable[str] = (),
) -> Stage:
    """Return a trained stage of a run with its parameters.

    Args:
      workdir: the run directory; it may have been moved.
      stage: its name; by default the last of the chain that sees images and has a checkpoint.
      step: of the checkpoint; by default the newest that verifies.
      overrides: see `read_run`.

    Returns:
      The model with its parameters on a mesh over all devices: the recipe's, or plain data
      parallelism where that does not fit this machine.

    Raises:
      CheckpointError: no run, no checkpoint (yet), damaged or missing files.
      ConfigError: an unknown stage, or one that has no model which writes text about images.
    """
    workdir = storage.absolute(workdir)
    recipe = read_run(workdir, overrides)
    stage = _choose(recipe, workdir, stage)
    directory = workdir / stage / "checkpoints"
    found = steps(directory)
    if step is not None and step not in found:
        raise CheckpointError(f"no checkpoint of step {step} in {directory}; steps there: {found}")
    tokenizer = load_tokenizer(tokenizer_path(recipe, recipe.stages[stage], workdir))
    mesh, damaged = _mesh(recipe.mesh), []
    for number in reversed(found) if step is None else [step]:
        try:
            return _restored(workdir, recipe, stage, number, tokenizer, mesh)
        except DamagedError as error:
            log.warning("left out a damaged checkpoint: %s", error)
            damaged.append(str(error))
    raise CheckpointError(f"no checkpoint of {stage} can be used:\n  " + "\n  ".join(damaged))


def describing(recipe: Recipe) -> list[str]:
    """The stages of the chain whose model writes text about images."""
    kinds = {n: recipe.stages[n].kind for n in recipe.chain}
    return [n for n, kind in kinds.items() if STAGES[kind].visual and kind != "vision"]


def _choose(recipe: Recipe, workdir: Path, stage: str | None) -> str:
    names = describing(recipe)
    if stage is None:
        ready = [n for n in names if steps(workdir / n / "checkpoints")]
        if not ready:
            raise CheckpointError(
                f"no checkpoint yet in {workdir}, of any stage that writes about images "
                f"({', '.join(names) or 'the chain has none'}): train first"
            )
        return ready[-1]
    if stage not in recipe.stages:
        raise ConfigError(f"--stage={stage}: unknown{nearest(stage, recipe.stages)}")
    if recipe.stages[stage].kind == "vision":
        raise ConfigError(
            f"--stage={stage}: it trains the encoder; choose one of {', '.join(names)}"
        )
    if not steps(workdir / stage / "checkpoints"):
        raise CheckpointError(f"no checkpoint yet in {workdir / stage}: train that stage first")
    return stage


def _mesh(config: MeshConfig) -> jax.sharding.Mesh:
    try:
        return make_mesh(config)
    except ConfigError as error:  # trained on other machines
        log.warning("%s; using data parallelism over all devices instead", error)
        return make_mesh(MeshConfig())


def _restored(
    workdir: Path,
    recipe: Recipe,
    name: str,
    step: int,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
) -> Stage:
    path = workdir / name / "checkpoints" / str(step)
    meta = upgrade(array_io.read_meta(path))
    if meta["step"] != step:
        raise DamagedError(f"{path}: holds step {meta['step']}")
    if meta["tokenizer"] != tokenizer.digest:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than the one in {workdir}; bring back "
            "that of this run"
        )
    recipe = _as_trained(recipe, name, meta)
    stage = Stage(recipe, name, mesh, workdir=workdir, tokenizer=tokenizer)
    frozen = {n: tree for n, tree in stage.abstract.items() if n not in stage.trained}
    starts = {
        n: _frozen(workdir, recipe, stage.config, n, meta["start"][n], tree)
        for n, tree in frozen.items()
    }
    stage.restore(step, starts)
    return stage


def _frozen(
    workdir: Path, recipe: Recipe, config: StageConfig, name: str, digest: str, abstract: Any
) -> initialization.Start:
    """Where a frozen component lies: public weights, or the run's store, under its own name or
    that of before."""
    leaves = tuple(leaf_paths(abstract))
    if digest.startswith(PREFIX):
        weights = Reference.of(name, recipe.components[name])
        weights.expect(digest, workdir / STORE)
        return initialization.Start(
            name, f"weights {weights.weights}", digest, weights, loaded=leaves
        )
    store = ComponentStore(workdir / STORE)
    for stored in (config.rename.get(name, name), name):
        if storage.committed(store.path(stored, digest)):
            return initialization.Start(
                name, "store", digest, name=stored, root=workdir / STORE, loaded=leaves
            )
    raise CheckpointError(
        f"{store.path(name, digest)} is missing: the run's {STORE} directory holds the frozen "
        "parts and must be copied with it"
    )


def _as_trained(recipe: Recipe, stage: str, meta: dict[str, Any]) -> Recipe:
    """The recipe with the stage and its components as the checkpoint records them."""
    config = build(StageConfig, plain(recipe.stages[stage]) | meta["config"], f"stages.{stage}")
    where = {n: {"weights": spec["weights"]} for n, spec in recipe.components.items()
             if spec.get("weights")}  # fmt: skip
    trained = {n: spec | where.get(n, {}) for n, spec in meta["components"].items()}
    return dataclasses.replace(
        recipe,
        components=recipe.components | trained,
        stages=recipe.stages | {stage: config},
        dtype=meta["dtype"],
        seed=meta["seed"],
    )
