"""What a stage would take on accelerators that are not here: memory, time, traffic."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax

from vadapter.distributed.mesh import MeshConfig, filled, make_mesh
from vadapter.distributed.topology import Topology, devices
from vadapter.errors import ConfigError
from vadapter.models.generate import Decode
from vadapter.models.registry import expand, load_kind
from vadapter.plan import flops
from vadapter.plan.compiled_stats import ROWS, Figures, estimate, of_compiler, of_trace, versions
from vadapter.recipe.schema import EvalConfig, Recipe, components, resized, trained
from vadapter.stages.abstract_state import bytes_per_device
from vadapter.stages.flow import check_batch_size
from vadapter.stages.stage import Stage

DAY = 86400


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is planned, and what may be changed where it does not fit.

    Attributes:
      batch: rows of a step; 0: the stage's.
      frames: F of all rows; 0: as the data sets say.
      remat: of the stage's components that may repeat, instead of their own.
      fsdp: devices that split the weights; 0: the recipe's.
      int8: the frozen language model's weights are int8.
    """

    topology: Topology
    batch: int = 0
    frames: int = 0
    remat: str = ""
    fsdp: int = 0
    int8: bool = False


@dataclasses.dataclass(frozen=True)
class Part:
    """A component: parameters in all, and bytes of them on each device."""

    parameters: int
    trained: bool
    bytes: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Steps whose batches have one shape: the data sets of a stage take turns.

    Attributes:
      data: the data sets whose batches they are; share: of the stage's steps.
      frames: F; 0: no images.
      batch_bytes: on each device.
      flops: of a step on all devices, by formula (nothing recomputed); None: there is none.
      counted: the same in the traced program; what the backward pass repeats is in `train.flops`.
      train: the program; None: not made, as one that needs more does not fit.
    """

    data: tuple[str, ...]
    share: float
    frames: int
    batch_bytes: int
    flops: int | None
    counted: int
    train: Figures | None


@dataclasses.dataclass(frozen=True)
class Texts:
    """Writing one batch of texts, as an evaluation does.

    Attributes:
      data: the data set that they are about.
      rows: at a time on all devices; max_new: tokens of each; beams: 1: greedy.
    """

    data: str
    rows: int
    max_new: int
    beams: int
    made: Figures


@dataclasses.dataclass(frozen=True)
class Plan:
    """A stage on a topology.

    Attributes:
      rows: what its steps are, those that need most first.
      optimizer: of the arguments, per device; the others are `parts` and the rows' batch.
      decode: None: not made.
      flops, counted: the mean of a step, as of `Rows`.
      step_ms: of `flops` at the chips' peak; utilized_ms: at that share of it, `utilization`.
      estimated_ms: the mean of a step by the compiler's cycles; share: of the peak, if so.
      days, chip_hours: of all steps at `utilized_ms`, nothing but steps.
      rows_s: rows a second that each host reads, at `utilized_ms`.
    """

    stage: str
    kind: str
    topology: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    steps: int
    batch: int
    rows: tuple[Rows, ...]
    remat: dict[str, str]
    int8: tuple[str, ...]
    parts: dict[str, Part]
    optimizer: int
    decode: Texts | None
    flops: float | None
    counted: float
    estimated_ms: float | None
    step_ms: float
    utilization: float
    utilized_ms: float
    share: float | None
    days: float
    chip_hours: float
    rows_s: float
    versions: dict[str, str]

    @property
    def train(self) -> Figures:
        """The train step that needs most."""
        return max((rows.train for rows in self.rows if rows.train), key=lambda made: made.peak)

    @property
    def parameters(self) -> dict[str, int]:
        """Of all parts: total, trained, frozen."""
        count = {True: 0, False: 0}
        for part in self.parts.values():
            count[part.trained] += part.parameters
        return {"total": sum(count.values()), "trained": count[True], "frozen": count[False]}

    @property
    def fits(self) -> bool:
        return self.train.fits and (self.decode is None or self.decode.made.fits)


def plan(
    recipe: Recipe, name: str, setting: Setting, *, decode: int | None = None,
    utilization: float = 0.4,
) -> Plan:  # fmt: skip
    """Compiles or analyses the train step of a stage, and writing texts.

    Args:
      decode: tokens of a text; 0: no texts; None: as many as the stage's evaluations have, if it
        writes any and its train step fits.

    Raises:
      ConfigError: batch, mesh and topology do not go together, or the compiler is not installed.
    """
    recipe = applied(recipe, name, setting)
    stage = Stage(recipe, name, make_mesh(recipe.mesh, devices(setting.topology)))
    check_batch_size(name, stage.config, stage.mesh.size)
    if decode and not stage.captions:
        raise ConfigError(f"stages.{name}: kind {stage.config.kind} writes no texts: no --decode")
    fit, rows = True, []
    for data in by_shape(stage):
        train = _figures(stage, data[0], setting) if fit else None
        fit = train is not None and train.fits
        rows.append(_rows(stage, data, train))
    wanted = fit and stage.captions if decode is None else bool(decode)
    texts = _texts(stage, setting, decode or 0) if wanted else None
    return _described(stage, setting, tuple(rows), texts, utilization)


def by_shape(stage: Stage) -> list[tuple[str, ...]]:
    """Return the data sets of the stage grouped by the shape of their rows, the largest first."""
    groups = defaultdict(list)
    for data in stage.config.data:
        groups[tuple(sorted(stage.sizes(data).items()))].append(data)
    order = sorted(groups, key=lambda shape: math.prod(n or 1 for _, n in shape), reverse=True)
    return [tuple(groups[shape]) for shape in order]


def applied(recipe: Recipe, name: str, setting: Setting) -> Recipe:
    """Return the recipe with the setting's mesh, sizes, rematerialization and int8."""
    recipe = resized(recipe, name, batch=setting.batch, frames=setting.frames)
    stage, specs = recipe.stages[name], dict(recipe.components)
    for part in with_field(recipe, name, "remat") if setting.remat else ():
        specs[part] = {**specs[part], "remat": setting.remat}
    if setting.int8 and stage.lm not in trained(stage):
        specs[stage.lm] = {**specs[stage.lm], "int8": True}
    mesh = dataclasses.replace(recipe.mesh, slices=setting.topology.slices)
    if setting.fsdp:
        mesh = dataclasses.replace(mesh, fsdp=setting.fsdp, data=-1)
    return dataclasses.replace(recipe, components=specs, mesh=mesh)


def with_field(recipe: Recipe, name: str, field: str) -> tuple[str, ...]:
    """Components of a stage whose config has a field, but for an encoder that is not trained.

    `remat`: they have a backward pass, and may repeat parts of the forward in it.
    """
    stage = recipe.stages[name]
    behind = [part for part in components(stage) if part != stage.encoder or part in trained(stage)]
    config_of = lambda part: load_kind(expand(part, recipe.components[part])["kind"])[0]  # noqa: E731
    fields = lambda part: [each.name for each in dataclasses.fields(config_of(part))]  # noqa: E731
    return tuple(part for part in behind if field in fields(part))


def guess(recipe: Recipe, name: str, setting: Setting) -> int:
    """About the peak of the train step on a device, from its trace alone: nothing is compiled.

    Takes seconds. Of TPUs it is from 13 % under to 61 % over what the compiler says.
    """
    recipe = applied(recipe, name, setting)
    config = recipe.stages[name]
    split = {"fsdp": recipe.mesh.fsdp, "tensor": recipe.mesh.tensor}
    parts = math.prod(split.values())
    mesh = {"data": setting.topology.chips // parts, **split}
    recipe = resized(recipe, name, batch=ROWS * config.accumulate)
    stage = Stage(recipe, name, _one())
    params = bytes_per_device((stage.abstract_state, stage.abstract_params()[1])) // parts
    temporaries = (
        _held(stage, data[0], mesh, config.batch // config.accumulate) for data in by_shape(stage)
    )
    return params + max(temporaries)


def _texts(stage: Stage, setting: Setting, max_new: int) -> Texts:
    """The stage's largest evaluation, or one as is usual if it has none.

    Args:
      max_new: instead of its own; 0: as it says.
    """
    evals = [stage.recipe.evals[name] for name in stage.config.evals]
    default = EvalConfig(next(iter(stage.config.data)))
    of = max(evals or [default], key=lambda one: one.batch * one.beams)
    how = dataclasses.replace(of.decode, max_new=max_new or of.max_new)
    rows = filled(of.batch, stage.mesh)
    made = _figures(stage.on(stage.mesh, batch=rows), of.data, setting, how)
    return Texts(of.data, rows, how.max_new, how.beams, made)


def _figures(stage: Stage, data: str, setting: Setting, how: Decode | None = None) -> Figures:
    """Of the train step on rows of a data set, or of writing texts about them."""
    fn, arguments = _function(stage, data, how)
    loops = how.max_new if how else 1
    traced = (jax.jit(fn) if how else stage.jit_train_step()).trace(*arguments)
    if setting.topology.row.kind == "tpu":
        return of_compiler(setting.topology, traced, arguments, loops)
    accumulate = 1 if how else stage.config.accumulate
    alone = stage.on(_one(), batch=ROWS * accumulate)
    held = _held(alone, data, stage.mesh.shape, stage.config.batch // accumulate, how)
    return of_trace(setting.topology, traced, arguments, held, loops)


def _one() -> jax.sharding.Mesh:
    """A mesh of one device of this host."""
    return make_mesh(MeshConfig(), jax.devices("cpu")[:1])


def _held(
    alone: Stage, data: str, mesh: Mapping[str, int], rows: int, how: Decode | None = None
) -> int:
    """Estimated bytes of temporaries on a device of the mesh.

    Args:
      alone: the stage on one device, with micro-batches of `ROWS`.
      data: the data set.
      rows: of a micro-batch on the mesh.
    """
    fn, arguments = _function(alone, data, how)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    return estimate(fn, shapes, mesh, rows)


def _function(stage: Stage, data: str, how: Decode | None) -> tuple[Any, Any]:
    """The function and the shapes of its arguments."""
    if how is None:
        return stage.train_step, stage.arguments(data)
    trainable, frozen = stage.abstract_params()
    return stage.decode(how), (trainable | frozen, stage.batch_shapes(data))


def _rows(stage: Stage, data: tuple[str, ...], train: Figures | None) -> Rows:
    """What is said of one shape of batches."""
    weights, batch, sizes = stage.config.data, stage.config.batch, stage.sizes(data[0])
    each = flops.formula(stage.model, stage.trained, sizes)
    specs = stage.recipe.components.values()
    if train and all(spec.get("remat", "none") == "none" for spec in specs):
        counted = train.flops
    else:  # what the backward pass repeats is not counted
        plain = stage.on(stage.mesh, remat="none")
        counted = flops.count(plain.train_step, *stage.arguments(data[0]))
    return Rows(
        data, sum(weights[name] for name in data) / sum(weights.values()),
        sizes.get("F", 0), bytes_per_device(stage.batch_shapes(data[0])),
        flops=batch * sum(each.values()) if each else None,
        counted=counted, train=train,
    )  # fmt: skip


def _described(
    stage: Stage, setting: Setting, rows: tuple[Rows, ...], texts: Texts | None,
    utilization: float,
) -> Plan:  # fmt: skip
    topology, config, recipe = setting.topology, stage.config, stage.recipe
    modules = stage.model.modules
    needed = _mean(rows, lambda one: one.flops)
    counted = _mean(rows, lambda one: one.counted)
    estimated = _mean(rows, lambda one: one.train and one.train.estimated_ms)
    least = (needed or counted or 0) / (topology.row.peak * topology.chips)
    seconds = least / utilization
    able = with_field(recipe, stage.name, "remat")
    return Plan(
        stage=stage.name, kind=config.kind, topology=str(topology), chips=topology.chips,
        hosts=topology.hosts, mesh=dict(stage.mesh.shape), steps=config.steps, batch=config.batch,
        rows=rows,
        remat={part: modules[part].config.remat for part in able},  # type: ignore[attr-defined]
        int8=tuple(part for part in components(config) if recipe.components[part].get("int8")),
        parts=_parts(stage), optimizer=bytes_per_device(stage.abstract_state.opt_state),
        decode=texts,
        flops=needed, counted=counted or 0, estimated_ms=estimated,
        step_ms=1000 * least, utilization=utilization, utilized_ms=1000 * seconds,
        share=1000 * least / estimated if estimated else None,
        days=seconds * config.steps / DAY,
        chip_hours=seconds * config.steps / 3600 * topology.chips,
        rows_s=config.batch / seconds / topology.hosts, versions=versions(),
    )  # fmt: skip


def _mean(rows: tuple[Rows, ...], figure: Callable[[Rows], float | None]) -> float | None:
    """Of a step; None where it is not known of all."""
    found = [figure(one) for one in rows]
    if any(value is None for value in found):
        return None
    return sum(one.share * (value or 0) for one, value in zip(rows, found, strict=True))


def _parts(stage: Stage) -> dict[str, Part]:
    trainable, frozen = stage.abstract_params()
    both = trainable | frozen
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))  # noqa: E731
    return {
        part: Part(count(both[part]), part in trainable, bytes_per_device(both[part]))
        for part in components(stage.config)
    }
