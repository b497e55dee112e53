"""What `vadapter inspect` looks at: adapter stages of runs, or the arms of a comparison."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vadapter.checkpoints.manager import steps
from vadapter.config import require_one_of
from vadapter.console import listing
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import storage
from vadapter.io.json_files import COMPARISON, is_comparison
from vadapter.recipe.schema import Recipe
from vadapter.stages.restore import describing, read_run


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained stage, and the name under which it is shown.

    Attributes:
      label: unique among the subjects.
      workdir: the run directory.
      stage: of the run.
    """

    label: str
    workdir: Path
    stage: str


def find(folders: Sequence[Path], stage: str | None, overrides: Sequence[str]) -> list[Subject]:
    """Return the stages to look at: of each run, or of the arms of a comparison.

    Of a run these are all stages of kind `adapter` that have a checkpoint, in the order of its
    chain; or else the last stage that captions. Of an arm it is the run with the first seed.

    Args:
      folders: run directories, or one directory of a comparison.
      stage: of every run; None: see above.

    Raises:
      CheckpointError: no run, no checkpoint, or an arm's run is missing.
      ConfigError: an unknown stage, or one that does not write about images.
    """
    if any(is_comparison(folder) for folder in folders):
        if len(folders) > 1:
            raise ConfigError(
                f"{listing(folders)}: give one directory of a comparison, or run directories"
            )
        if stage is not None:
            raise ConfigError(
                f"--stage={stage}: the arms of a comparison have their stages; leave it out, or "
                "give run directories"
            )
        return _arms(folders[0])
    subjects = []
    for folder in folders:
        recipe = read_run(folder, overrides)
        name = storage.absolute(folder).name
        for each in [stage] if stage else _adapters(recipe, folder):
            _check(recipe, folder, each)
            label = each if len(folders) == 1 else name if stage else f"{name}/{each}"
            subjects.append(Subject(label, folder, each))
    return _distinct(subjects)


def _adapters(recipe: Recipe, folder: Path) -> list[str]:
    ready = [name for name in describing(recipe) if steps(folder / name / "checkpoints")]
    if not ready:
        raise CheckpointError(
            f"{folder} has no checkpoint yet of a stage that can caption "
            f"({listing(describing(recipe)) or 'the chain has none'}). Wait until one is trained, "
            "or run `vadapter train`."
        )
    return [name for name in ready if recipe.stages[name].kind == "adapter"] or ready[-1:]


def _check(recipe: Recipe, folder: Path, stage: str) -> None:
    require_one_of(f"--stage={stage}", stage, recipe.stages)
    if stage not in describing(recipe):
        kind = recipe.stages[stage].kind
        raise ConfigError(
            f"--stage={stage}: a stage of kind {kind} says nothing about images; choose one of "
            f"{listing(describing(recipe))}"
        )
    if not steps(folder / stage / "checkpoints"):
        raise CheckpointError(f"no checkpoint yet in {folder / stage}: train that stage first")


def _distinct(subjects: list[Subject]) -> list[Subject]:
    """Return the subjects, with their run directories as labels where names are equal."""
    labels = [subject.label for subject in subjects]
    return [
        dataclasses.replace(s, label=f"{s.workdir}/{s.stage}") if labels.count(s.label) > 1 else s
        for s in subjects
    ]


def _arms(folder: Path) -> list[Subject]:
    """Return a run of each arm of a comparison, the one with the first seed."""
    path = folder / COMPARISON
    try:
        arms: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["arms"]
        runs = {name: arm["runs"][0] for name, arm in arms.items() if arm["runs"]}
        subjects = [Subject(n, folder / run["run"], run["stage"]) for n, run in runs.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({error!r}): rerun the command that trained the comparison"
        ) from None
    if not subjects:
        raise CheckpointError(f"the comparison in {folder} has no trained run yet")
    missing = [s for s in subjects if not steps(s.workdir / s.stage / "checkpoints")]
    if missing:
        names = listing(f"{s.label} ({s.workdir})" for s in missing)
        raise CheckpointError(
            f"{path} names runs that are not there: {names}. Copy the directory of the comparison "
            "with all of its runs, or rerun the command that trained it"
        )
    return subjects
