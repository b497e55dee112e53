"""A trained stage, restored for use from its run directory alone.

Its trained components come from its newest intact checkpoint, its frozen ones from the run's
component store or from public weights, by the digests in that checkpoint. Data and other runs are
not needed. Nothing is written, so that a run may be opened while it trains.
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
from vadapter.checkpoints.array_io import CorruptError
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import leaf_paths
from vadapter.checkpoints.manager import steps
from vadapter.config import build, override, plain, require_one_of, with_new_keys
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.pretrained import load_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import storage
from vadapter.io.json_files import is_comparison, is_export
from vadapter.recipe.schema import STAGES, Recipe, StageConfig, read
from vadapter.stages.initialization import STORE, Start
from vadapter.stages.run import tokenizer_path
from vadapter.stages.stage import Stage
from vadapter.weights.reference import PREFIX, Reference

# Keys that may be overridden after a stage is trained; all others are part of its result.
OPEN = ("data", "evals", "mesh", "workers", "components.NAME.weights")

log = logging.getLogger(__name__)


def read_run(workdir: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Return the recipe that a run was started with, with overrides `a.b=VALUE` of keys in `OPEN`.

    Raises:
      CheckpointError: there is no run, it is an exported adapter, or its config.json is corrupt.
      ConfigError: an override is unknown, or cannot be changed after training.
    """
    workdir = storage.as_path(workdir)
    if is_export(workdir):
        raise CheckpointError(
            f"{workdir} is an exported adapter, not a run: give the run directory (the --workdir "
            "of `vadapter train`). Exports work with `vadapter caption`, `vadapter ask` and "
            "`VAdapter.from_pretrained`."
        )
    if is_comparison(workdir):
        raise CheckpointError(
            f"{workdir} is a comparison, not a run: give one of its runs, "
            f"{workdir / 'ARM' / 'lr-RATE-seed-SEED'}"
        )
    path = workdir / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no run in {workdir}: there is no {path.name}. Give the --workdir of `vadapter train`"
        )
    config = stored_recipe(path)
    components, overrides = config.to_dict()["components"], list(overrides)
    for item in overrides:
        group, *keys = item.partition("=")[0].split(".")
        if group not in OPEN and (group != "components" or keys[1:] != ["weights"]):
            raise ConfigError(
                f"--config.{item}: cannot be changed after training; only {', '.join(OPEN)} can"
            )
        if group == "components" and not components.get(keys[0], {"weights": True}).get(keys[1]):
            raise ConfigError(
                f"--config.{item}: components.{keys[0]} has no public weights in this run; leave "
                "this option out"
            )
    override(config, overrides, Recipe)
    return read(config)


def stored_recipe(path: Path) -> ConfigDict:
    """Return the recipe in a JSON file, the config.json of a run of this or an earlier version.

    Raises:
      CheckpointError: the file is corrupt.
    """
    try:
        values = with_new_keys(Recipe, json.loads(path.read_text(encoding="utf-8")))
        return ConfigDict(_tuples(values))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is corrupt ({error}); restore it from a backup") from None


def _tuples(value: Any) -> Any:
    """Return JSON's lists as tuples, which recipes use and overrides are checked against."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def open_run(
    workdir: Path, stage: str | None = None, *, step: int | None = None,
    overrides: Iterable[str] = (),
) -> Stage:  # fmt: skip
    """Return a trained stage of a run with its parameters; the run may have been moved.

    It is on the recipe's mesh, or uses data parallelism where that does not fit this machine.

    Args:
      workdir, overrides: see `read_run`.
      stage: by default the last of the chain that can caption and has a checkpoint.
      step: of the checkpoint; by default the newest intact one.

    Raises:
      CheckpointError: there is no run or no checkpoint yet; files are missing or corrupt.
      ConfigError: the stage is unknown or of kind `vision`.
    """
    workdir = storage.absolute(workdir)
    recipe = read_run(workdir, overrides)
    return _open(workdir, recipe, _choose(recipe, workdir, stage), step)


def open_encoder(
    workdir: Path, stage: str | None = None, *, step: int | None = None,
    overrides: Iterable[str] = (),
) -> Stage:  # fmt: skip
    """Return a stage of a run with the parameters of its encoder alone, which it trains or not.

    Args:
      stage: by default the last of the chain that sees images and has a checkpoint.
      workdir, step, overrides: see `open_run`.

    Raises:
      CheckpointError: as `open_run`.
      ConfigError: the stage is unknown, or sees no images.
    """
    workdir = storage.absolute(workdir)
    recipe = read_run(workdir, overrides)
    seeing = [name for name in recipe.chain if STAGES[recipe.stages[name].kind].visual]
    if stage is not None:
        require_one_of(f"--stage={stage}", stage, seeing)
    ready = [n for n in ([stage] if stage else seeing) if steps(workdir / n / "checkpoints")]
    if not ready:
        raise CheckpointError(
            f"{workdir} has no checkpoint yet of {stage or 'a stage that sees images'} "
            f"({', '.join(seeing) or 'the chain has none'}): train it first"
        )
    return _open(workdir, recipe, ready[-1], step, encoder_only=True)


def _open(
    workdir: Path, recipe: Recipe, stage: str, step: int | None, *, encoder_only: bool = False
) -> Stage:
    """Return a stage restored from a checkpoint, by default from the newest intact one."""
    directory = workdir / stage / "checkpoints"
    committed = steps(directory)
    if step is not None and step not in committed:
        raise CheckpointError(
            f"no checkpoint of step {step} in {directory}; there are steps {committed}"
        )
    tokenizer = load_tokenizer(tokenizer_path(recipe, recipe.stages[stage], workdir))
    mesh, reasons = _mesh(recipe.mesh), []
    for number in reversed(committed) if step is None else [step]:
        try:
            return _restore(workdir, recipe, stage, number, tokenizer, mesh, encoder_only)
        except CorruptError as error:
            log.warning("skipped a corrupt checkpoint: %s", error)
            reasons.append(str(error))
    raise CheckpointError(f"no checkpoint of {stage} can be used:\n  " + "\n  ".join(reasons))


def describing(recipe: Recipe) -> list[str]:
    """Return the stages of the chain whose model writes text about images."""
    kinds = {name: recipe.stages[name].kind for name in recipe.chain}
    return [name for name, kind in kinds.items() if STAGES[kind].visual and kind != "vision"]


def _choose(recipe: Recipe, workdir: Path, stage: str | None) -> str:
    """Return the name of the stage to restore, see `open_run`."""
    names = describing(recipe)
    if stage is None:
        ready = [n for n in names if steps(workdir / n / "checkpoints")]
        if not ready:
            raise CheckpointError(
                f"{workdir} has no checkpoint yet of a stage that can caption "
                f"({', '.join(names) or 'the chain has none'}). Wait until one is trained, or run "
                "`vadapter train`."
            )
        return ready[-1]
    require_one_of(f"--stage={stage}", stage, recipe.stages)
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
    except ConfigError as error:  # it was trained on other machines
        log.warning("%s; using data parallelism over all devices instead", error)
        return make_mesh(MeshConfig())


def _restore(
    workdir: Path, recipe: Recipe, name: str, step: int, tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh, encoder_only: bool,
) -> Stage:  # fmt: skip
    """Return a stage with the parameters of one checkpoint, all or those of its encoder."""
    path = workdir / name / "checkpoints" / str(step)
    meta = Stage.upgrade_identity(array_io.read_meta(path))
    if meta["step"] != step:
        raise CorruptError(f"{path}: contains step {meta['step']}")
    if meta["tokenizer"] != tokenizer.digest:
        raise CheckpointError(
            f"{path} was trained with another tokenizer than the one in {workdir}; restore the "
            "tokenizer of this run from a backup"
        )
    recipe = _as_trained(recipe, name, meta)
    stage = Stage(recipe, name, mesh, workdir=workdir, tokenizer=tokenizer)
    wanted = [n for n in stage.abstract if not encoder_only or n == stage.config.encoder]
    trainable = {name: stage.abstract[name] for name in wanted if name in stage.trained}
    frozen = {name: stage.abstract[name] for name in wanted if name not in trainable}
    starts = {n: _frozen_start(stage, n, meta["start"][n], tree) for n, tree in frozen.items()}
    state, _ = array_io.load(path, {"params": trainable}, subset=True)
    stage.params = {n: stage.load(n, start) for n, start in starts.items()} | state["params"]
    stage.step, stage.digests = step, {n: start.digest for n, start in starts.items()}
    return stage


def _frozen_start(stage: Stage, name: str, digest: str, abstract: Any) -> Start:
    """Return the start of a frozen component: public weights, or the run's component store."""
    leaves, root = tuple(leaf_paths(abstract)), stage.workdir / STORE
    if digest.startswith(PREFIX):
        weights = Reference.of(name, stage.recipe.components[name])
        weights.expect(digest, root)
        return Start(name, f"weights {weights.weights}", digest, weights, loaded=leaves)
    store = ComponentStore(root)
    for stored in (stage.config.rename.get(name, name), name):  # as where it was trained, or here
        if storage.committed(store.path(stored, digest)):
            return Start(name, "store", digest, name=stored, root=root, loaded=leaves)
    raise CheckpointError(
        f"{store.path(name, digest)} is missing: the run's {STORE} directory holds its frozen "
        "components and must be copied with it"
    )


def _as_trained(recipe: Recipe, stage: str, meta: dict[str, Any]) -> Recipe:
    """Return the recipe as the checkpoint records it, but public weights where they are now."""
    config = build(StageConfig, plain(recipe.stages[stage]) | meta["config"], f"stages.{stage}")
    trained = {}
    for name, spec in meta["components"].items():
        weights = recipe.components.get(name, {}).get("weights")
        trained[name] = spec | ({"weights": weights} if weights else {})
    return dataclasses.replace(
        recipe, components=recipe.components | trained, stages=recipe.stages | {stage: config},
        dtype=meta["dtype"], seed=meta["seed"],
    )  # fmt: skip
