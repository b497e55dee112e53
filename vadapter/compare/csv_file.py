"""The tables of a comparison for analyses of one's own.

compare.csv has every logged step of every run, `curves_of` reads it back; runs.csv has a row per
run with what it took and all its scores at the end.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vadapter.compare.comparison import Arm, Comparison, Trained, evaluation_folder
from vadapter.compare.curves import AXES, Curve, Measured, MeasuredArm, Point, criteria
from vadapter.compare.provenance import Origin
from vadapter.compare.record import commit
from vadapter.io import storage
from vadapter.metrics import judgments
from vadapter.stages.initialization import DONE, finished


class Record(NamedTuple):
    """What a row of compare.csv is made of."""

    measured: Measured
    arm: MeasuredArm
    curve: Curve
    point: Point
    origin: Origin
    commit: str

    def logged(self, key: str) -> float | None:
        """Return a value of metrics.jsonl at this step; None if it was not logged."""
        return self.point.values.get(key)


class Column(NamedTuple):
    """A column of compare.csv."""

    meaning: str
    value: Callable[[Record], Any]  # None: an empty cell


def _loss(suffix: str) -> Callable[[Record], float | None]:
    return lambda r: r.logged(r.measured.comparison.loss + suffix)


def _spent(axis: str, counted: bool) -> Callable[[Record], float]:
    return lambda r: r.curve.spent(r.point, axis, counted)


def _score(metric: str) -> Callable[[Record], float | None]:
    """Return how to read another score of the evaluation of the comparison's score."""
    return lambda r: r.logged(f"{r.measured.comparison.score.rpartition('/')[0]}/{metric}")


COLUMNS: dict[str, Column] = {
    "arm": Column("name of the arm", lambda r: r.arm.name),
    "seed": Column("of the run", lambda r: r.curve.run.seed),
    "lr": Column("peak learning rate of the stage", lambda r: r.curve.run.lr),
    "stage": Column("name of the stage in the run", lambda r: r.curve.run.stage),
    **{axis: Column(AXES[axis].meaning, _spent(axis, False)) for axis in AXES},
    **{
        f"{axis}_with_stage_1": Column("the same with the arm's earlier stages", _spent(axis, True))
        for axis in AXES
    },
    "training_loss": Column(
        "nats per target, mean over the steps since the row before", lambda r: r.logged("loss")
    ),
    "held_out_loss": Column("nats per target on held-out data", _loss("")),
    "held_out_loss_wrong": Column("the same with another image", _loss("_wrong")),
    "held_out_loss_mean": Column("the same with the mean image", _loss("_mean")),
    "score": Column(
        "validation score, a share of 1", lambda r: r.logged(r.measured.comparison.score)
    ),
    "score_items": Column("number of items it was measured on", _score("n")),
    "captions_right": Column("share of right captions of the same items", _score(judgments.RIGHT)),
    "facts_right": Column("share of right facts in them", _score(judgments.FACTS)),
    "recipe": Column("SHA-256 of the run's recipe", lambda r: r.origin.recipe),
    "data": Column("SHA-256 of the training data, by content", lambda r: r.origin.data),
    "protocol": Column(
        "SHA-256 of how losses and scores are measured", lambda r: r.origin.protocol
    ),
    "frozen": Column("SHA-256 of the frozen components, by content", lambda r: r.origin.frozen),
    "commit": Column("of the source that wrote this file", lambda r: r.commit),
}


COUNTS = frozenset(
    {"seed", "score_items"}
    | {f"{axis}{end}" for axis in AXES if axis != "seconds" for end in ("", "_with_stage_1")}
)


def _cell(name: str, value: Any) -> Any:
    """Return what is written for a value: a count that is whole, as an integer."""
    if name in COUNTS and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def csv_text(measured: Measured, origins: Mapping[Trained, Origin]) -> str:
    """Return a row per logged step of every run, in the columns of `COLUMNS`.

    Numbers are written with all digits, counts as integers; what was not measured is an empty cell.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    source = commit() or ""
    for arm in measured.arms:
        for curve in arm.curves:
            for point in curve.points:
                record = Record(measured, arm, curve, point, origins[curve.run], source)
                writer.writerow(_cell(name, x.value(record)) for name, x in COLUMNS.items())
    return file.getvalue()


def curves_of(
    text: str, *, name: str, baseline: str, loss: str = "loss", score: str = "score"
) -> Measured:
    """Return the curves in the text of a compare.csv.

    They can be drawn and compared; run directories, costs of a step and blind scores are not known.

    Args:
      name: of the comparison.
      baseline, loss, score: as in `Comparison`.
    """
    table: dict[str, dict[int, list[dict[str, str]]]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        table.setdefault(row["arm"], {}).setdefault(int(row["seed"]), []).append(row)
    found = []
    for arm, seeds in table.items():
        curves = tuple(_curve(rows, loss, score) for rows in seeds.values())
        runs = tuple(curve.run for curve in curves)
        found.append(MeasuredArm(Arm(arm, runs, {}), None, curves))
    comparison = Comparison(
        name, tuple(arm.arm for arm in found), baseline, loss, score, test=()
    )  # fmt: skip
    return Measured(comparison, tuple(found), criteria(comparison, found))


def _curve(rows: list[dict[str, str]], loss: str, score: str) -> Curve:
    """Return the curve of one run."""
    evaluation = score.rpartition("/")[0]
    keys = {"training_loss": "loss", "held_out_loss": loss, "score": score}
    keys |= {"held_out_loss_wrong": f"{loss}_wrong", "held_out_loss_mean": f"{loss}_mean"}
    keys |= {"score_items": f"{evaluation}/n", "facts_right": f"{evaluation}/{judgments.FACTS}"}
    keys |= {"captions_right": f"{evaluation}/{judgments.RIGHT}"}
    points = tuple(
        Point(
            int(row["steps"]),
            {axis: float(row[axis]) for axis in AXES},
            {key: float(row[column]) for column, key in keys.items() if row.get(column)},
        )
        for row in rows
    )
    first = rows[0]
    before = {axis: float(first[f"{axis}_with_stage_1"]) - float(first[axis]) for axis in AXES}
    run = Trained(Path(), first["stage"], int(first["seed"]), float(first["lr"]))
    return Curve(run, points, before)


def runs_text(measured: Measured) -> str:
    """Return a row per run: what it took, and all its scores at the end, shares of 1.

    Scores are named EVALUATION/METRIC, losses DATA/METRIC. What a run lacks is an empty cell.
    """
    rows = []
    for arm in measured.arms:
        for curve in arm.curves:
            run, total = curve.run, curve.total
            row: dict[str, Any] = {"arm": arm.name, "seed": run.seed, "lr": run.lr}
            row["trained_parameters"] = arm.cost.trained if arm.cost else None
            counted = {f"{axis}_with_stage_1": total[axis] + curve.before[axis] for axis in AXES}
            row |= {key: _cell(key, x) for key, x in (total | counted).items()}
            rows.append(row | _final_scores(run))
    columns = dict.fromkeys(key for row in rows for key in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _final_scores(run: Trained) -> dict[str, float]:
    """Return the scores of the end of a run, and of evaluations since then."""
    directory = storage.as_path(run.workdir) / run.stage
    record = finished(directory) if (directory / DONE).is_file() else {}
    found = dict(sorted(record.get("scores", {}).items()))
    for path in sorted(evaluation_folder(run, "").glob("*/score.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        found |= {f"{path.parent.name}/{k}": x for k, x in sorted(record["scores"].items())}
    return found
