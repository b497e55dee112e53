"""The configuration of a run: components, data sets, and stages that are rows of one table.

A recipe (`configs/*.py`) returns a ConfigDict with the keys of `Recipe`. `read` turns it into
frozen dataclasses and checks that its parts fit together, before anything is loaded or compiled.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp

from vadapter.config import build, nearest
from vadapter.data.config import DataConfig
from vadapter.distributed.mesh import MeshConfig
from vadapter.errors import ConfigError, Problems
from vadapter.recipe.optim import OptimConfig, learning_rate

if TYPE_CHECKING:
    from flax import linen as nn

    from vadapter.models.adapter_model import AdapterModel
    from vadapter.models.coca import CoCa
    from vadapter.models.generate import Decode

TASKS = ("caption", "question", "document")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the table of stage kinds.

    Attributes:
      visual: the stage sees images.
      trains: "chain" and "lm", those that it trains; "all": the four components of CoCa.
      chain_drops: parameters that a language model does not need inside the chain, where only its
        hidden states are used; they are dropped without being listed in `StageConfig.drop`.
    """

    visual: bool
    trains: tuple[str, ...]
    chain_drops: tuple[str, ...] = ("embedding", "head")


STAGES = {
    "lm": Kind(visual=False, trains=("lm",)),
    "vision": Kind(visual=True, trains=("all",)),
    "decoder": Kind(visual=True, trains=("chain", "lm")),  # the paper's stage 1
    "adapter": Kind(visual=True, trains=("chain",)),  # the paper's stage 2
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that a run trains, once, for its language models without public weights.

    Attributes:
      vocab_size: upper bound; language models with vocab_size=0 take the size that is reached.
      lowercase: fold case; smaller models need it, and the metrics ignore case.
      data: data sets whose texts it is trained on.
      texts: maximum number of texts.
    """

    vocab_size: int = 4096
    lowercase: bool = True
    data: tuple[str, ...] = ()
    texts: int = 300_000


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation: captions or answers for a data set, and their scores.

    Attributes:
      data: a data set with task caption or question.
      max_new, min_new: maximum and minimum length of a generation in tokens.
      batch: rows per batch.
      limit: number of examples, from the first; 0: all.
      beams: width of the beam search; 1: greedy.
      length_penalty: exponent of the length that a beam's score is divided by.
    """

    data: str
    max_new: int = 32
    batch: int = 100
    limit: int = 0
    min_new: int = 0
    beams: int = 1
    length_penalty: float = 1.0

    @property
    def decode(self) -> "Decode":
        """The settings of its generations."""
        from vadapter.models.generate import Decode

        return Decode(self.max_new, self.min_new, self.beams, self.length_penalty)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run.

    Attributes:
      kind: a row of `STAGES`: what it trains.
      steps: optimizer steps, one batch each.
      batch: rows per step, on all devices together.
      data: `{data set: weight}`; every batch is of one of them, drawn in proportion to the weights.
      lm: the component that predicts the text.
      chain: the components between encoder and lm, in order.
      encoder: the component that encodes images.
      start: initialization, `{component: STAGE | RUN_DIR/STAGE | weights | random}`. Default:
        weights if the component has some, else random, which a frozen component cannot be.
      rename: `{component: its name in the stage that it starts from}`, if they differ.
      fresh: parameters (`component/path` prefixes) that may start random though others are loaded.
      drop: parameters that may be left out of what is loaded, beyond the kind's `chain_drops`.
      accumulate: micro-batches per step, whose gradients are added up to save memory.
      optim: the optimizer.
      evals: evaluations at the end, and every `eval_every` steps on fewer examples.
      eval_every: steps between evaluations; 0: only at the end.
      eval_limit: examples of each evaluation before the end.
      loss: data sets whose loss is measured whenever the stage is evaluated.
      loss_batches: batches that such a loss is measured on.
      save_every: steps between checkpoints.
      keep: number of checkpoints to keep.
      log_every: steps between log lines.
      max_bad: fraction of unusable samples, beyond the first ten, at which the run stops.
      use_dropout: draw dropout masks in the language models, at the rates of their components.
      bidirectional: inside a language model of the chain, queries attend in both directions.
      chunk_rows: rows of logits that exist at a time, which saves memory; 0: all.
    """

    kind: str
    steps: int
    batch: int
    data: dict[str, float]
    lm: str = ""
    chain: tuple[str, ...] = ()
    encoder: str = "encoder"
    start: dict[str, str] = dataclasses.field(default_factory=dict)
    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    accumulate: int = 1
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    evals: tuple[str, ...] = ()
    eval_every: int = 0
    eval_limit: int = 256
    loss: tuple[str, ...] = ()
    loss_batches: int = 4
    save_every: int = 1000
    keep: int = 2
    log_every: int = 20
    max_bad: float = 0.001
    use_dropout: bool = False
    bidirectional: bool = False
    chunk_rows: int = 0

    RENAMED: ClassVar = {"dropout": "use_dropout"}
    # Keys that do not change what is trained: a run may be resumed with others.
    FREE: ClassVar = (
        "evals", "eval_every", "eval_limit", "loss", "loss_batches", "save_every", "keep",
        "log_every", "max_bad", "chunk_rows",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The configuration of a run.

    Attributes:
      name: of the recipe, for reports.
      components: `{name: {size|kind: …, weights: FOLDER or hub id, fields…}}`; with weights alone,
        kind and fields follow from the checkpoint's config.json.
      data: data sets by name.
      stages: stages by name.
      chain: the stages to run, in order; finished ones are skipped.
      tokenizer: of language models without public weights.
      evals: evaluations by name.
      seed: of initialization, order of the data, augmentation and dropout.
      dtype: float32 | bfloat16, of the computation and of frozen parameters; trained parameters are
        always float32.
      mesh: how the devices are arranged.
      workers: processes that read data; 0: threads of this process.
    """

    name: str
    components: dict[str, dict[str, Any]]
    data: dict[str, DataConfig]
    stages: dict[str, StageConfig]
    chain: tuple[str, ...]
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    evals: dict[str, EvalConfig] = dataclasses.field(default_factory=dict)
    seed: int = 0
    dtype: str = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    workers: int = 0


def read(config: Any) -> Recipe:
    """Return the recipe of a ConfigDict, checked.

    Raises:
      ConfigError: a key is wrong; says which, why, and what is allowed.
      CheckpointError: public checkpoints are missing; lists all of them.
    """
    # Imported in functions, here and below: reading a recipe's types needs no model code.
    from vadapter.models.registry import expand

    recipe = build(Recipe, config)
    components, problems = {}, Problems()
    for name, spec in recipe.components.items():
        with problems.gather():
            components[name] = _complete(name, spec)
            expand(name, components[name])
    problems.settle()
    recipe = dataclasses.replace(recipe, components=components)
    if recipe.dtype not in DTYPES:
        raise ConfigError(f"config.dtype={recipe.dtype!r}: one of {', '.join(DTYPES)}")
    for name in recipe.chain:
        _known("config.chain", name, recipe.stages)
    for name in recipe.tokenizer.data:
        _known("config.tokenizer.data", name, recipe.data)
    for name, data in recipe.data.items():
        _known(f"config.data.{name}.task", data.task, TASKS)
    for name, ev in recipe.evals.items():
        _known(f"config.evals.{name}.data", ev.data, recipe.data)
        _at_least_one(f"config.evals.{name}", ev, ("max_new", "batch", "beams"))
        if recipe.data[ev.data].task == "document":
            raise ConfigError(f"config.evals.{name}.data={ev.data!r}: documents are not evaluated")
    for name, stage in recipe.stages.items():
        _check_stage(recipe, name, stage)
    _check_int8(recipe)
    return recipe


def _complete(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a component's spec with what its public checkpoint says."""
    if not spec.get("weights"):
        return dict(spec)
    # The readers of public checkpoints are a tenth of the package: loaded only for those.
    from vadapter.weights.hf_checkpoint import complete

    return complete(spec, f"components.{name}.weights")


def _check_int8(recipe: Recipe) -> None:
    """Check that int8 components are frozen in all stages of the chain and qwix is installed."""
    for name in (name for name, spec in recipe.components.items() if spec.get("int8")):
        for stage in recipe.chain:
            if name in trained(recipe.stages[stage]):
                raise ConfigError(
                    f"components.{name}.int8: {name} is trained in stage {stage}, which int8 "
                    "weights cannot be; leave int8 out, or the stage out of config.chain"
                )
        from vadapter.models.quantize import library

        library()


def _at_least_one(where: str, config: Any, keys: tuple[str, ...]) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise ConfigError(f"{where}.{key}={getattr(config, key)}: at least 1")


def _check_stage(recipe: Recipe, name: str, stage: StageConfig) -> None:
    where = f"config.stages.{name}"
    _known(f"{where}.kind", stage.kind, STAGES)
    if stage.kind != "vision" and not stage.lm:
        raise ConfigError(f"{where}.lm: missing; which language model predicts the text?")
    for component in components(stage):
        _known(f"{where}: component", component, recipe.components)
    for component in (*stage.start, *stage.rename):
        _known(f"{where}.start", component, components(stage))
    for key, names, known in (
        ("data", stage.data, recipe.data),
        ("evals", stage.evals, recipe.evals),
        ("loss", stage.loss, recipe.data),
    ):
        for item in names:
            _known(f"{where}.{key}", item, known)
    _check_starts(recipe, name, stage)
    if stage.evals and (stage.kind == "vision" or not STAGES[stage.kind].visual):
        raise ConfigError(
            f"{where}.evals: a stage of kind {stage.kind} does not write about images"
        )
    if stage.kind == "vision" and (stage.loss or stage.lm or stage.chain):
        raise ConfigError(f"{where}: kind vision takes no loss, lm or chain")
    if not stage.data:
        raise ConfigError(f"{where}.data: empty; nothing to train on")
    numbers = ("steps", "batch", "accumulate", "save_every", "keep", "log_every", "loss_batches")
    _at_least_one(where, stage, numbers)
    for item in (*stage.data, *stage.loss):
        if STAGES[stage.kind].visual and recipe.data[item].task == "document":
            raise ConfigError(f"{where}: data {item!r} has no images, which {stage.kind} needs")
    try:
        learning_rate(stage.optim, stage.steps)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from None
    if STAGES[stage.kind].visual and stage.kind != "vision" and not stage.chain:
        raise ConfigError(f"{where}.chain: empty; visual tokens need a resampler, pooler or mlp")
    if not 0 <= stage.max_bad <= 1:
        raise ConfigError(f"{where}.max_bad={stage.max_bad}: a share, from 0 to 1")
    if stage.batch % stage.accumulate:
        raise ConfigError(
            f"{where}: batch={stage.batch} does not divide into accumulate={stage.accumulate}"
        )
    if stage.kind == "vision" and stage.accumulate > 1:
        raise ConfigError(f"{where}: the contrastive loss needs the whole batch: accumulate=1")


def _check_starts(recipe: Recipe, name: str, stage: StageConfig) -> None:
    """Check that stages come after those they start from, and that exceptions name components."""
    where = f"config.stages.{name}"
    for component, source in stage.start.items():
        if source in ("random", "weights") or "/" in source:
            continue
        _known(f"{where}.start.{component}", source, (*recipe.stages, "random", "weights"))
        before = recipe.chain[: recipe.chain.index(name)] if name in recipe.chain else recipe.chain
        if source in recipe.chain and source not in before:
            raise ConfigError(
                f"{where}.start.{component}={source!r}: that stage comes later in config.chain="
                f"{','.join(recipe.chain)}; put it before {name}"
            )
        names, name_there = trained(recipe.stages[source]), stage.rename.get(component, component)
        if name_there not in names:
            raise ConfigError(
                f"{where}.start.{component}={source!r}: that stage trains {', '.join(names)}, not "
                f"{name_there}; name the right stage, or the component's name there in "
                f"rename.{component}"
            )
    for key in ("fresh", "drop"):
        for leaf in getattr(stage, key):
            _known(f"{where}.{key}", leaf.partition("/")[0], components(stage))
    for leaf in stage.fresh:
        component = leaf.partition("/")[0]
        if component not in trained(stage):
            raise ConfigError(
                f"{where}.fresh: {leaf} would stay random, since {component} is frozen in this "
                "stage; start it from a stage or from weights that have it"
            )


def _known(where: str, name: str, known: Any) -> None:
    if name not in known:
        raise ConfigError(f"{where}: unknown {name!r}{nearest(name, known)}")


COCA = ("encoder", "pooler", "text", "fusion")


def components(stage: StageConfig) -> tuple[str, ...]:
    """Return the names of the stage's components, in the order of the data flow."""
    if stage.kind == "vision":
        return COCA
    encoder = (stage.encoder,) if STAGES[stage.kind].visual else ()
    return (*encoder, *stage.chain, stage.lm)


def trained(stage: StageConfig) -> tuple[str, ...]:
    """Return the names of the components that the stage trains."""
    parts = {"lm": (stage.lm,), "chain": stage.chain, "all": COCA}
    return tuple(name for part in STAGES[stage.kind].trains for name in parts[part])


def resized(
    recipe: Recipe, stage: str, *, batch: int = 0, frames: int = 0, remat: str = ""
) -> Recipe:
    """Return the recipe with other sizes of a stage; 0 and "" keep the recipe's.

    Args:
      recipe: of the run.
      stage: the stage's name.
      batch: rows of its global batch.
      frames: of every row of every data set, images and clips alike.
      remat: of every component that names one.
    """
    config, components, data = recipe.stages[stage], recipe.components, recipe.data
    if batch:
        config = dataclasses.replace(config, batch=batch)
    if remat:
        components = {
            name: {**spec, "remat": remat} if "remat" in spec else spec
            for name, spec in components.items()
        }
    if frames:
        data = {
            name: dataclasses.replace(rows, frames=frames, media="clip")
            for name, rows in data.items()
        }
    return dataclasses.replace(
        recipe, stages={**recipe.stages, stage: config}, components=components, data=data
    )


def make_model(recipe: Recipe, stage: StageConfig, vocab_size: int) -> "AdapterModel | CoCa":
    """Return the stage's model; a width of 0 becomes that of the language model that follows.

    Raises:
      ConfigError: vocabularies or widths do not fit together.
    """
    from vadapter.models.adapter_model import AdapterModel
    from vadapter.models.coca import CoCa
    from vadapter.models.lm import LM
    from vadapter.models.registry import make_module

    dtype = DTYPES[recipe.dtype]
    modules: dict[str, nn.Module] = {}
    width = 0  # of the language model that follows
    for name in reversed(components(stage)):
        module = make_module(
            name, recipe.components[name], dtype=dtype, **_derived(recipe, name, vocab_size, width)
        )
        modules[name] = module
        if isinstance(module, LM):
            width = module.config.width
            if name == stage.lm and module.config.vocab_size < vocab_size:
                raise ConfigError(
                    f"components.{name}.vocab_size={module.config.vocab_size} is smaller than the "
                    f"tokenizer's {vocab_size}; set it to 0 to follow the tokenizer"
                )
    if stage.kind == "vision":
        return CoCa(modules)
    _check_widths(stage, modules)
    encoder = stage.encoder if STAGES[stage.kind].visual else ""
    frozen = stage.lm not in trained(stage)
    return AdapterModel(modules, stage.lm, stage.chain, encoder, stage.bidirectional, frozen)


def _derived(recipe: Recipe, name: str, vocab_size: int, width: int) -> dict[str, int]:
    from vadapter.models.registry import expand

    kind = expand(name, recipe.components[name])["kind"]
    return {"lm": {"vocab_size": vocab_size}, "fc": {"width": width}, "mlp": {"width": width}}.get(
        kind, {}
    )


def _check_widths(stage: StageConfig, modules: "dict[str, nn.Module]") -> None:
    from vadapter.models.lm import LM

    before, width = "", 0
    for name in (*stage.chain, stage.lm):
        config: Any = modules[name].config  # type: ignore[attr-defined]
        if isinstance(modules[name], LM) and before and width != config.width:
            raise ConfigError(
                f"{before} gives width {width}, but {name} reads {config.width}; put a component "
                "of kind fc between them"
            )
        before, width = name, getattr(config, "query_dim", 0) or config.width
