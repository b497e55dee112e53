"""Estimate of what a stage needs on accelerators that are not present: memory, time, communication.

`plan` builds the stage on a mesh of the topology's devices and takes `ProgramStats` of its train
step, for every shape of batch, and of generation as its evaluations run it.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from vadapter.distributed.mesh import MeshConfig, filled, make_mesh
from vadapter.distributed.topology import Topology, devices
from vadapter.errors import ConfigError
from vadapter.models.decoding import Decode
from vadapter.models.quantize import quantized
from vadapter.models.registry import expand, load_kind
from vadapter.plan import liveness
from vadapter.plan.compiled_stats import ProgramStats, tpu_stats, traced_stats, versions
from vadapter.recipe.schema import EvalConfig, Recipe, components, resized, trained
from vadapter.stages import flops
from vadapter.stages.abstract_state import bytes_per_device
from vadapter.stages.flow import check_batch_size
from vadapter.stages.stage import Stage

ROWS = 1009  # rows of a traced micro-batch: a prime, so that no other dimension is a multiple of it


@dataclasses.dataclass(frozen=True)
class Setting:
    """Topology to plan for, and changes to the recipe; 0 and "" leave the recipe's own values."""

    topology: Topology
    batch: int = 0  # rows per step
    frames: int = 0  # F of all rows
    remat: str = ""  # rematerialization of all components that support it
    fsdp: int = 0  # devices to shard the parameters over
    int8: bool = False  # whether the frozen language model's weights are int8


@dataclasses.dataclass(frozen=True)
class Part:
    """Size of a component: number of parameters, and bytes on each device."""

    parameters: int
    trained: bool
    bytes: int


@dataclasses.dataclass(frozen=True)
class Rows:
    """Steps whose batches have the same shape; the data sets of a stage alternate."""

    data: tuple[str, ...]  # data sets with batches of this shape
    share: float  # of the stage's steps
    frames: int  # F; 0: no images
    batch_bytes: int  # of a batch on each device
    flops: int  # of a step on all devices by formula, without recomputation
    counted: int  # the same, counted in the trace
    train: ProgramStats | None  # None: not planned, as a step that needs more memory does not fit


@dataclasses.dataclass(frozen=True)
class Generation:
    """Generation of `max_new` tokens for a batch of rows on all devices; 1 beam: greedy."""

    data: str
    rows: int
    max_new: int
    beams: int
    stats: ProgramStats


@dataclasses.dataclass(frozen=True)
class Plan:
    """Estimate of a stage on a topology. `vadapter plan --json` writes these fields."""

    stage: str
    kind: str
    topology: str
    chips: int
    hosts: int
    mesh: dict[str, int]
    steps: int
    batch: int
    rows: tuple[Rows, ...]  # the steps by shape of batch, largest first
    remat: dict[str, str]
    integers: Mapping[str, str]  # component -> int8 or int4, of weights that are
    parts: dict[str, Part]
    optimizer: int  # bytes of the optimizer state on each device
    decode: Generation | None  # None: not planned
    flops: float  # mean of a step, see `Rows`
    counted: float  # mean of a step, see `Rows`
    estimated_ms: float | None  # mean of a step by the compiler's cycles; None: no estimate
    step_ms: float  # duration of `flops` at the chips' peak FLOP/s
    utilization: float  # assumed share of the peak FLOP/s
    utilized_ms: float  # duration of a step at `utilization`
    share: float | None  # of the peak FLOP/s at `estimated_ms`
    days: float  # of all steps at `utilized_ms`, without evaluations and checkpoints
    chip_hours: float
    rows_s: float  # rows per second that each host reads at `utilized_ms`
    versions: dict[str, str]

    @property
    def train(self) -> ProgramStats:
        """Return the train step with the largest peak."""
        return max((rows.train for rows in self.rows if rows.train), key=lambda stats: stats.peak)

    @property
    def parameters(self) -> dict[str, int]:
        """Return the number of parameters: total, trained, frozen."""
        total = sum(part.parameters for part in self.parts.values())
        trained = sum(part.parameters for part in self.parts.values() if part.trained)
        return {"total": total, "trained": trained, "frozen": total - trained}

    @property
    def fits(self) -> bool:
        return self.train.fits and (self.decode is None or self.decode.stats.fits)


def plan(
    recipe: Recipe, name: str, setting: Setting, *, decode: int | None = None,
    utilization: float = 0.4,
) -> Plan:  # fmt: skip
    """Estimate what a stage needs; the programs are compiled or analyzed, not run.

    `decode` is the number of tokens to generate; 0: no generation; None: that of the stage's
    evaluations, if it generates and its train step fits.

    Raises:
      ConfigError: batch, mesh and topology do not match, or the compiler is not installed.
    """
    recipe, topology = _applied(recipe, name, setting), setting.topology
    stage = _stage(recipe, name, make_mesh(recipe.mesh, devices(topology)))
    config, modules = stage.config, dict[str, Any](stage.model.modules)
    check_batch_size(name, config, stage.mesh.size)
    if decode and not stage.captions:
        raise ConfigError(
            f"stages.{name}: a stage of kind {config.kind} does not generate; omit --decode"
        )
    fits, rows = True, []
    for data in _by_shape(stage):
        train = _program_stats(stage, data[0], topology) if fits else None
        fits = train is not None and train.fits
        rows.append(_rows(stage, data, train))
    generates = fits and stage.captions if decode is None else bool(decode)
    by_formula = _mean(rows, [each.flops for each in rows]) or 0
    counted = _mean(rows, [each.counted for each in rows]) or 0
    estimated_ms = _mean(rows, [each.train and each.train.estimated_ms for each in rows])
    at_peak = by_formula / (topology.row.peak * topology.chips)  # seconds
    seconds = at_peak / utilization
    return Plan(
        stage=name, kind=config.kind, topology=str(topology), chips=topology.chips,
        hosts=topology.hosts, mesh=dict(stage.mesh.shape), steps=config.steps, batch=config.batch,
        rows=tuple(rows),
        remat={part: modules[part].config.remat for part in with_field(recipe, name, "remat")},
        integers={p: kind for p in components(config) if (kind := quantized(recipe.components[p]))},
        parts=_parts(stage),
        optimizer=bytes_per_device(stage.abstract_state.opt_state),
        decode=_generation(stage, topology, decode or 0) if generates else None,
        flops=by_formula, counted=counted, estimated_ms=estimated_ms,
        step_ms=1000 * at_peak,
        utilization=utilization, utilized_ms=1000 * seconds,
        share=1000 * at_peak / estimated_ms if estimated_ms else None,
        days=seconds * config.steps / 86400,
        chip_hours=seconds * config.steps / 3600 * topology.chips,
        rows_s=config.batch / seconds / topology.hosts,
        versions=versions(),
    )  # fmt: skip


def _by_shape(stage: Stage) -> list[tuple[str, ...]]:
    """Return the data sets of the stage grouped by the shape of their rows, the largest first."""
    groups = defaultdict(list)
    for data in stage.config.data:
        groups[tuple(sorted(stage.sizes(data).items()))].append(data)
    order = sorted(groups, key=lambda shape: math.prod(n or 1 for _, n in shape), reverse=True)
    return [tuple(groups[shape]) for shape in order]


def _applied(recipe: Recipe, name: str, setting: Setting) -> Recipe:
    """Return the recipe with the setting's mesh, sizes, rematerialization and int8."""
    recipe = resized(recipe, name, batch=setting.batch, frames=setting.frames)
    stage, specs = recipe.stages[name], dict(recipe.components)
    for part in with_field(recipe, name, "remat") if setting.remat else ():
        specs[part] = {**specs[part], "remat": setting.remat}
    if setting.int8 and stage.lm not in trained(stage) and not quantized(specs[stage.lm]):
        specs[stage.lm] = {**specs[stage.lm], "int8": True}
    mesh = dataclasses.replace(recipe.mesh, slices=setting.topology.slices)
    if setting.fsdp:
        mesh = dataclasses.replace(mesh, fsdp=setting.fsdp, data=-1)
    return dataclasses.replace(recipe, components=specs, mesh=mesh)


def with_field(recipe: Recipe, name: str, field: str) -> tuple[str, ...]:
    """Return the components of a stage whose config has a field, without a frozen encoder.

    A frozen encoder has no backward pass, so `remat` has no effect in it.
    """
    stage = recipe.stages[name]

    def has_field(part: str) -> bool:
        config = load_kind(expand(part, recipe.components[part])["kind"])[0]
        return field in (each.name for each in dataclasses.fields(config))

    parts = (p for p in components(stage) if p != stage.encoder or p in trained(stage))
    return tuple(filter(has_field, parts))


def _stage(recipe: Recipe, name: str, mesh: jax.sharding.Mesh) -> Stage:
    """Return a stage without its tokenizer; a public language model has a vocabulary of its own."""
    public = recipe.components.get(recipe.stages[name].lm, {}).get("weights")
    return Stage(recipe, name, mesh, vocab_size=1 if public else 0)


def estimate_peak(recipe: Recipe, name: str, setting: Setting) -> int:
    """Estimate the peak of the train step on a device from its trace, in seconds, not minutes.

    For TPUs it is 13 % below to 61 % above what the compiler reports.
    """
    recipe = _applied(recipe, name, setting)
    fsdp, tensor = recipe.mesh.fsdp, recipe.mesh.tensor
    mesh = {"data": setting.topology.chips // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
    stage = _stage(recipe, name, _one_device())
    state = bytes_per_device((stage.abstract_state, stage.abstract_params()[1]))
    temporaries = max(_temporaries(stage, data[0], mesh) for data in _by_shape(stage))
    return state // (fsdp * tensor) + temporaries


def _generation(stage: Stage, topology: Topology, max_new: int) -> Generation:
    """Plan the stage's largest evaluation, or one with the defaults if it has none."""
    evals = [stage.recipe.evals[name] for name in stage.config.evals]
    default = EvalConfig(next(iter(stage.config.data)))
    config = max(evals or [default], key=lambda each: each.batch * each.beams)
    decode = dataclasses.replace(config.decode, max_new=max_new or config.max_new)
    rows = filled(config.batch, stage.mesh)
    stats = _program_stats(stage.on(stage.mesh, batch=rows), config.data, topology, decode)
    return Generation(config.data, rows, decode.max_new, decode.beams, stats)


def _program_stats(
    stage: Stage, data: str, topology: Topology, decode: Decode | None = None
) -> ProgramStats:
    """Return the stats of the train step, or of generation, on rows of a data set."""
    fn, arguments = _function(stage, data, decode)
    traced = (jax.jit(fn) if decode else stage.jit_train_step()).trace(*arguments)
    loops = decode.max_new if decode else 1
    if topology.row.kind == "tpu":
        return tpu_stats(topology, traced, arguments, loops)
    temporaries = _temporaries(stage, data, stage.mesh.shape, decode)
    return traced_stats(topology, traced, arguments, temporaries, loops)


def _one_device() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(), jax.devices("cpu")[:1])


def _temporaries(
    stage: Stage, data: str, mesh: Mapping[str, int], decode: Decode | None = None
) -> int:
    """Estimate the bytes of temporaries on a device of a mesh, from a trace for one device."""
    accumulate = 1 if decode else stage.config.accumulate
    single = stage.on(_one_device(), batch=ROWS * accumulate)
    fn, arguments = _function(single, data, decode)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    scale = stage.config.batch // accumulate / (mesh["data"] * mesh["fsdp"]) / ROWS
    share = 1 / (mesh["fsdp"] * mesh["tensor"])
    return liveness.temporaries(fn, *shapes, rows=ROWS, scale=scale, share=share)


def _function(stage: Stage, data: str, decode: Decode | None) -> tuple[Any, Any]:
    """Return the train step, or generation, and its abstract arguments."""
    if decode is None:
        return stage.train_step, stage.arguments(data)
    trainable, frozen = stage.abstract_params()
    return stage.decode(decode), (trainable | frozen, stage.batch_shapes(data))


def _rows(stage: Stage, data: tuple[str, ...], train: ProgramStats | None) -> Rows:
    weights, sizes = stage.config.data, stage.sizes(data[0])
    # Without what the backward pass recomputes, as its kernels do on a TPU.
    plain = stage.on(_one_device(), remat="none")
    counted = flops.count(plain.train_step, *plain.arguments(data[0]))
    return Rows(
        data, share=sum(weights[name] for name in data) / sum(weights.values()),
        frames=sizes.get("F", 0), batch_bytes=bytes_per_device(stage.batch_shapes(data[0])),
        flops=sum(flops.formula(stage, sizes).values()), counted=counted, train=train,
    )  # fmt: skip


def _mean(rows: Sequence[Rows], values: Sequence[float | None]) -> float | None:
    """Return the mean of a value over the steps; None if some rows have no value."""
    if any(value is None for value in values):
        return None
    return sum(each.share * (value or 0) for each, value in zip(rows, values, strict=True))


def _parts(stage: Stage) -> dict[str, Part]:
    trainable, frozen = stage.abstract_params()
    parts, params = {}, trainable | frozen
    for name in components(stage.config):
        count = sum(x.size for x in jax.tree.leaves(params[name]))
        parts[name] = Part(count, name in trainable, bytes_per_device(params[name]))
    return parts
