"""What is compared: arms, each with one trained stage per seed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vadapter.io import storage


@dataclass(frozen=True)
class Trained:
    """One stage of one run: what an arm trained with one seed.

    Attributes:
      workdir: the run directory.
      stage: the adapter stage.
      seed: of the run.
      lr: peak learning rate of the stage.
      prior: stages of the same run that belong to the arm and came before this one (stage 1); their
        cost is counted in "with stage 1".
    """

    workdir: Path
    stage: str
    seed: int
    lr: float
    prior: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One connector of a comparison.

    Attributes:
      name: unique in the comparison.
      runs: one per seed, at the chosen learning rate.
      grid: validation loss by learning rate at the first seed, infinite where training diverged;
        empty for runs that are only read.
      diverged: seeds whose training diverged at the chosen learning rate: they have no run.
    """

    name: str
    runs: tuple[Trained, ...]
    grid: Mapping[float, float]
    diverged: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Arms that differ in their connector alone.

    Attributes:
      name: of the comparison.
      arms: in the order in which they are shown.
      baseline: name of the arm that the others are measured against.
      loss: metric of a validation loss, NAME/loss; what learning rates are chosen by.
      score: metric of a validation score, NAME/SCORE; "" if there is none.
      test: names of the evaluations that are run once, on the finished runs.
    """

    name: str
    arms: tuple[Arm, ...]
    baseline: str
    loss: str
    score: str
    test: tuple[str, ...]


def evaluation_folder(run: Trained, name: str) -> Path:
    """Return the folder of an evaluation of a run."""
    return storage.as_path(run.workdir) / run.stage / "eval" / name
