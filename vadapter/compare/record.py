"""`compare.json`: what a comparison consists of, in its directory.

    {"format": "vadapter-comparison", "finished": true,
     "name", "baseline", "loss", "score", "test": [EVAL, …],      as in `Comparison`
     "arms": {ARM: {"lr": the chosen rate, "grid": {RATE: loss, null if training diverged},
                    "runs": [{"run": directory, "stage", "seed", "lr", "prior": [STAGE, …]}, …],
                    "diverged": [SEED, …], "recipe": digest}},
     "digests": {"data", "protocol", "frozen"}, "version", "commit"}

Directories of runs are relative to that of the comparison, or absolute if they are outside it. The
record is written again after every run, so that whatever a killed comparison has is in it.
"""

import functools
import json
import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import vadapter
from vadapter.compare.comparison import Arm, Comparison, Trained
from vadapter.errors import CheckpointError
from vadapter.io import storage
from vadapter.io.json_files import COMPARISON, write_json

FORMAT = "vadapter-comparison"


def write_record(
    comparison: Comparison, folder: Path, *, finished: bool, digests: Mapping[str, str],
    recipes: Mapping[str, str],
) -> None:  # fmt: skip
    """Write `compare.json`.

    Args:
      digests: of data, protocol and frozen components.
      recipes: digest of the recipe of each arm.
    """
    arms = {arm.name: _arm(arm, folder) | {"recipe": recipes[arm.name]} for arm in comparison.arms}
    record = {
        "format": FORMAT,
        "finished": finished,
        "name": comparison.name,
        "baseline": comparison.baseline,
        "loss": comparison.loss,
        "score": comparison.score,
        "test": list(comparison.test),
        "arms": arms,
        "digests": dict(digests),
        "version": vadapter.__version__,
        "commit": commit(),
    }
    write_json(folder / COMPARISON, record)


def _arm(arm: Arm, folder: Path) -> dict[str, Any]:
    return {
        "lr": arm.runs[0].lr if arm.runs else None,
        "grid": {repr(lr): x if math.isfinite(x) else None for lr, x in arm.grid.items()},
        "runs": [_run(run, folder) for run in arm.runs],
        "diverged": list(arm.diverged),
    }


def _run(run: Trained, folder: Path) -> dict[str, Any]:
    workdir, root = storage.absolute(run.workdir), storage.absolute(folder)
    inside = root in workdir.parents
    path = str(workdir.relative_to(root)) if inside else str(workdir)
    return {"run": path, "stage": run.stage, "seed": run.seed, "lr": run.lr,
            "prior": list(run.prior)}  # fmt: skip


def read_record(folder: Path) -> tuple[Comparison, dict[str, Any]]:
    """Return the comparison in a directory and its whole record.

    Raises:
      CheckpointError: there is no record, it is corrupt, or the comparison is not finished.
    """
    path = folder / COMPARISON
    if not path.is_file():
        raise CheckpointError(f"no comparison in {folder}: there is no {path.name}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format is {record['format']!r}")
        keys = ("name", "baseline", "loss", "score")
        fields = {key: str(record[key]) for key in keys}
        arms = tuple(_read_arm(name, arm, folder) for name, arm in record["arms"].items())
        finished, test = bool(record["finished"]), tuple(record["test"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({error!r}): rerun the command that trained the comparison; it "
            "skips what is finished and writes the file again"
        ) from None
    if not finished:
        count = sum(len(arm.runs) for arm in arms)
        raise CheckpointError(
            f"the comparison in {folder} is not finished ({count} of its runs so far): rerun "
            "the command that trains it; it resumes where it stopped"
        )
    return Comparison(**fields, arms=arms, test=test), record


def _read_arm(name: str, arm: dict[str, Any], folder: Path) -> Arm:
    grid = {float(lr): math.inf if x is None else float(x) for lr, x in arm["grid"].items()}
    runs = tuple(
        Trained(
            folder / run["run"], run["stage"], int(run["seed"]), float(run["lr"]),
            tuple(run["prior"]),
        )
        for run in arm["runs"]
    )  # fmt: skip
    return Arm(name, runs, grid, tuple(arm["diverged"]))


@functools.cache
def commit() -> str | None:
    """Return the commit of the package's source; None if it is not in a Git repository."""
    package = Path(vadapter.__file__).resolve().parent
    command = ["git", "-C", str(package), "log", "-1", "--format=%H", "--", "."]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
