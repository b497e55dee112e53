"""The runs of a comparison as curves: what was measured at a step, and what it had cost by then.

A curve is read from `metrics.jsonl` alone, so a run that is still training has one, too. Two
criteria say how good a stage is: the held-out loss and, where the comparison names one, a score.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vadapter.compare.comparison import Arm, Comparison, Trained, evaluation_folder
from vadapter.compare.costs import Cost, stage_costs
from vadapter.io import storage
from vadapter.io.json_files import history, lines
from vadapter.metrics.blind_baselines import blind_scores
from vadapter.stages.initialization import DONE

Spent = dict[str, float]  # amount by name of an axis


class Axis(NamedTuple):
    """What a curve can be drawn against."""

    title: str
    meaning: str


AXES = {
    "steps": Axis("steps", "optimizer steps"),
    "samples": Axis("samples", "rows of the batches, with repetitions"),
    "llm_tokens": Axis(
        "LLM tokens",
        "tokens that the frozen LLM reads, padding included: prompt, visual tokens and text",
    ),
    "flops": Axis(
        "training FLOPs",
        "of matrix products and convolutions, forward and backward; a frozen encoder whose tokens "
        "are cached is not counted",
    ),
    "seconds": Axis(
        "seconds",
        "time in training steps, waiting for data and saving checkpoints included, without "
        "compilation, evaluation and interruptions",
    ),
}


class Point(NamedTuple):
    """What a run logged at one step, and what it had spent by then."""

    step: int
    spent: Spent
    values: Mapping[str, float]


@dataclass(frozen=True)
class Curve:
    """One run of an arm.

    Attributes:
      run: the stage that was trained.
      points: by step.
      before: what the stages of the arm before this one spent; 0 everywhere without such stages.
    """

    run: Trained
    points: tuple[Point, ...]
    before: Spent

    @property
    def finished(self) -> bool:
        """Whether the stage is trained to its end."""
        return (storage.as_path(self.run.workdir) / self.run.stage / DONE).is_file()

    def spent(self, point: Point, axis: str, counted: bool) -> float:
        """Return what was spent at a point, with stage 1 if it is `counted`."""
        return point.spent[axis] + counted * self.before[axis]

    @property
    def total(self) -> Spent:
        """What the stage itself has spent so far."""
        return self.points[-1].spent if self.points else dict.fromkeys(AXES, 0.0)


@dataclass(frozen=True)
class Criterion:
    """A validation metric by which arms are compared.

    Attributes:
      key: NAME/METRIC in metrics.jsonl.
      higher: whether more is better; a loss is better if it is lower.
      count: number of items of the evaluations that count. A score depends on the items, so those
        of another number are left out; None: all count.
      blind: the score of a baseline that sees no image, on the same items; None if it is not known.
    """

    key: str
    higher: bool
    count: float | None = None
    blind: float | None = None

    @property
    def metric(self) -> str:
        """The metric without the name of the evaluation."""
        return self.key.rpartition("/")[2]

    @property
    def count_key(self) -> str:
        """The key of the number of items."""
        return f"{self.key.rpartition('/')[0]}/n"

    def series(self, curve: Curve) -> list[tuple[Point, float]]:
        """Return the points at which it was measured and finite, with the values."""
        return [
            (point, point.values[self.key])
            for point in curve.points
            if math.isfinite(point.values.get(self.key, math.nan))
            and (self.count is None or point.values.get(self.count_key) == self.count)
        ]

    def best(self, curve: Curve) -> tuple[Point, float] | None:
        """Return the first of the best points with its value; None if it was never measured."""
        sign = 1 if self.higher else -1
        return max(self.series(curve), key=lambda item: sign * item[1], default=None)

    def reach(self, curve: Curve, target: float) -> Point | None:
        """Return the first point that is at least as good as a target; None: never."""
        sign = 1 if self.higher else -1
        reached = (point for point, y in self.series(curve) if sign * y >= sign * target)
        return next(reached, None)


@dataclass(frozen=True)
class MeasuredArm:
    """An arm with what was measured: its curves, in the order of its runs, and what a step costs.

    An arm of which every seed diverged has neither.
    """

    arm: Arm
    cost: Cost | None
    curves: tuple[Curve, ...]

    @property
    def name(self) -> str:
        """The name of the arm."""
        return self.arm.name

    @property
    def staged(self) -> bool:
        """Whether it trained anything before the stage that is compared."""
        return any(any(curve.before.values()) for curve in self.curves)


@dataclass(frozen=True)
class Measured:
    """A comparison with what was measured: its arms in order, and the criteria, score first."""

    comparison: Comparison
    arms: tuple[MeasuredArm, ...]
    criteria: tuple[Criterion, ...]

    @property
    def baseline(self) -> MeasuredArm:
        """The arm that the others are measured against."""
        return next(arm for arm in self.arms if arm.name == self.comparison.baseline)


def measure(comparison: Comparison) -> Measured:
    """Read what the runs of a comparison have measured so far.

    Raises:
      CheckpointError: a run directory without a run or a tokenizer.
      ConfigError: the recipe of a run is not valid.
    """
    arms = tuple(_measure_arm(arm) for arm in comparison.arms)
    return Measured(comparison, arms, criteria(comparison, arms))


def _measure_arm(arm: Arm) -> MeasuredArm:
    if not arm.runs:
        return MeasuredArm(arm, None, ())
    first = arm.runs[0]  # the other runs differ in their seed alone
    costs = stage_costs(first.workdir, (*first.prior, first.stage))
    curves = tuple(read_curve(run, costs) for run in arm.runs)
    return MeasuredArm(arm, costs[first.stage], curves)


def criteria(comparison: Comparison, arms: Iterable[MeasuredArm]) -> tuple[Criterion, ...]:
    """Return the criteria that were measured at least once, the score before the loss."""
    curves = [curve for arm in arms for curve in arm.curves]
    score = Criterion(comparison.score, higher=True)
    counts = Counter(
        point.values.get(score.count_key) for curve in curves for point, _ in score.series(curve)
    )
    if counts:  # the usual number of items; of two that are as usual, the larger
        count = max(counts, key=lambda n: (counts[n], n or 0))
        score = Criterion(comparison.score, True, count, _blind(score, count, curves))
    criteria = (score, Criterion(comparison.loss, higher=False))
    return tuple(c for c in criteria if any(c.series(curve) for curve in curves))


def _blind(score: Criterion, count: float | None, curves: Iterable[Curve]) -> float | None:
    """Return the score of the baseline on the first `count` items, those of the curve.

    They are read from the evaluation at the end of a run; None before there is one.
    """
    name = score.key.rpartition("/")[0]
    for curve in curves:
        rows = list(lines(evaluation_folder(curve.run, name) / "predictions.jsonl"))
        if (
            count
            and len(rows) >= count
            and (found := blind_scores(rows[: int(count)], score.metric))
        ):
            return float(np.mean(found))
    return None


def read_curve(run: Trained, costs: Mapping[str, Cost]) -> Curve:
    """Return the curve of a run; costs by stage, of this one and those before it."""
    workdir = storage.as_path(run.workdir)
    before = dict.fromkeys(AXES, 0.0)
    for name in run.prior:
        total = Curve(run, _points(workdir / name, costs[name]), before).total
        before = {axis: before[axis] + total[axis] for axis in AXES}
    return Curve(run, _points(workdir / run.stage, costs[run.stage]), before)


def _points(directory: Path, cost: Cost) -> tuple[Point, ...]:
    """Return one point per step that has a row; of a repeated step only the last attempt."""
    rows = history(directory / "metrics.jsonl")
    values: dict[int, dict[str, float]] = {}
    for row in rows:
        logged = {key: x for key, x in row.items() if key not in ("step", "attempt", "time")}
        values.setdefault(row["step"], {}).update(logged)
    each = {"steps": 1, "samples": cost.samples, "flops": cost.flops, "llm_tokens": cost.llm_tokens}
    seconds = np.interp(list(values), *_clock(values)) if values else []
    return tuple(
        Point(step, {"seconds": float(s)} | {axis: step * x for axis, x in each.items()}, logged)
        for (step, logged), s in zip(values.items(), seconds, strict=True)
    )


def _clock(values: Mapping[int, Mapping[str, float]]) -> tuple[Sequence[int], Sequence[float]]:
    """Return steps, from 0, and the seconds spent in steps until then.

    `step_ms` of a row is a mean over the steps since the row before. After a resume it is over
    those of the new attempt, and taken for those of the attempt before.
    """
    steps, seconds = [0], [0.0]
    for step, row in values.items():
        if "step_ms" in row:
            seconds.append(seconds[-1] + row["step_ms"] / 1000 * (step - steps[-1]))
            steps.append(step)
    return steps, seconds


# -- what seeds have in common -------------------------------------------------------------------


class Spread(NamedTuple):
    """A value over the seeds of an arm."""

    mean: float
    low: float
    high: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Return mean, minimum and maximum; None without values."""
        values = list(values)
        if not values:
            return None
        return cls(float(np.mean(values)), min(values), max(values), len(values))


class Band(NamedTuple):
    """A criterion of an arm against an axis, over its seeds; arrays of the same length."""

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    seeds: int


def band(arm: MeasuredArm, criterion: Criterion, axis: str, counted: bool) -> Band | None:
    """Return mean, minimum and maximum at the steps that all seeds have measured; None: at none.

    Seeds that have measured nothing yet are left out. Seconds are means over the seeds.
    """
    series = [
        {point.step: (curve.spent(point, axis, counted), y) for point, y in points}
        for curve in arm.curves
        if (points := criterion.series(curve))
    ]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return None
    x, y = np.array([[one[step] for step in steps] for one in series]).transpose(2, 0, 1)
    return Band(x.mean(0), y.mean(0), y.min(0), y.max(0), len(series))


class Reached(NamedTuple):
    """Where one seed of an arm is as good as the baseline's best of the same seed."""

    curve: Curve
    point: Point | None  # None: never
    baseline: Curve
    target: float  # the baseline's best
    own: Point  # where the baseline itself reached it first

    def ratio(self, axis: str, counted: bool) -> float | None:
        """Return what it took over what the baseline took; None: never reached."""
        own = self.baseline.spent(self.own, axis, counted)
        if self.point is None or not own:
            return None
        return self.curve.spent(self.point, axis, counted) / own


def reached(measured: Measured, arm: MeasuredArm, criterion: Criterion) -> list[Reached]:
    """Return one entry for each seed that both the arm and the baseline have measured."""
    baselines = {curve.run.seed: curve for curve in measured.baseline.curves}
    found = []
    for curve in arm.curves:
        baseline = baselines.get(curve.run.seed)
        best = criterion.best(baseline) if baseline else None
        if baseline is not None and best is not None and criterion.series(curve):
            own, target = best
            found.append(Reached(curve, criterion.reach(curve, target), baseline, target, own))
    return found
