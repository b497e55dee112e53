"""How far the runs of a comparison are, read from their directories."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.checkpoints.array_io import read_meta
from vadapter.checkpoints.manager import steps
from vadapter.compare import fairness
from vadapter.compare.plan import PlannedRun
from vadapter.config import differences, plain, resolve
from vadapter.console import difference_table
from vadapter.errors import CheckpointError, NonFiniteError, Problems
from vadapter.io import storage
from vadapter.io.json_files import write_json
from vadapter.recipe.schema import Recipe, StageConfig, used_data
from vadapter.stages import initialization
from vadapter.stages.restore import read_run
from vadapter.stages.stage import Stage, settings

DIVERGED = "diverged.json"  # in the directory of a run whose training diverged


def finished(recipe: Recipe, workdir: Path) -> bool:
    """Return whether all stages of a run are finished."""
    return all((workdir / name / initialization.DONE).is_file() for name in recipe.chain)


def outcome(run: PlannedRun, metric: str) -> float | None:
    """Return the validation loss of a run, infinite if it diverged; None: not finished.

    Raises:
      CheckpointError: the run was finished without measuring the metric.
    """
    if (run.workdir / DIVERGED).is_file():
        return math.inf
    if not finished(run.recipe, run.workdir):
        return None
    directory = run.workdir / run.trained.stage
    scores = initialization.finished(directory).get("scores", {})
    if metric not in scores:
        raise CheckpointError(
            f"{directory} was trained without measuring {metric} (it has "
            f"{', '.join(scores) or 'nothing'}): use the validation_loss of before, or another "
            "--workdir"
        )
    loss = float(scores[metric])
    return loss if math.isfinite(loss) else math.inf


def write_diverged(run: PlannedRun, error: NonFiniteError) -> None:
    """Record that a run diverged, so that it is not trained again."""
    identity = {name: settings(run.recipe, name) for name in run.recipe.chain}
    write_json(run.workdir / DIVERGED, {"error": str(error), "identity": plain(identity)})


def reads_as_before(recipe: Recipe, workdir: Path, *names: str) -> bool:
    """Return whether a run that has begun read data sets from the same sources.

    `names` are the data sets, by default all that its stages are trained and measured on. True
    without a run.
    """
    if not (workdir / "config.json").is_file():
        return True
    before = read_run(workdir).data
    used = {name for stage in recipe.stages.values() for name in used_data(recipe, stage)}
    return all(
        name in before and plain(before[name].source) == plain(recipe.data[name].source)
        for name in names or used
    )


# -- does a directory fit ------------------------------------------------------------------------


def require_same(
    recipe: Recipe, workdir: Path, root: Path, problems: Problems, content: Mapping[str, Any] = {}
) -> None:
    """Collect in `problems` if stages of a run directory were trained with another recipe.

    Args:
      root: of the comparison; messages name the directories in it.
      content: fingerprints of data sets by name, as they are now, as far as they are known.
    """
    for name in recipe.chain:
        before = _recorded(workdir, name)
        if before is None:
            continue
        now: dict[str, Any] = Stage.upgrade_identity(plain(settings(recipe, name)))
        saved = {key: before[key] for key in now if key in before}
        known = before["measured"] | before.get("fingerprints", {})
        for data, fingerprint in content.items():
            if data in known:
                saved[f"content of {data}"] = known[data]
                now[f"content of {data}"] = fingerprint
        for component, digest in _starts(recipe.stages[name]).items():
            if component in before.get("start", {}):
                saved[f"start of {component}"] = before["start"][component]
                now[f"start of {component}"] = digest
        if name == recipe.chain[-1] and (workdir / "config.json").is_file():
            saved["protocol"] = fairness.protocol(read_run(workdir), name)
            now["protocol"] = fairness.protocol(recipe, name)
        with problems.gather(str((workdir / name).relative_to(root))):
            if rows := differences(saved, now):
                raise CheckpointError(
                    "was trained with another recipe:\n"
                    + difference_table(rows)
                    + "\nUse another --workdir, the previous configuration, or remove the run from "
                    f"{root} to train it again."
                )


def _starts(stage: StageConfig) -> dict[str, str]:
    """Return the digests of the components that start from a finished stage of another run."""
    digests = {}
    for component, source in stage.start.items():
        directory = storage.as_path(resolve(source))
        if "/" in source and (directory / initialization.DONE).is_file():
            stored = initialization.finished(directory)["components"]
            name = stage.rename.get(component, component)
            digests |= {component: stored[name]} if name in stored else {}
    return digests


def _recorded(workdir: Path, stage: str) -> dict[str, Any] | None:
    """Return what a stage was trained with, as far as it is recorded; None: it never began.

    Beside its identity, `measured` has what `fairness.measured_content` returns.
    """
    directory = workdir / stage
    if (directory / initialization.DONE).is_file():
        record = initialization.finished(directory)
        return _with_measured(workdir, stage, record["identity"], record)
    for step in reversed(steps(directory / "checkpoints")):
        try:
            meta = read_meta(directory / "checkpoints" / str(step))
        except CheckpointError:  # corrupt: training takes the one before, too
            continue
        return _with_measured(workdir, stage, meta, meta)
    if (workdir / DIVERGED).is_file():
        record = json.loads((workdir / DIVERGED).read_text(encoding="utf-8"))
        identity = record["identity"].get(stage)
        return identity and identity | {"measured": {}}
    return None


def _with_measured(
    workdir: Path, stage: str, identity: Mapping[str, Any], record: Mapping[str, Any]
) -> dict[str, Any]:
    known = "measured" in record or (workdir / "config.json").is_file()
    measured = (
        fairness.measured_content(read_run(workdir), workdir / stage, record) if known else {}
    )
    return Stage.upgrade_identity(identity) | {"measured": measured}
