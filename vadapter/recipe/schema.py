"""The configuration of a run: components, data sets, and stages that are rows of one table.

A recipe (`configs/*.py`) returns a ConfigDict with the keys of `Recipe`. `read` turns it into
frozen dataclasses and checks that its parts fit together, before anything is loaded or compiled.
"""

import dataclasses
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jax.numpy as jnp

from vadapter.config import build, nearest
from vadapter.data.config import DataConfig
from vadapter.distributed.mesh import MeshConfig
from vadapter.errors import ConfigError, Problems
from vadapter.recipe.optim import OptimConfig, check_optim

if TYPE_CHECKING:
    from vadapter.models.decoding import Decode

TASKS = ("caption", "question", "document")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A row of the table of stage kinds."""

    visual: bool  #: the stage sees images
    #: "chain" and "lm", those that it trains, or "all", the four components of CoCa
    trains: tuple[str, ...]
    #: parameters that a language model does not need inside the chain, where only its hidden states
    #: are used; they are dropped without being listed in `StageConfig.drop`
    chain_drops: tuple[str, ...] = ("embedding", "head")


STAGES = {
    "lm": Kind(visual=False, trains=("lm",)),
    "vision": Kind(visual=True, trains=("all",)),
    "decoder": Kind(visual=True, trains=("chain", "lm")),  # the paper's stage 1
    "adapter": Kind(visual=True, trains=("chain",)),  # the paper's stage 2
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer that a run trains, once, for its language models without public weights."""

    vocab_size: int = 4096  #: upper bound; language models with vocab_size=0 take what is reached
    lowercase: bool = True  #: fold case; smaller models need it, and the metrics ignore case
    data: tuple[str, ...] = ()  #: data sets whose texts it is trained on
    texts: int = 300_000  #: maximum number of texts


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation: captions or answers for a data set, and their scores."""

    data: str  #: a data set with task caption or question
    max_new: int = 32  #: maximum length of a generation in tokens
    batch: int = 100  #: rows per batch
    limit: int = 0  #: number of examples, from the first; 0 for all
    min_new: int = 0  #: minimum length of a generation in tokens
    beams: int = 1  #: width of the beam search; 1 for greedy
    length_penalty: float = 1.0  #: exponent of the length that a beam's score is divided by

    @property
    def decode(self) -> "Decode":
        """The settings of its generations."""
        from vadapter.models.decoding import Decode

        return Decode(self.max_new, self.min_new, self.beams, self.length_penalty)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run."""

    kind: str  #: a row of `STAGES`, which says what it trains
    steps: int  #: optimizer steps, one batch each
    batch: int  #: rows per step, on all devices together
    #: weights by data set; every batch is of one of them, drawn in proportion to the weights
    data: dict[str, float]
    lm: str = ""  #: the component that predicts the text
    chain: tuple[str, ...] = ()  #: the components between encoder and lm, in order
    encoder: str = "encoder"  #: the component that encodes images
    #: STAGE, RUN_DIR/STAGE, weights or random by component. The default is weights if the component
    #: has some, else random, which a frozen component cannot be.
    start: dict[str, str] = dataclasses.field(default_factory=dict)
    #: by component, its name in the stage that it starts from, if that differs
    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    #: parameters (`component/path` prefixes) that may start random though others are loaded
    fresh: tuple[str, ...] = ()
    #: parameters that may be left out of what is loaded, beyond the kind's `chain_drops`
    drop: tuple[str, ...] = ()
    accumulate: int = 1  #: micro-batches per step, whose gradients are added up to save memory
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)  #: the optimizer
    #: evaluations at the end, and every `eval_every` steps on fewer examples
    evals: tuple[str, ...] = ()
    eval_every: int = 0  #: steps between evaluations; 0 for only at the end
    eval_limit: int = 256  #: examples of each evaluation before the end
    loss: tuple[str, ...] = ()  #: data sets whose loss is measured whenever the stage is evaluated
    loss_batches: int = 4  #: batches that such a loss is measured on
    save_every: int = 1000  #: steps between checkpoints
    keep: int = 2  #: number of checkpoints to keep
    log_every: int = 20  #: steps between log lines
    max_bad: float = 0.001  #: share of unusable samples, beyond the first ten, that stops the run
    use_dropout: bool = False  #: draw dropout masks, in each component at its own rate
    #: queries attend to each other both ways in the language models that are trained: those of the
    #: chain, and `lm` in a stage of kind decoder; texts remain causal
    bidirectional: bool = False
    #: layer after which the queries leave a language model of the chain; later ones are neither run
    #: nor trained. From 1, or counted back from the last, which is 0: the one before is -1. Stage 1
    #: has trained the last one at the texts alone, since nothing reads it at the queries there.
    exit_layer: int = 0
    #: weight of a second loss, in a stage of kind decoder: the queries together predict the words
    #: of a row's texts, in no order
    query_loss: float = 0.0
    chunk_rows: int = 0  #: rows of logits that exist at a time, which saves memory; 0 for all

    RENAMED: ClassVar = {"dropout": "use_dropout"}
    # Keys that do not change what is trained: a run may be resumed with others.
    FREE: ClassVar = (
        "evals", "eval_every", "eval_limit", "loss", "loss_batches", "save_every", "keep",
        "log_every", "max_bad", "chunk_rows",
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The configuration of a run."""

    name: str  #: of the recipe, for reports
    #: by name, a size or kind, weights (a folder, a hub id or a packaged name) and fields; with
    #: weights alone, kind and fields follow from the checkpoint's config.json
    components: dict[str, dict[str, Any]]
    data: dict[str, DataConfig]  #: data sets by name
    stages: dict[str, StageConfig]  #: stages by name
    chain: tuple[str, ...]  #: the stages to run, in order; finished ones are skipped
    #: of language models without public weights
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    evals: dict[str, EvalConfig] = dataclasses.field(default_factory=dict)  #: evaluations by name
    seed: int = 0  #: of initialization, order of the data, augmentation and dropout
    #: of the computation and of frozen parameters; trained parameters are always float32
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)  #: arrangement of the devices
    workers: int = 0  #: processes that read data; 0: threads of this one; -1: all cores but one


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
    _check_names("config.chain", recipe.chain, recipe.stages)
    _check_names("config.tokenizer.data", recipe.tokenizer.data, recipe.data)
    for name, data in recipe.data.items():
        _check_names(f"config.data.{name}.task", (data.task,), TASKS)
    for name, ev in recipe.evals.items():
        _check_names(f"config.evals.{name}.data", (ev.data,), recipe.data)
        _check_positive(f"config.evals.{name}", ev, "max_new", "batch", "beams")
        if recipe.data[ev.data].task == "document":
            raise ConfigError(f"config.evals.{name}.data={ev.data!r}: documents are not evaluated")
    for name, stage in recipe.stages.items():
        _check_stage(recipe, name, stage)
    _check_quantized(recipe)
    return recipe


def _complete(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Return a component's spec with what its public checkpoint says."""
    if not spec.get("weights"):
        return dict(spec)
    # The readers of public checkpoints are a tenth of the package: loaded only for those.
    from vadapter.weights.hf_checkpoint import complete

    return complete(spec, f"components.{name}.weights")


def _check_quantized(recipe: Recipe) -> None:
    """Check that int8 and int4 components are frozen in the chain, and that qwix is installed."""
    from vadapter.models.quantize import STORED, library

    for name, spec in recipe.components.items():
        kinds = [kind for kind in STORED if spec.get(kind)]
        if spec.get("scale_group") and not kinds:
            raise ConfigError(
                f"components.{name}.scale_group: no scale is stored without int8 or int4; set one"
            )
        if len(kinds) > 1:
            raise ConfigError(f"components.{name}: {' and '.join(kinds)} are set; choose one")
        for kind in kinds:
            for stage in recipe.chain:
                if name in trained(recipe.stages[stage]):
                    raise ConfigError(
                        f"components.{name}.{kind}: {name} is trained in stage {stage}, which "
                        f"{kind} weights cannot be; leave {kind} out, or the stage out of "
                        "config.chain"
                    )
            library()


def _check_names(place: str, names: Iterable[str], choices: Collection[str]) -> None:
    for name in names:
        if name not in choices:
            raise ConfigError(f"{place}: unknown {name!r}{nearest(name, choices)}")


def _check_positive(place: str, config: Any, *keys: str) -> None:
    for key in keys:
        if getattr(config, key) < 1:
            raise ConfigError(f"{place}.{key}={getattr(config, key)}: at least 1")


def _check_stage(recipe: Recipe, name: str, stage: StageConfig) -> None:
    from vadapter.recipe.roles import check_roles

    place = f"config.stages.{name}"
    _check_names(f"{place}.kind", (stage.kind,), STAGES)
    vision, visual = stage.kind == "vision", STAGES[stage.kind].visual
    if not vision and not stage.lm:
        raise ConfigError(f"{place}.lm: missing; which language model predicts the text?")
    _check_names(f"{place}: component", components(stage), recipe.components)
    _check_names(f"{place}.start", (*stage.start, *stage.rename), components(stage))
    _check_names(f"{place}.data", stage.data, recipe.data)
    _check_names(f"{place}.evals", stage.evals, recipe.evals)
    _check_names(f"{place}.loss", stage.loss, recipe.data)
    _check_starts(recipe, name, stage)
    if stage.evals and (vision or not visual):
        raise ConfigError(
            f"{place}.evals: a stage of kind {stage.kind} does not write about images"
        )
    check_roles(place, recipe, stage)
    if vision and (stage.loss or stage.lm or stage.chain):
        raise ConfigError(f"{place}: kind vision takes no loss, lm or chain")
    if not stage.data:
        raise ConfigError(f"{place}.data: empty; nothing to train on")
    _check_positive(
        place, stage, "steps", "batch", "accumulate", "save_every", "keep", "log_every",
        "loss_batches",
    )  # fmt: skip
    for data in (*stage.data, *stage.loss):
        if visual and recipe.data[data].task == "document":
            raise ConfigError(f"{place}: data {data!r} has no images, which {stage.kind} needs")
    try:
        check_optim(stage.optim, stage.steps, trained(stage))
    except ConfigError as error:
        raise ConfigError(f"{place}.{error}") from None
    if visual and not vision and not stage.chain:
        raise ConfigError(f"{place}.chain: empty; visual tokens need a resampler, pooler or mlp")
    if stage.query_loss < 0 or (stage.query_loss and stage.kind != "decoder"):
        raise ConfigError(
            f"{place}.query_loss={stage.query_loss}: 0 or more, in a stage of kind decoder alone"
        )
    if not 0 <= stage.max_bad <= 1:
        raise ConfigError(f"{place}.max_bad={stage.max_bad}: a share, from 0 to 1")
    if stage.batch % stage.accumulate:
        raise ConfigError(
            f"{place}: batch={stage.batch} does not divide into accumulate={stage.accumulate}"
        )
    if vision and stage.accumulate > 1:
        raise ConfigError(f"{place}: the contrastive loss needs the whole batch: accumulate=1")


def _check_starts(recipe: Recipe, name: str, stage: StageConfig) -> None:
    """Check that stages come after those they start from, and that exceptions name components."""
    for component, source in stage.start.items():
        if source in ("random", "weights") or "/" in source:
            continue
        place = f"config.stages.{name}.start.{component}"
        _check_names(place, (source,), (*recipe.stages, "random", "weights"))
        before = recipe.chain[: recipe.chain.index(name)] if name in recipe.chain else recipe.chain
        if source in recipe.chain and source not in before:
            raise ConfigError(
                f"{place}={source!r}: that stage comes later in config.chain="
                f"{','.join(recipe.chain)}; put it before {name}"
            )
        names, name_there = trained(recipe.stages[source]), stage.rename.get(component, component)
        if name_there not in names:
            raise ConfigError(
                f"{place}={source!r}: that stage trains {', '.join(names)}, not {name_there}; name "
                f"the right stage, or the component's name there in rename.{component}"
            )
    for key in ("fresh", "drop"):
        prefixes = (leaf.partition("/")[0] for leaf in getattr(stage, key))
        _check_names(f"config.stages.{name}.{key}", prefixes, components(stage))
    for leaf in stage.fresh:
        if (component := leaf.partition("/")[0]) not in trained(stage):
            raise ConfigError(
                f"config.stages.{name}.fresh: {leaf} would stay random, since {component} is "
                "frozen in this stage; start it from a stage or from weights that have it"
            )


COCA = ("encoder", "pooler", "text", "fusion")


def components(stage: StageConfig) -> tuple[str, ...]:
    """Return the names of the stage's components, in the order of the data flow."""
    if stage.kind == "vision":
        return COCA
    encoder = (stage.encoder,) if STAGES[stage.kind].visual else ()
    return (*encoder, *stage.chain, stage.lm)


def used_data(recipe: Recipe, stage: StageConfig) -> tuple[str, ...]:
    """Return the data sets that a stage trains on, measures losses on and evaluates on."""
    return tuple(dict.fromkeys((*stage.data, *measured_data(recipe, stage))))


def measured_data(recipe: Recipe, stage: StageConfig) -> tuple[str, ...]:
    """Return the data sets that a stage measures losses on and evaluates on."""
    evaluated = (recipe.evals[name].data for name in stage.evals)
    return tuple(dict.fromkeys((*stage.loss, *evaluated)))


def trained(stage: StageConfig) -> tuple[str, ...]:
    """Return the names of the components that the stage trains."""
    parts = {"lm": (stage.lm,), "chain": stage.chain, "all": COCA}
    return tuple(name for part in STAGES[stage.kind].trains for name in parts[part])


def resized(
    recipe: Recipe, stage: str, *, batch: int = 0, frames: int = 0, remat: str = ""
) -> Recipe:
    """Return the recipe with other sizes of a stage; 0 and "" keep the recipe's.

    `frames` is of every row of every data set, images and clips alike, `remat` of every component
    that names one.
    """
    config = recipe.stages[stage]
    config = dataclasses.replace(config, batch=batch or config.batch)
    components, data = recipe.components, recipe.data
    if remat:
        remats = {name: {"remat": remat} for name, spec in components.items() if "remat" in spec}
        components = {name: spec | remats.get(name, {}) for name, spec in components.items()}
    if frames:
        data = {
            name: dataclasses.replace(rows, frames=frames, media="clip")
            for name, rows in data.items()
        }
    return dataclasses.replace(
        recipe, stages={**recipe.stages, stage: config}, components=components, data=data
    )
