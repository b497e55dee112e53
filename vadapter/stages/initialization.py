"""The parameters that a stage starts from: where each component starts, and its tensors.

A component starts in one of three ways:

    stage NAME     as a finished stage of this run or of another one trained it
    weights PATH   from a public checkpoint
    random         newly initialized; trained components only

Usually a few leaves differ from what is stored. The tiny LM of stage 2 leaves embedding and head
behind, for example, as it predicts no words there. So every leaf of both sides is accounted for: it
is loaded, or it is dropped, or it starts random, and the last two only where the recipe allows
them. A leaf that was silently left random, or a trained one that was silently left out, would train
without any error to a worse result.

`find` decides from shapes alone, `plan` adds digests and keeps the run directory self-contained,
`load` reads the tensors. A run that resumes takes its trained components from its own checkpoint
instead, see `train.loop`.
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import leaf_paths
from vadapter.config import resolve
from vadapter.console import listing, truncate
from vadapter.distributed import hosts
from vadapter.distributed.mesh import poorly_sharded
from vadapter.errors import CheckpointError, ConfigError, one_line
from vadapter.io import storage
from vadapter.recipe.schema import STAGES, Recipe, StageConfig, components, trained

if TYPE_CHECKING:
    from vadapter.weights.hf_checkpoint import Report
    from vadapter.weights.reference import Reference

DONE = "done.json"
STORE = "components"
_BLOCKS = "stack.blocks."  # of a language model, its layers, stacked
_SHOWN = 8  # tensors in a line, lines in an error


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of one component."""

    component: str  #: its name in this stage
    source: str  #: random, weights PATH or stage NAME, as reports show it
    digest: str = ""  #: of the stored content, or of the files of public weights; "" if random
    weights: "Reference | None" = None  #: the public weights, if it starts from them
    report: "Report | None" = None  #: how their tensors match the component
    name: str = ""  #: its name in the component store, if it starts from a stage
    root: Path = Path()  #: that store
    loaded: tuple[str, ...] = ()  #: leaf paths that are read
    dropped: tuple[str, ...] = ()  #: stored leaf paths, or names of tensors, that are left out
    fresh: tuple[str, ...] = ()  #: leaf paths that start random although the others are read
    layers: int = 0  #: number of stored layers, if it has the first of them alone; 0: it has all

    @property
    def needs_init(self) -> bool:
        """Whether some of its parameters start random."""
        return self.source == "random" or bool(self.fresh)


# -- which of the three ways ---------------------------------------------------------------------


def _source(recipe: Recipe, stage: StageConfig, component: str) -> str:
    """Return random, weights, or the name or path of a stage."""
    weights = recipe.components[component].get("weights", "")
    frozen = component not in trained(stage)
    source = stage.start.get(component, "weights" if weights else "" if frozen else "random")
    # A frozen component never improves: random values would stay random to the end.
    if not source:
        raise ConfigError(
            f"{component} is frozen in this stage but has no source of weights: set "
            f"start.{component} to a stage, or components.{component}.weights to a checkpoint"
        )
    if frozen and source == "random":
        raise ConfigError(f"{component} is frozen in this stage: it cannot start random")
    return source


def finished(directory: Path) -> dict[str, Any]:
    """Return the record of a finished stage.

    Raises:
      CheckpointError: the stage is not finished, or its record is corrupt.
    """
    path = directory / DONE
    if not path.is_file():
        raise CheckpointError(f"stage {directory} is not finished (no {path}); run it first")
    try:
        record = json.loads(path.read_text())
        if record["components"] and record["identity"]:
            return record
        raise ValueError("empty")
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is corrupt ({error!r}); restore it from a backup") from None


def check_sources(recipe: Recipe, stage: str, workdir: Path) -> None:
    """Check the starts of a stage that no stage of this run will provide.

    Raises:
      ConfigError, CheckpointError: as `plan`.
    """
    config = recipe.stages[stage]
    for component in components(config):
        source = _source(recipe, config, component)
        if source == "weights":
            _reference(recipe, component)
        elif source != "random" and source not in recipe.chain:
            _stored(config, component, _directory(source, workdir))


def _reference(recipe: Recipe, component: str) -> "Reference":
    """Return the public weights of a component."""
    # Most recipes name none, and do without the modules that read them.
    from vadapter.weights.reference import Reference

    return Reference.of(component, recipe.components[component])


def _directory(source: str, workdir: Path) -> Path:
    return storage.as_path(resolve(source)) if "/" in source else workdir / source


def _stored(stage: StageConfig, component: str, directory: Path) -> tuple[str, str]:
    """Return the name and digest that a component has in a finished stage."""
    name = stage.rename.get(component, component)
    digests = finished(directory)["components"]
    if name not in digests:
        raise CheckpointError(
            f"stage {directory} trained {', '.join(digests)}, not {name}; fix start.{component} or "
            f"rename.{component}"
        )
    return name, digests[name]


# -- every leaf accounted for --------------------------------------------------------------------


def find(
    recipe: Recipe, stage: StageConfig, workdir: Path, component: str, abstract: Any, *,
    upcoming: Mapping[str, Mapping[str, Any]] | None = None, vocab_bound: int = 0,
) -> Start:  # fmt: skip
    """Return where a component starts; reads no tensor and writes nothing.

    It has no digest if it is from public weights or from an upcoming stage.

    Args:
      abstract: tree of shapes that the stage's model needs.
      upcoming: stage -> component -> tree of shapes, of stages that will run before this one.
      vocab_bound: upper bound of the size of a vocabulary that is not trained yet: a stored
        dimension may be smaller than one of this size.

    Raises:
      ConfigError, CheckpointError: as `plan`.
    """
    source = _source(recipe, stage, component)
    if source == "random":
        return Start(component, "random")
    from vadapter.models.quantize import full_precision

    abstract = full_precision(abstract)  # int8 kernels are stored as floats
    if source == "weights":
        return _public(stage, _reference(recipe, component), abstract)
    start = Start(component, f"stage {source}")
    if upcoming and source in upcoming:
        tree = upcoming[source][stage.rename.get(component, component)]
        stored = {path: tuple(x.shape) for path, x in leaf_paths(tree).items()}
    else:
        directory = _directory(source, workdir)
        name, digest = _stored(stage, component, directory)
        start = dataclasses.replace(start, digest=digest, name=name, root=directory.parent / STORE)
        leaves = ComponentStore(start.root).describe(name, digest)
        stored = {path: shape for path, (shape, _) in leaves.items()}
    return _account(stage, start, abstract, stored, vocab_bound)


def _public(stage: StageConfig, weights: "Reference", abstract: Any) -> Start:
    """Return the start from public weights; fresh is what no tensor fits and may start random.

    Raises:
      CheckpointError: parameters and tensors do not match, see `Checkpoint.match`.
    """
    from vadapter.weights.hf_checkpoint import MismatchError

    component = weights.component
    try:
        report = weights.open().match(abstract)
    except MismatchError as error:
        fresh = (p for p in error.paths if _listed(f"{component}/{p}", stage.fresh))
        weights = dataclasses.replace(weights, fresh=frozenset(fresh))
        if weights.fresh != frozenset(error.paths):
            raise CheckpointError(f"{error}{_advice(stage, component, error.paths)}") from None
        report = weights.open().match(abstract)
    fresh = tuple(path.replace("/", ".") for path in sorted(weights.fresh))
    return Start(
        component, f"weights {weights.weights}", weights=weights, report=report,
        loaded=tuple(path for path in leaf_paths(abstract) if path not in fresh),
        dropped=report.unused, fresh=fresh,
    )  # fmt: skip


def _advice(stage: StageConfig, component: str, paths: Sequence[str]) -> str:
    """Return how parameters that no tensor of public weights fits may start nevertheless."""
    if not paths or component not in trained(stage):
        return ""
    names = ", ".join(truncate([f"{component}/{path}" for path in paths], _SHOWN))
    return (
        "\nTake what these weights were trained with, such as an encoder of the same width, or "
        f"list the parameters in the stage's fresh to start them random: {names}"
    )


def _listed(leaf: str, prefixes: Sequence[str]) -> bool:
    return any(f"{leaf}/".startswith(f"{prefix}/") for prefix in prefixes)


def _account(
    stage: StageConfig, start: Start, abstract: Any, stored: Mapping[str, tuple[int, ...]],
    vocab_bound: int,
) -> Start:  # fmt: skip
    """Return the start with every needed and every stored leaf as loaded, dropped or fresh.

    Raises:
      CheckpointError: a leaf is missing, unexpected or of another shape, and not listed in the
        stage's `fresh` or `drop`. Nothing is ever truncated or padded, except that the layers after
        the stage's `exit_layer` are left out.
    """
    component = start.component
    needed = {path: tuple(x.shape) for path, x in leaf_paths(abstract).items()}
    drop = stage.drop
    if component in stage.chain:  # a language model predicts no words there
        drop = (*drop, *(f"{component}/{leaf}" for leaf in STAGES[stage.kind].chain_drops))

    cut = bool(stage.exit_layer) and component in stage.chain

    def key(path: str) -> str:
        return f"{component}/{path.replace('.', '/')}"

    def same_shape(path: str) -> bool:
        have, want = stored[path], needed[path]
        if path.startswith(_BLOCKS) and cut:
            have = (min(have[0], want[0]), *have[1:])
        same = (a == b or a < b == vocab_bound for a, b in zip(have, want, strict=False))
        return len(have) == len(want) and all(same)

    differing = [path for path in needed if path in stored and not same_shape(path)]
    missing = [path for path in needed if path not in stored]
    unexpected = [path for path in stored if path not in needed]
    fresh = {p: f"shape {stored[p]} is stored, but {needed[p]} is needed" for p in differing}
    fresh |= {p: f"missing (list {key(p)} in fresh to start it random)" for p in missing}
    dropped = {p: f"unexpected (list {key(p)} in drop to leave it out)" for p in unexpected}
    problems = [f"{p}: {text}" for p, text in fresh.items() if not _listed(key(p), stage.fresh)]
    problems += [f"{p}: {text}" for p, text in dropped.items() if not _listed(key(p), drop)]
    if problems:
        raise CheckpointError(
            f"{component} from {start.source} does not fit:\n  "
            + "\n  ".join(truncate(problems, _SHOWN))
        )
    deeper = (stored[p][0] for p in needed if p in stored and stored[p][0] != needed[p][0])
    return dataclasses.replace(
        start,
        layers=max(deeper, default=0) if cut else 0,
        loaded=tuple(path for path in needed if path not in fresh),
        dropped=(*unexpected, *differing),
        fresh=(*missing, *differing),
    )


# -- the run directory ---------------------------------------------------------------------------


def plan(
    recipe: Recipe, stage: StageConfig, workdir: Path, abstract: Mapping[str, Any]
) -> dict[str, Start]:
    """Return where each component of a stage starts, with digests; see `find`.

    What is frozen and comes from another run is copied into this run's component store, so that the
    run directory remains complete when the other run is deleted. Trained components end up in
    this run's checkpoints anyway, and public weights are too large to copy: they stay where they
    are, and their digest tells whether they have changed.

    Raises:
      ConfigError: a frozen component has no source of weights.
      CheckpointError: a stage is not finished; leaves neither match nor are listed in the stage's
        `fresh` or `drop`; a copy failed.
    """
    own, starts = workdir / STORE, {}
    for component, tree in abstract.items():
        start = find(recipe, stage, workdir, component, tree)
        if start.weights is not None:
            digest = start.weights.digest(own, write=hosts.first())
            start = dataclasses.replace(start, digest=digest)
        elif start.name and component not in trained(stage) and not _same(start.root, own):
            _copy(start.root, own, start.name, start.digest)
            start = dataclasses.replace(start, root=own)
        starts[component] = start
    return starts


def _same(one: Path, other: Path) -> bool:
    if storage.remote(one) or storage.remote(other):
        return str(one) == str(other)
    return one.resolve() == other.resolve()


def _copy(other: Path, own: Path, name: str, digest: str) -> None:
    """Copy a component from the store of another run to that of this one."""
    ComponentStore(other).describe(name, digest)  # raises if it is missing or its record corrupt
    source, target = (ComponentStore(root).path(name, digest) for root in (other, own))
    if hosts.first() and not storage.committed(target):
        try:
            storage.copy_tree(source, target)
        except Exception as e:
            raise CheckpointError(f"could not copy {name} to {target}: {one_line(e)}") from e
    hosts.exchange("", f"copied {name}", patience=hosts.WORK)


# -- tensors -------------------------------------------------------------------------------------


def load(start: Start, abstract: Any, initial: Any | None, dtype: Any = None) -> Any:
    """Return the parameters of a component in the shardings of `abstract`, verified leaf by leaf.

    What is int8 in `abstract` is quantized after reading.

    Args:
      initial: random parameters; needed only where the start is random or leaves are fresh.
      dtype: of the result; None: that of `abstract`.

    Raises:
      CheckpointError: files are missing, corrupt, or have changed since the start was planned.
    """
    if start.source == "random":
        return initial
    from vadapter.models.quantize import full_precision, quantize

    full = full_precision(abstract)
    if start.weights is not None:
        read = start.weights.open().leaves(full, dtype)
        random = leaf_paths(initial) if start.fresh else {}
        fresh = [(path.replace(".", "/"), random[path]) for path in start.fresh]
        return quantize(itertools.chain(read, fresh), abstract)
    needed = {path: x for path, x in leaf_paths(full).items() if path in start.loaded}
    targets = {path: _as_stored(start, path, x) for path, x in needed.items()}
    stored = ComponentStore(start.root).get(start.name, start.digest, targets, subset=True)
    if start.layers:
        stored = {path: _first(x, needed[path]) for path, x in stored.items()}
    leaves = (leaf_paths(initial) if start.fresh else {}) | stored
    casts = (
        (path.replace(".", "/"), x if dtype is None else x.astype(dtype))
        for path, x in leaves.items()
    )
    return quantize(casts, abstract)


def _as_stored(start: Start, path: str, leaf: Any) -> Any:
    """Return the shape of a leaf as it is stored, which may have more layers than are needed."""
    if not start.layers or not path.startswith(_BLOCKS):
        return leaf
    shape = (start.layers, *leaf.shape[1:])
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=leaf.sharding)


def _first(stored: jax.Array, leaf: Any) -> jax.Array:
    """Return a stored leaf with as many layers as are needed."""
    if stored.shape == leaf.shape:
        return stored
    return jax.device_put(stored[: leaf.shape[0]], leaf.sharding)


def report(starts: Mapping[str, Start], stage: StageConfig, abstract: Mapping[str, Any]) -> str:
    """Return a table of the starts: component, parameters, trained or frozen, source, exceptions.

    Large leaves that the mesh does not shard fully are listed below their component, see
    `mesh.poorly_sharded`.
    """
    lines = []
    for name in components(stage):
        start = starts[name]
        count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract[name]))
        state = "trained" if name in trained(stage) else "frozen"
        line = f"  {name:<10} {count:>13,}  {state:<8} {start.source}"
        if start.digest:
            digest = start.digest.rpartition(":")[2]  # without "sha256:"
            line += f" [{digest[:12]}] {len(start.loaded)} tensors"
        if start.layers:
            kept = {x.shape[0] for p, x in leaf_paths(abstract[name]).items() if _BLOCKS in p}
            line += f"; the first {max(kept)} of {start.layers} layers"
        for word, paths in (("dropped", start.dropped), ("fresh", start.fresh)):
            if paths:
                line += f"; {word}: {listing(paths, _SHOWN)}"
        lines += [line, *(f"    {name}/{leaf}" for leaf in poorly_sharded(abstract[name]))]
    return "\n".join(lines)
