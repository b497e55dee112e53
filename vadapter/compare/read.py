"""A comparison of runs that exist: which of their stages are arms, and which are only seeds."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vadapter.compare import fairness
from vadapter.compare.comparison import Arm, Comparison, Trained
from vadapter.compare.final_scores import evaluation_folder
from vadapter.compare.plan import PARTS
from vadapter.compare.record import read_record, write_record
from vadapter.config import digest, require_one_of
from vadapter.distributed import hosts
from vadapter.errors import CheckpointError, ConfigError, Problems
from vadapter.io import storage
from vadapter.io.json_files import history, is_comparison, is_export, rows
from vadapter.recipe.arms import earlier_stages
from vadapter.recipe.schema import Recipe
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import read_run
from vadapter.stages.stage import settings

RERUN = "rerun the command that trained the comparison"
BASELINE = "perceiver"  # the arm that is the baseline by default


@dataclasses.dataclass(frozen=True)
class Found:
    """An adapter stage of a run, with the recipe of the run."""

    trained: Trained
    recipe: Recipe

    @property
    def directory(self) -> Path:
        """The directory of the stage."""
        return self.trained.workdir / self.trained.stage


def read_runs(
    paths: Sequence[Path], baseline: str = "", score: str = ""
) -> tuple[Comparison, dict[str, Any]]:
    """Return the comparison of finished runs, and what all of them have in common.

    Args:
      paths: RUN, for all its adapter stages, or RUN/STAGE; or the directory of one comparison.
      baseline: an arm; by default `perceiver`, or else the first.
      score: EVAL/METRIC of the curves, as logged; by default the comparison's, or the first CIDEr.

    Raises:
      CheckpointError: a path is no run, a stage is not finished; lists all of them.
      ConfigError: a run has no adapter stage, there is one arm only, an unknown baseline, or runs
        differ in more than the connector.
    """
    if comparisons := [path for path in paths if is_comparison(path)]:
        if len(paths) > 1:
            raise ConfigError(
                f"{comparisons[0]} is a comparison: give it alone, or some of its runs "
                f"({comparisons[0]}/ARM/lr-RATE-seed-SEED)"
            )
        comparison, _ = read_record(paths[0])
        _require_runs(comparison)
    else:
        comparison = _compare(paths)
    if baseline:
        require_one_of(f"--baseline={baseline}", baseline, [arm.name for arm in comparison.arms])
        comparison = dataclasses.replace(comparison, baseline=baseline)
    if score:
        require_one_of(f"--score={score}", score, _logged_scores(comparison))
        comparison = dataclasses.replace(comparison, score=score)
    return comparison, common_facts(comparison)


def _logged_scores(comparison: Comparison) -> list[str]:
    """Return the scores of evaluations that runs have logged while they trained."""
    keys = set[str]()
    for _, run in _runs(comparison):
        evals = read_run(run.workdir).stages[run.stage].evals
        for row in history(storage.as_path(run.workdir) / run.stage / "metrics.jsonl"):
            keys |= {key for key in row if key.rpartition("/")[0] in evals}
    return sorted(key for key in keys if not key.endswith("/n"))


def common_facts(comparison: Comparison) -> fairness.Facts:
    """Return what all runs of a finished comparison have in common.

    Raises:
      ConfigError: they differ in more than the connector.
      CheckpointError: a run is missing or not finished, or the score of a test evaluation is
        missing or corrupt; lists all of them.
    """
    _require_scores(comparison)
    facts = {
        f"{arm.name}, seed {run.seed}": fairness.trained_facts(
            read_run(run.workdir), run.workdir, run.stage, comparison.test
        )
        for arm in comparison.arms
        for run in arm.runs
    }
    fairness.require_equal(facts)
    return next(iter(facts.values()))


def _require_runs(comparison: Comparison) -> None:
    """Raise CheckpointError, with all of them, if runs of a comparison are missing."""
    problems = Problems()
    for arm, run in _runs(comparison):
        with problems.gather():
            if not (run.workdir / "config.json").is_file():
                again = RERUN if arm.grid else "restore it, or compare the other runs"
                raise CheckpointError(
                    f"{run.workdir}, the run of arm {arm.name} with seed {run.seed}, is missing "
                    f"from the comparison: {again}"
                )
    problems.settle()


def _require_scores(comparison: Comparison) -> None:
    """Raise CheckpointError, with all of them, if scores of the test evaluations cannot be read."""
    problems = Problems()
    for arm, run in _runs(comparison):
        for name in comparison.test:
            path = evaluation_folder(run, name) / "score.json"
            with problems.gather():
                if fault := _fault(path):
                    again = RERUN if arm.grid else (
                        f"run `vadapter eval {run.workdir} --stage={run.stage} --evals={name}`"
                    )  # fmt: skip
                    raise CheckpointError(
                        f"evaluation {name} of arm {arm.name}, seed {run.seed}: {path} {fault}; "
                        f"{again}"
                    )
    problems.settle()


def _fault(path: Path) -> str:
    """Return why a score file cannot be used; "" if it can."""
    if not path.is_file():
        return "is missing"
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    except (ValueError, TypeError, KeyError):
        return "is corrupt"
    return "" if isinstance(scores, dict) else "is corrupt"


def _compare(paths: Sequence[Path]) -> Comparison:
    problems, found = Problems(), list[Found]()
    for path in paths:
        with problems.gather():
            found += _find(storage.absolute(path), problems)
    problems.settle()
    groups: dict[str, dict[int, Found]] = {}  # arm -> seed -> stage
    for each in found:
        seeds = groups.setdefault(_recipe_digest(each), {})
        if twin := seeds.get(each.trained.seed):
            raise ConfigError(
                f"{twin.directory} and {each.directory} are the same arm with the same seed; "
                "give one of them"
            )
        seeds[each.trained.seed] = each
    arms = [[seeds[seed] for seed in sorted(seeds)] for seeds in groups.values()]
    if len(arms) < 2:
        raise ConfigError(
            f"{', '.join(map(str, paths))}: only one arm, {found[0].trained.stage}; a comparison "
            "needs two"
        )
    names = _names([runs[0].directory for runs in arms])
    loss, score = _metrics(found[0])
    return Comparison(
        name=", ".join(names),
        arms=tuple(
            Arm(name, tuple(each.trained for each in runs), {})
            for name, runs in zip(names, arms, strict=True)
        ),
        baseline=BASELINE if BASELINE in names else names[0],
        loss=loss,
        score=score,
        test=_scored(found),
    )


def _find(path: Path, problems: Problems) -> list[Found]:
    """Return the adapter stages of RUN, or that of RUN/STAGE, all of them finished."""
    inside = not (path / "config.json").is_file() and (path.parent / "config.json").is_file()
    workdir = path.parent if inside and not is_export(path.parent) else path
    recipe = read_run(workdir)
    if inside:
        require_one_of(f"{path}", path.name, recipe.stages)
    kinds = {n: recipe.stages[n].kind for n in ([path.name] if inside else recipe.chain)}
    names = [name for name, kind in kinds.items() if kind == "adapter"]
    if not names:
        listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise ConfigError(f"{path} has no stage of kind adapter, only {listed}")
    for name in names:
        with problems.gather():
            _require_finished(workdir / name, recipe.stages[name].steps)
    return [Found(_trained(workdir, recipe, name), recipe) for name in names]


def _require_finished(directory: Path, steps: int) -> None:
    if not (directory / DONE).is_file():
        reached = max((row["step"] for row in rows(directory / "metrics.jsonl")), default=0)
        raise CheckpointError(
            f"{directory} is not finished (step {reached} of {steps}): finish it with `vadapter "
            "train`, or name finished stages only, as RUN/STAGE"
        )


def _trained(workdir: Path, recipe: Recipe, name: str) -> Trained:
    lr, earlier = recipe.stages[name].optim.lr, earlier_stages(recipe, name)
    return Trained(workdir, name, recipe.seed, lr, earlier)


def _recipe_digest(found: Found) -> str:
    """Return a digest of what an arm is: everything of its stages but the seed."""
    recipe, trained = found.recipe, found.trained
    facts = []
    for name in (*trained.prior, trained.stage):
        stage = settings(recipe, name)
        start = {n: source.rpartition("/")[2] for n, source in recipe.stages[name].start.items()}
        facts.append({key: x for key, x in stage.items() if key != "seed"} | {"start": start})
    return digest(facts)


def _names(directories: Sequence[Path]) -> list[str]:
    """Return of each path the shortest end that no other one has."""
    paths = [f"/{path}" for path in directories]

    def shortest(path: str) -> str:
        words = path.split("/")
        ends = ("/".join(words[-count:]) for count in range(1, len(words) + 1))
        return next(end for end in ends if sum(p.endswith(f"/{end}") for p in paths) < 2)

    return [shortest(path) for path in paths]


def _metrics(found: Found) -> tuple[str, str]:
    """Return the first held-out loss and the first score, captions before answers; "" for none."""
    recipe, stage = found.recipe, found.recipe.stages[found.trained.stage]
    metrics = {"caption": "cider", "question": "accuracy"}
    scores = [
        f"{name}/{metric}"
        for task, metric in metrics.items()
        for name in stage.evals
        if recipe.data[recipe.evals[name].data].task == task
    ]
    losses = [f"{name}/loss" for name in stage.loss]
    return next(iter(losses), ""), next(iter(scores), "")


def _scored(found: Sequence[Found]) -> tuple[str, ...]:
    """Return the evaluations that all runs have been scored on."""
    names = found[0].recipe.evals
    return tuple(
        name
        for name in names
        if all((each.directory / "eval" / name / "score.json").is_file() for each in found)
    )


# -- the pages -----------------------------------------------------------------------------------


def default_folder(paths: Sequence[Path]) -> Path:
    """Return where the pages of runs are written: `compare` beside them, or in the only one."""
    if len(paths) == 1 and is_comparison(paths[0]):
        return paths[0]
    roots = [storage.absolute(path) for path in paths]
    common = os.path.commonpath([str(root) for root in roots])
    return storage.as_path(common.replace(":/", "://", 1) if ":/" in common else common) / "compare"


def write_record_of_runs(comparison: Comparison, facts: fairness.Facts, folder: Path) -> None:
    """Write the record of runs that are only read, on the first host; a trained one is left alone.

    Raises:
      ConfigError: the folder is a run, or that of another comparison which was trained there.
    """
    if is_export(folder) or (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is a run or an exported adapter; give another folder for the pages, "
            "--out=DIR"
        )
    root = storage.absolute(folder)
    if (folder / PARTS).is_dir() or any(arm.grid for arm in _existing(folder)):
        runs = (run for _, run in _runs(comparison))
        inside = all(root in storage.absolute(run.workdir).parents for run in runs)
        if not (inside and any(arm.grid for arm in comparison.arms)):
            raise ConfigError(
                f"{folder}: another comparison was trained there; give another folder for the "
                "pages, --out=DIR"
            )
        return
    if hosts.first():
        recipes = {arm.name: digest(read_run(arm.runs[0].workdir)) for arm in comparison.arms}
        write_record(
            comparison, folder, finished=True, digests=fairness.digests(facts), recipes=recipes
        )


def _runs(comparison: Comparison) -> list[tuple[Arm, Trained]]:
    return [(arm, run) for arm in comparison.arms for run in arm.runs]


def _existing(folder: Path) -> tuple[Arm, ...]:
    """Return the arms of the comparison in a folder; none without a readable record."""
    try:
        return read_record(folder)[0].arms
    except CheckpointError:
        return ()
