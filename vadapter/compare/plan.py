"""What a comparison trains: its frozen parts once, then one run for each arm, rate and seed.

An arm is a complete recipe. Its stages of kinds `lm` and `vision` are the frozen parts, which all
arms share and which are trained in DIR/parts. What remains of its chain is trained in run
directories DIR/ARM/lr-RATE-seed-SEED, which start from the parts.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vadapter.compare import fairness
from vadapter.compare.comparison import Trained
from vadapter.config import build, differences, nearest, override, plain, require_one_of
from vadapter.console import difference_table
from vadapter.data.open import JUDGES
from vadapter.errors import ConfigError, UserError
from vadapter.io import storage
from vadapter.metrics.judgments import is_judged
from vadapter.recipe.arms import PART_KINDS, only
from vadapter.recipe.schema import Recipe, StageConfig, read

PARTS = "parts"
FEATURES = "features"
_RESERVED = (PARTS, FEATURES, "plots")  # folders of a comparison that are no arms
_NAMED = ("components", "data", "stages", "evals")  # keys of a recipe that are groups by name
# Scores of an evaluation by the task of its data; accuracy_KIND for a kind of question, too, and
# those of `metrics.judgments` where the source judges captions.
_SCORES = {"caption": ("cider", "bleu4", "rouge_l"), "question": ("accuracy",)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `configs/compare.py` beside `arms`."""

    name: str  #: of the comparison
    lr: tuple[float, ...]  #: peak learning rates of the last stage, the same for every arm
    validation_loss: str  #: DATA/loss, by which a rate is chosen
    order: tuple[str, ...] = ()  #: in which the arms are shown; (): alphabetical
    baseline: str = ""  #: arm that the others are measured against; "" for the first
    score: str = ""  #: EVAL/METRIC of the curves; "" for none
    test: tuple[str, ...] = ()  #: evaluations that are run once, on the chosen runs


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A run of a comparison; `recipe` is that of its directory."""

    arm: str
    lr: float
    seed: int
    recipe: Recipe
    workdir: Path

    @property
    def trained(self) -> Trained:
        """The run as a reader of the comparison sees it."""
        *prior, stage = self.recipe.chain
        return Trained(self.workdir, stage, self.seed, self.lr, tuple(prior))

    def __str__(self) -> str:
        return f"{self.arm}, lr {self.lr:g}, seed {self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """A comparison before it is trained.

    Attributes:
      arms: the complete recipe of each.
      parts: the recipe of the frozen parts; None: the arms train none.
    """

    folder: Path
    settings: Settings
    arms: Mapping[str, Recipe]
    parts: Recipe | None
    seeds: int

    def run(self, arm: str, lr: float, seed: int) -> PlannedRun:
        """Return one run."""
        workdir = self.folder / arm / f"lr-{lr!r}-seed-{seed}"
        return PlannedRun(arm, lr, seed, self._recipe(arm, lr, seed), workdir)

    def grid(self) -> list[PlannedRun]:
        """Return the runs between which the learning rates are chosen: all rates, first seed."""
        return [self.run(arm, lr, 0) for arm in self.arms for lr in self.settings.lr]

    def all(self) -> Iterator[PlannedRun]:
        """Yield every run that the comparison may train, whatever rates are chosen."""
        for arm in self.arms:
            for lr in self.settings.lr:
                for seed in range(self.seeds):
                    yield self.run(arm, lr, seed)

    def _recipe(self, arm: str, lr: float, seed: int) -> Recipe:
        recipe = self.arms[arm]
        own = tuple(name for name in recipe.chain if recipe.stages[name].kind not in PART_KINDS)
        stages = {name: self._started(recipe, recipe.stages[name]) for name in own}
        last = stages[own[-1]]
        stages[own[-1]] = dataclasses.replace(last, optim=dataclasses.replace(last.optim, lr=lr))
        features = str(self.folder / FEATURES)
        data = {
            name: dataclasses.replace(rows, cache_dir=features)
            if rows.cache and not rows.cache_dir
            else rows
            for name, rows in recipe.data.items()
        }
        return dataclasses.replace(
            recipe, name=f"{self.settings.name}: {arm}", chain=own, stages=stages, data=data,
            seed=seed,
        )  # fmt: skip

    def _started(self, recipe: Recipe, stage: StageConfig) -> StageConfig:
        """Return a stage whose components start from the directory of the parts."""
        parts = {n for n in recipe.chain if recipe.stages[n].kind in PART_KINDS}
        start = {
            component: str(self.folder / PARTS / source) if source in parts else source
            for component, source in stage.start.items()
        }
        return dataclasses.replace(stage, start=start)


def read_plan(
    config: Any, folder: Path, *, seeds: int, baseline: str = "",
    overrides: tuple[str, ...] = (),
) -> Plan:  # fmt: skip
    """Return the plan of a ConfigDict as `configs/compare.py` returns it, checked.

    Args:
      seeds: number of seeds of every arm, from 0.
      baseline: replaces that of the configuration.
      overrides: `key=value`, see `_override`.

    Raises:
      ConfigError: a key or a recipe is wrong; arms differ in what must be equal, with a table.
      CheckpointError: public checkpoints are missing.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds={seeds}: at least 1")
    if not isinstance(config.get("arms"), ConfigDict):
        raise ConfigError(
            "--config is a recipe, not a comparison: it has no arms; use "
            "configs/compare.py:base=scenes,arms=vadapter,perceiver,mlp, or train it with "
            "`vadapter train`"
        )
    _override(config, overrides)
    settings = build(Settings, {key: config[key] for key in config if key != "arms"})
    order = settings.order or tuple(config.arms)
    if sorted(order) != sorted(config.arms):
        raise ConfigError(f"config.order={','.join(order)}: must name every arm once")
    arms = {name: _read_arm(name, config.arms[name]) for name in order}
    if len(arms) < 2:
        raise ConfigError(f"config.arms: {', '.join(arms) or 'none'}; a comparison needs two arms")
    baseline = baseline or settings.baseline or next(iter(arms))
    require_one_of(f"baseline={baseline!r}", baseline, arms)
    settings = dataclasses.replace(settings, baseline=baseline)
    _check_rates(settings.lr)
    for name, recipe in arms.items():
        _check_arm(name, recipe, settings, folder)
    fairness.require_equal(
        {name: fairness.planned_facts(recipe, recipe.chain[-1]) for name, recipe in arms.items()}
    )
    folder = storage.absolute(folder)
    return Plan(folder, settings, arms, _parts(settings.name, arms), seeds)


def _read_arm(name: str, recipe: Any) -> Recipe:
    try:
        return read(recipe)
    except UserError as error:
        raise type(error)(f"arm {name}: {error}") from None


def _check_rates(rates: tuple[float, ...]) -> None:
    if not rates or min(rates) <= 0 or len(set(rates)) < len(rates):
        raise ConfigError(
            f"config.lr={list(rates)}: must be learning rates above 0, each of them once"
        )


def _check_arm(name: str, recipe: Recipe, settings: Settings, folder: Path) -> None:
    """Check that an arm has a name that can be a folder, an adapter stage, and what is measured."""
    place = f"config.arms.{name}"
    if "/" in name or name.startswith(".") or name in _RESERVED:
        raise ConfigError(f"{place}: cannot be the name of a folder of {folder}; rename it")
    if not recipe.chain or recipe.stages[recipe.chain[-1]].kind != "adapter":
        raise ConfigError(f"{place}: its chain must end in a stage of kind adapter")
    stage = recipe.stages[recipe.chain[-1]]
    losses = [f"{data}/loss" for data in stage.loss]
    require_one_of(f"{place}: validation_loss={settings.validation_loss!r}",
                   settings.validation_loss, losses)  # fmt: skip
    if settings.score:
        evaluation, _, metric = settings.score.partition("/")
        require_one_of(f"{place}: score={settings.score!r}", evaluation, stage.evals)
        data = recipe.data[recipe.evals[evaluation].data]
        task, judged = data.task, data.source.get("kind") in JUDGES
        of_kind = task == "question" and metric.startswith("accuracy_")
        if not of_kind and not (task == "caption" and judged and is_judged(metric)):
            known = [f"{evaluation}/{name}" for name in _SCORES[task]]
            require_one_of(f"{place}: score={settings.score!r}", settings.score, known)
    for evaluation in settings.test:
        require_one_of(f"{place}: test={evaluation!r}", evaluation, recipe.evals)
    uncached = [n for n, data in recipe.data.items() if data.cache and not data.cache_dir]
    if uncached and storage.remote(storage.as_path(folder)):
        raise ConfigError(
            f"{place}: visual tokens cannot be cached in a bucket: set --config.data."
            f"{uncached[0]}.cache_dir to a folder on a disk, or cache=False"
        )


def _parts(name: str, arms: Mapping[str, Recipe]) -> Recipe | None:
    """Return the recipe of the frozen parts of all arms.

    Raises:
      ConfigError: two arms train a part of the same name in different ways.
    """
    parts: Recipe | None = None
    owner = ""  # the arm of the first part
    for arm, recipe in arms.items():
        chain = tuple(n for n in recipe.chain if recipe.stages[n].kind in PART_KINDS)
        own = only(recipe, chain)
        if not chain:
            continue
        if parts is None:
            parts, owner = dataclasses.replace(own, name=f"{name}: {PARTS}", seed=0), arm
            continue
        rows = differences(_shared(parts, own), _shared(own, parts))
        if rows:
            raise ConfigError(
                f"{owner} and {arm} cannot be compared: their frozen parts differ\n"
                + difference_table(rows, ("key", owner, arm))
            )
        parts = dataclasses.replace(
            parts,
            chain=(*parts.chain, *(n for n in chain if n not in parts.chain)),
            components={**parts.components, **own.components},
            data={**parts.data, **own.data},
            stages={**parts.stages, **own.stages},
        )
    return parts


def _shared(one: Recipe, other: Recipe) -> dict[str, Any]:
    """Return what of `one` the parts of both use."""
    groups = {
        key: {n: plain(x) for n, x in getattr(one, key).items() if n in getattr(other, key)}
        for key in ("components", "data", "stages")
    }
    return {**groups, "tokenizer": plain(one.tokenizer), "dtype": one.dtype}


# -- overrides -----------------------------------------------------------------------------------


def _override(config: Any, items: tuple[str, ...]) -> None:
    """Apply overrides in place: of the comparison, of one arm, or of every arm that has the key.

    `lr`, `baseline`, `test`, … are keys of the comparison, `arms.NAME.key` is of one recipe; any
    other key is of the recipes: `stages.NAME.key` of all that have a stage NAME, `workers` of all.

    Raises:
      ConfigError: no arm has the key; seeds are set by --seeds.
    """
    own = [field.name for field in dataclasses.fields(Settings)]
    shared = [field.name for field in dataclasses.fields(Recipe) if field.name != "seed"]
    for item in items:
        key = item.partition("=")[0]
        first, *rest = key.split(".")
        if first == "seed":
            raise ConfigError(f"--config.{item}: the seeds of a comparison are those of --seeds=N")
        require_one_of(f"--config.{key}", first, ("arms", *own, *shared))
        if first == "arms":
            require_one_of(f"--config.{key}", rest[0] if rest else "", config.arms)
            override(config.arms[rest[0]], [item.removeprefix(f"arms.{rest[0]}.")], Recipe)
        elif first in own:
            if first not in config:
                with config.unlocked():
                    config[first] = ""
            one = first == "lr" and not set(",[(") & set(item)  # a number, where a list is meant
            override(config, [f"{item}," if one else item], Settings)
        else:
            for recipe in _owners(config, first, rest[0] if rest else "", item):
                override(recipe, [item], Recipe)


def _owners(config: Any, group: str, name: str, item: str) -> list[ConfigDict]:
    """Return the recipes that an override of a key of the arms is for."""
    recipes = list(config.arms.values())
    if group not in _NAMED:
        return recipes
    owners = [recipe for recipe in recipes if name in recipe.get(group, {})]
    if not owners:
        known = {n for recipe in recipes for n in recipe.get(group, {})}
        raise ConfigError(f"--config.{item}: no arm has {group}.{name}{nearest(name, known)}")
    return owners
