"""What a run is made of: components, data, and stages that are rows of one table.

A recipe (`configs/*.py`) returns a ConfigDict of `Recipe`'s shape; `read` turns it into frozen
dataclasses and checks that the parts fit before anything is loaded or compiled.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import jax.numpy as jnp

from vadapter.config import build, nearest
from vadapter.data.config import DataConfig
from vadapter.distributed.mesh import MeshConfig
from vadapter.errors import ConfigError, Problems
from vadapter.models.registry import expand, make_module
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
    """A row of the stage table.

    Attributes:
      visual: the stage sees images.
      trains: which of encoder, chain and lm it trains; "all" for CoCa's four components.
      chain_drops: leaves of a language model that it does not need inside the chain, where it is
        used through its hidden states.
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
    """A tokenizer trained on the texts of some data sets, once per run directory.

    Attributes:
      vocab_size: upper bound; language models with vocab_size=0 take the size reached.
      lowercase: fold case, for small models scored without case.
      data: names of data sets whose texts it is trained on.
      texts: at most this many texts.
    """

    vocab_size: int = 4096
    lowercase: bool = True
    data: tuple[str, ...] = ()
    texts: int = 300_000


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """An evaluation: captions or answers over a data set.

    Attributes:
      data: name of a data set with task caption or question.
      max_new, min_new, beams, length_penalty: see `generate.Decode`.
      batch: rows at a time.
      limit: only the first so many examples; 0: all.
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
        """How its texts are written."""
        from vadapter.models.generate import Decode

        return Decode(self.max_new, self.min_new, self.beams, self.length_penalty)


@dataclasses.dataclass(frozen=True)
class StageConfig:
    """One stage of a run.

    Attributes:
      kind: row of `STAGES`.
      lm: the component that predicts the text.
      chain: components between encoder and lm.
      encoder: the encoder's component.
      start: where components start, `{component: STAGE | RUN_DIR/STAGE | weights | random}`; by
        default weights where the component names some, else random for what trains. A frozen
        component must start somewhere.
      rename: `{component: name in the stage it starts from}` where they differ.
      fresh: leaves (`component/path` prefixes) that may start random though others are loaded.
      drop: leaves that may be left behind, beyond the table's.
      steps, batch, accumulate: batches seen, global batch, micro-batches a step.
      data: `{data set: weight}`, mixed by batch.
      evals: run at the end, and every `eval_every` steps on their first `eval_limit` examples.
      loss: names of data sets whose loss is measured with the evaluations, on `loss_batches`.
      save_every, keep, log_every: checkpoints and log lines, in steps.
      max_bad: share of samples that may be unusable, beyond ten, before the run stops.
      use_dropout: draw dropout masks in the language models, at the rates of their components.
      bidirectional: queries see each other both ways inside a language model of the chain.
      chunk_rows: see `steps.CaptionObjective`.
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
    """A whole run.

    Attributes:
      components: `{name: {size|kind: …, weights: FOLDER or hub id, fields…}}`; with weights alone,
        kind and fields are those that the checkpoint's own config.json says.
      chain: stages in order; a stage that is done is not run again.
      tokenizer: of language models that are not public.
      seed: of initialization, order, augmentation and dropout.
      dtype: of the computation and of frozen parameters; trained ones are float32.
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
    """ConfigDict -> Recipe, checked.

    Raises:
      ConfigError: naming the key, what is wrong with it and what is known.
      CheckpointError: public checkpoints that are not there, all of them at once.
    """
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
    """What is int8 stays frozen in all stages of the chain, and qwix is there to make it so."""
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
    """Stages that others start from come before them; exceptions name components of the stage."""
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
        there, wanted = trained(recipe.stages[source]), stage.rename.get(component, component)
        if wanted not in there:
            raise ConfigError(
                f"{where}.start.{component}={source!r}: that stage trains {', '.join(there)}, not "
                f"{wanted}; mend it, or name the component in rename.{component}"
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
    """Names of the stage's components, in the order of the data flow."""
    if stage.kind == "vision":
        return COCA
    encoder = (stage.encoder,) if STAGES[stage.kind].visual else ()
    return (*encoder, *stage.chain, stage.lm)


def trained(stage: StageConfig) -> tuple[str, ...]:
    """Names of the components that the stage trains."""
    parts = {"lm": (stage.lm,), "chain": stage.chain, "all": COCA}
    return tuple(name for part in STAGES[stage.kind].trains for name in parts[part])


def resized(
    recipe: Recipe, stage: str, *, batch: int = 0, frames: int = 0, remat: str = ""
) -> Recipe:
    """Return the recipe with other sizes of a stage; 0 and "" leave it as it is.

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
    """The stage's model; widths that the recipe leaves open follow from what comes next.

    Raises:
      ConfigError: vocabularies or widths that do not fit.
    """
    from vadapter.models.adapter_model import AdapterModel
    from vadapter.models.coca import CoCa
    from vadapter.models.lm import LM

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
