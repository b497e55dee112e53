"""Where each component of a stage starts, tensor by tensor, with nothing left unaccounted for.

Three ways, in this order: resume this stage's checkpoint (`loop`), load (a finished stage, or
public weights), random. Stages are read from the run's component store, public weights from where
they lie, both by digest.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import traverse_util

from vadapter.checkpoints import array_io
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import leaf_paths
from vadapter.config import resolve
from vadapter.console import listing, truncate
from vadapter.distributed import hosts
from vadapter.distributed.mesh import poorly_sharded
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import storage
from vadapter.models.quantize import full_precision, quantize
from vadapter.recipe.schema import STAGES, Recipe, StageConfig, components, trained
from vadapter.weights.reference import PREFIX, Reference

if TYPE_CHECKING:
    from vadapter.weights.hf_checkpoint import Report

DONE = "done.json"
STORE = "components"
_SHOWN = 8  # tensors in a line


@dataclasses.dataclass(frozen=True)
class Start:
    """Where one component starts.

    Attributes:
      source: shown to people: random, weights PATH, stage NAME.
      digest: of the stored content, or of the files of public weights; "" if random.
      weights: the public weights, if it starts from them.
      name, root: the stored component's name and its store, if it starts from a stage.
      report: what was made of public weights.
      loaded, fresh: leaf paths; `fresh` starts random though the others are loaded.
      dropped: leaf paths there that are not needed here; of public weights their names.
    """

    component: str
    source: str
    digest: str = ""
    weights: Reference | None = None
    report: "Report | None" = None
    name: str = ""
    root: Path = Path()
    loaded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()


def plan(
    recipe: Recipe, stage: StageConfig, workdir: Path, abstract: Mapping[str, Any]
) -> dict[str, Start]:
    """Decides forevery component of the stage where each of its leaves comes from.

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
    """As `find`, with the digest of public weights and a copy of what is frozen elsewhere."""
    start, ours = find(recipe, stage, workdir, component, abstract), workdir / STORE
    if start.weights is not None:
        digest = start.weights.digest(ours, write=hosts.first())
        return dataclasses.replace(start, digest=digest)
    elsewhere = start.name and not _same(start.root, ours)
    if elsewhere and component not in trained(stage):
        _keep(start.root, ours, start.name, start.digest)
        return dataclasses.replace(start, root=ours)
    return start


def find(
    recipe: Recipe,
    stage: StageConfig,
    workdir: Path,
    component: str,
    abstract: Any,
    *,
    coming: Mapping[str, Mapping[str, Any]] | None = None,
    at_most: int = 0,
) -> Start:
    """Where one component starts, by what describes it: no tensor is read, nothing is written.

    Args:
      abstract: tree of shapes that the stage's model needs.
      coming: stage -> component -> tree of shapes, of stages that are going to run before.
      at_most: a size in `abstract` that may come out smaller, that of a vocabulary to be made.

    Returns:
      The start; without a digest where it is public weights or a stage that is coming.

    Raises:
      ConfigError, CheckpointError: as `plan`.
    """
    source = _source(recipe, stage, component)
    if source == "random":
        return Start(component, "random")
    abstract = full_precision(abstract)  # as it lies there
    if source == "weights":
        weights = Reference.of(component, recipe.components[component])
        found = weights.open().match(abstract)
        return Start(
            component, f"weights {weights.weights}", "", weights, found,
            loaded=tuple(leaf_paths(abstract)), dropped=found.left_out,
        )  # fmt: skip
    if coming and source in coming:
        start = Start(component, f"stage {source}")
        tree = coming[source][stage.rename.get(component, component)]
        have = {k: tuple(v.shape) for k, v in leaf_paths(tree).items()}
    else:
        directory = _directory(source, workdir)
        name, digest = _stored(stage, component, directory)
        root = directory.parent / STORE
        start = Start(component, f"stage {source}", digest, name=name, root=root)
        stored = ComponentStore(root).describe(name, digest)
        have = {k: shape for k, (shape, _) in stored.items()}
    return _match(stage, component, abstract, start, have, at_most)


def _same(one: Path, other: Path) -> bool:
    if storage.remote(one) or storage.remote(other):
        return str(one) == str(other)
    return one.resolve() == other.resolve()


def _keep(theirs: Path, ours: Path, name: str, digest: str) -> None:
    """Copies a frozen component of another run into this run's store: a run directory is whole."""
    ComponentStore(theirs).describe(name, digest)  # it is there, and its record is intact
    source, target = (ComponentStore(root).path(name, digest) for root in (theirs, ours))
    if hosts.first() and not storage.committed(target):
        try:
            storage.copy_tree(source, target)
        except Exception as e:
            raise CheckpointError(f"could not copy {name} to {target}: {array_io.reason(e)}") from e
    hosts.exchange("", f"copied {name}", patience=hosts.WORK)


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
            Reference.of(component, recipe.components[component])
        elif source != "random" and source not in recipe.chain:
            _stored(config, component, _directory(source, workdir))


def _directory(source: str, workdir: Path) -> Path:
    return storage.as_path(resolve(source)) if "/" in source else workdir / source


def _match(
    stage: StageConfig,
    component: str,
    abstract: Any,
    start: Start,
    have: Mapping[str, tuple[int, ...]],
    at_most: int,
) -> Start:
    """Accounts forevery leaf of both sides; shapes must agree."""
    want = {k: tuple(v.shape) for k, v in leaf_paths(abstract).items()}
    in_chain = component in stage.chain
    drops = tuple(f"{component}/{d}" for d in STAGES[stage.kind].chain_drops) if in_chain else ()
    listed = lambda leaf, names: any(  # noqa: E731
        f"{component}/{leaf.replace('.', '/')}/".startswith(f"{n}/") for n in names
    )
    other = [k for k in want if k in have and not _alike(have[k], want[k], at_most)]
    replaced = [k for k in other if listed(k, stage.fresh)]
    missing = [k for k in want if k not in have]
    extra = [k for k in have if k not in want]
    wrong = [f"{k}: {have[k]} there, {want[k]} here" for k in other if k not in replaced]
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
        raise CheckpointError(
            f"{component} from {start.source} does not fit:\n  " + "\n  ".join(truncate(wrong, 8))
        )
    loaded = tuple(k for k in want if k in have and k not in replaced)
    dropped, fresh = (*extra, *replaced), (*missing, *replaced)
    return dataclasses.replace(start, loaded=loaded, dropped=dropped, fresh=fresh)


def _alike(have: tuple[int, ...], want: tuple[int, ...], at_most: int) -> bool:
    return len(have) == len(want) and all(
        a == b or a < b == at_most for a, b in zip(have, want, strict=True)
    )


def load(start: Start, abstract: Any, initial: Any | None, dtype: Any = None) -> Any:
    """The component's parameters: loaded leaves from where they lie, the others from `initial`.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct` with shardings; what is int8 in it is made so here.
      initial: random parameters; needed only where leaves are fresh or the start is random.
      dtype: of the result; None: as `abstract` says.
    """
    if start.source == "random":
        return initial
    full = full_precision(abstract)
    if start.weights is not None:
        return quantize(start.weights.open().leaves(full, dtype), abstract)
    store = ComponentStore(start.root)
    stored = store.get(start.name, start.digest, only(full, start.loaded), subset=True)
    params = merge(initial, stored) if start.fresh else stored
    flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep="/"))
    cast = lambda x: x if dtype is None else x.astype(dtype)  # noqa: E731
    return quantize(((path, cast(x)) for path, x in flat.items()), abstract)


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
    """The hand-over as a table: component, parameters, trained or frozen, source, exceptions.

    Below a component: what of it is not split as far as the mesh allows, see `mesh.whole`.
    """
    lines = []
    for name in components(stage):
        start = starts[name]
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract[name]))
        state = "trained" if name in trained(stage) else "frozen"
        line = f"  {name:<10} {count:>13,}  {state:<8} {start.source}"
        if start.digest:
            digest = start.digest.removeprefix(PREFIX)
            line += f" [{digest[:12]}] {len(start.loaded)} tensors"
        for word, paths in (("dropped", start.dropped), ("fresh", start.fresh)):
            if paths:
                line += f"; {word}: {listing(paths, _SHOWN)}"
        lines += [line, *(f"    {name}/{leaf}" for leaf in poorly_sharded(abstract[name]))]
    return "\n".join(lines)
