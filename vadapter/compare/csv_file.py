"""compare.csv: every logged step of every run of a comparison, for analyses of one's own."""

import csv
import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vadapter.compare.comparison import Trained
from vadapter.compare.curves import AXES, Curve, Measured, MeasuredArm, Point
from vadapter.compare.provenance import Origin
from vadapter.compare.record import commit
from vadapter.metrics import judgments


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
