"""Where each component of a stage starts, tensor by tensor, with nothing left unaccounted for.

Three ways, in this order: resume this stage's checkpoint (`loop`), load (a finished stage, or
public weights), random. What is loaded comes by digest from the run's component store.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vadapter.config import resolve
from vadapter.errors import CheckpointError, ConfigError
from vadapter.models.variants import expand
from vadapter.train import snapshot
from vadapter.train.digest import leaf_paths
from vadapter.train.recipe import STAGES, Recipe, StageConfig, components, trained
from vadapter.train.store import ComponentStore
from vadapter.weights.mobilenet import load_mobilenet
from vadapter.weights.public import Checkpoint, locate

DONE = "done.json"
STORE = "components"


def _load_public(path: Path, abstract: Any) -> Any:
    params, report = Checkpoint.open(path).load(abstract)
    if jax.process_index() == 0:
        print(f"{path}: {report}", flush=True)
    return params


# kind of component -> (folder, shapes) -> parameters
LOADERS: dict[str, Callable[[Path, Any], Any]] = {
    "mobilenet": lambda path, abstract: load_mobilenet(path)[1],
    "vit": _load_public,
    "lm": _load_public,
}


@dataclasses.dataclass(frozen=True)
class Start:
    """Where one component starts.

    Attributes:
      source: shown to people: random, weights PATH, stage NAME.
      digest: of the stored content; "" if random.
      name, root: the stored component's name and its store.
      loaded, dropped, fresh: leaf paths; `fresh` starts random though the others are loaded.
    """

    component: str
    source: str
    digest: str = ""
    name: str = ""
    root: Path = Path()
    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def plan(
    recipe: Recipe, stage: StageConfig, workdir: Path, abstract: Mapping[str, Any]
) -> dict[str, Start]:
    """Decides for every component of the stage where each of its leaves comes from.

    Args:
      abstract: component -> tree of shapes that the stage's model needs.

    Raises:
      ConfigError: a frozen component that starts nowhere.
      CheckpointError: a stage that is not finished; leaves that neither match nor are listed as
        dropped or fresh.
    """
    return {name: _start(recipe, stage, workdir, name, abstract[name]) for name in abstract}


def _start(
    recipe: Recipe, stage: StageConfig, workdir: Path, component: str, abstract: Any
) -> Start:
    source = _source(recipe, stage, component)
    if source == "random":
        return Start(component, "random")
    if source == "weights":
        root, name = workdir / STORE, component
        path, read = _weights(recipe, component)
        params = jax.tree.map(jax.numpy.asarray, read(path, abstract))
        digest = ComponentStore(root).put(name, params)
        shown = f"weights {recipe.components[component]['weights']}"
    else:
        directory = _directory(source, workdir)
        name, digest = _stored(stage, component, directory)
        root, shown = directory.parent / STORE, f"stage {source}"
        if component not in trained(stage) and root.resolve() != (workdir / STORE).resolve():
            _keep(root, workdir / STORE, name, digest)
            root = workdir / STORE
    return _match(stage, component, abstract, Start(component, shown, digest, name, root))


def _keep(theirs: Path, ours: Path, name: str, digest: str) -> None:
    """Copies a frozen component of another run into this run's store: a run directory is whole."""
    ComponentStore(theirs).describe(name, digest)  # it is there, and its record is intact
    source, target = (ComponentStore(root).path(name, digest) for root in (theirs, ours))
    if jax.process_index() == 0 and not target.is_dir():
        part = target.with_name(f"{target.name}{snapshot.TMP}")
        shutil.rmtree(part, ignore_errors=True)  # of an interrupted copy
        try:
            shutil.copytree(source, part)
        except OSError as e:
            shutil.rmtree(part, ignore_errors=True)
            raise CheckpointError(f"could not copy {name} to {target}: {snapshot.reason(e)}") from e
        part.rename(target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"kept {name}")


def _stored(stage: StageConfig, component: str, directory: Path) -> tuple[str, str]:
    """Name and digest of what a component starts from, in a finished stage."""
    name = stage.rename.get(component, component)
    done = finished(directory)["components"]
    if name not in done:
        raise CheckpointError(
            f"stage {directory} trained {', '.join(done)}, not {name}; mend start.{component} or "
            f"rename.{component}"
        )
    return name, done[name]


def _source(recipe: Recipe, stage: StageConfig, component: str) -> str:
    """random, weights, or a stage."""
    weights = recipe.components[component].get("weights", "")
    frozen = component not in trained(stage)
    source = stage.start.get(component, "weights" if weights else "" if frozen else "random")
    if not source:
        raise ConfigError(
            f"{component} is frozen in this stage but starts nowhere: set start.{component} to a "
            f"stage, or components.{component}.weights to a file"
        )
    if frozen and source == "random":
        raise ConfigError(f"{component} is frozen in this stage: it cannot start random")
    return source


def _weights(recipe: Recipe, component: str) -> tuple[Path, Callable[[Path, Any], Any]]:
    """Where a component's public weights lie, and what reads them."""
    spec, where = recipe.components[component], f"components.{component}"
    kind = expand(component, spec)["kind"]
    if not spec.get("weights"):
        raise ConfigError(f"start.{component}='weights', but {where}.weights names no file")
    if kind not in LOADERS:
        raise ConfigError(f"{where}.weights: read for {', '.join(LOADERS)}, not for kind {kind!r}")
    return locate(spec["weights"], f"{where}.weights").path, LOADERS[kind]


def finished(directory: Path) -> dict[str, Any]:
    """The record of a finished stage.

    Raises:
      CheckpointError: it is not finished, or not there.
    """
    path = directory / DONE
    if not path.is_file():
        raise CheckpointError(f"stage {directory} is not finished (no {path}); run it first")
    try:
        record = json.loads(path.read_text())
        if not (record["components"] and record["identity"]):
            raise ValueError("empty")
        return record
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); bring back a copy") from None


def check_sources(recipe: Recipe, stage: str, workdir: Path) -> None:
    """Finds starts of a stage that no stage of this run will bring about, before it runs.

    Raises:
      ConfigError: a frozen component that starts nowhere, weights that cannot be read.
      CheckpointError: weights that are missing, a stage elsewhere that is not finished or has not
        trained the component.
    """
    config = recipe.stages[stage]
    for component in components(config):
        source = _source(recipe, config, component)
        if source == "weights":
            _weights(recipe, component)
        elif source != "random" and source not in recipe.chain:
            _stored(config, component, _directory(source, workdir))


def _directory(source: str, workdir: Path) -> Path:
    return Path(resolve(source)) if "/" in source else workdir / source


def _match(stage: StageConfig, component: str, abstract: Any, start: Start) -> Start:
    """Accounts for every leaf of both sides; shapes must agree."""
    have = ComponentStore(start.root).describe(start.name, start.digest)
    want = {k: tuple(v.shape) for k, v in leaf_paths(abstract).items()}
    in_chain = component in stage.chain
    drops = tuple(f"{component}/{d}" for d in STAGES[stage.kind].chain_drops) if in_chain else ()
    listed = lambda leaf, names: any(  # noqa: E731
        f"{component}/{leaf.replace('.', '/')}/".startswith(f"{n}/") for n in names
    )
    other = [k for k in want if k in have and have[k][0] != want[k]]  # of another shape
    replaced = [k for k in other if listed(k, stage.fresh)]
    missing = [k for k in want if k not in have]
    extra = [k for k in have if k not in want]
    wrong = [f"{k}: {have[k][0]} there, {want[k]} here" for k in other if k not in replaced]
    wrong += [
        f"{k}: not there (list {component}/{k.replace('.', '/')} in fresh to start random)"
        for k in missing
        if not listed(k, stage.fresh)
    ]
    wrong += [
        f"{k}: not needed here (list {component}/{k.replace('.', '/')} in drop)"
        for k in extra
        if not listed(k, (*drops, *stage.drop))
    ]
    if wrong:
        more = f"\n  … {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"{component} from {start.source} does not fit:\n  " + "\n  ".join(wrong[:8]) + more
        )
    loaded = tuple(k for k in want if k in have and k not in replaced)
    dropped, fresh = (*extra, *replaced), (*missing, *replaced)
    return dataclasses.replace(start, loaded=loaded, dropped=dropped, fresh=fresh)


def load(start: Start, abstract: Any, initial: Any | None) -> Any:
    """The component's parameters: loaded leaves from the store, the others from `initial`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings.
      initial: random parameters; needed only where leaves are fresh or the start is random.
    """
    if start.source == "random":
        return initial
    store = ComponentStore(start.root)
    stored = store.get(start.name, start.digest, only(abstract, start.loaded), subset=True)
    return merge(initial, stored) if start.fresh else stored


def only(tree: Any, paths: tuple[str, ...]) -> Any:
    """The part of a nested dict whose dotted leaf paths are listed."""

    def walk(node: Any, prefix: str) -> Any:
        if not isinstance(node, Mapping):
            return node if prefix in paths else None
        out = {k: walk(v, f"{prefix}.{k}" if prefix else k) for k, v in node.items()}
        return {k: v for k, v in out.items() if v is not None} or None

    return walk(tree, "")


def merge(base: Any, over: Any) -> Any:
    """`base` with the leaves of `over` in their places."""
    if not isinstance(base, Mapping):
        return over
    return {k: merge(v, over[k]) if k in over else v for k, v in base.items()}


def report(starts: Mapping[str, Start], stage: StageConfig, abstract: Mapping[str, Any]) -> str:
    """The hand-over as a table: component, parameters, trained or frozen, source, exceptions."""
    lines = []
    for name in components(stage):
        start = starts[name]
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract[name]))
        state = "trained" if name in trained(stage) else "frozen"
        line = f"  {name:<10} {count:>13,}  {state:<8} {start.source}"
        if start.digest:
            line += f" [{start.digest[:12]}] {len(start.loaded)} tensors"
        for word, paths in (("dropped", start.dropped), ("fresh", start.fresh)):
            if paths:
                line += f"; {word}: {', '.join(paths)}"
        lines.append(line)
    return "\n".join(lines)
