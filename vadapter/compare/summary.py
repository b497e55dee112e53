"""What a comparison shows, in sentences made from its numbers: no more than they say."""

from collections.abc import Sequence
from typing import NamedTuple

from vadapter.compare.curves import (
    Criterion,
    Measured,
    MeasuredArm,
    Reached,
    Spread,
    reached,
)
from vadapter.compare.final_scores import Evaluation, is_shown
from vadapter.compare.table import (
    best,
    formatter,
    interval,
    metric_title,
    ratios,
    signed,
    spread,
    times,
    title,
)
from vadapter.metrics.bootstrap import Difference


class Finding(NamedTuple):
    """A sentence, and one about each arm below it."""

    text: str
    arms: Sequence[str] = ()


def findings(measured: Measured, evaluations: Sequence[Evaluation]) -> dict[str, list[Finding]]:
    """Return what was found by heading: speed, final scores, and what limits both."""
    speed = [_speed(measured, criterion) for criterion in measured.criteria]
    final = [_final(measured, each) for each in evaluations]
    groups = {"Speed": speed, "Final scores": final, "Limits": _limits(measured)}
    return {name: [found for found in group if found] for name, group in groups.items()}


def _others(measured: Measured) -> list[MeasuredArm]:
    return [arm for arm in measured.arms if arm.name != measured.comparison.baseline]


def _speed(measured: Measured, criterion: Criterion) -> Finding | None:
    """Say which arms became as good as the baseline's best, and when."""
    show, baseline = formatter(criterion), measured.baseline
    if (goal := best(baseline, criterion)) is None:
        return None
    lines = []
    for arm in _others(measured):
        seeds = reached(measured, arm, criterion)
        if any(each.point for each in seeds):
            lines.append(f"{arm.name} reaches it {_when(measured, arm, seeds)}.")
        elif seeds:
            own = spread(best(arm, criterion), show, " ")
            lines.append(f"{arm.name} never does; its best is {own}.")
    goal_text = spread(goal, show, " ")
    return Finding(f"{title(criterion)}: {baseline.name}'s best is {goal_text}.", lines)


def _when(measured: Measured, arm: MeasuredArm, seeds: Sequence[Reached]) -> str:
    did = [each for each in seeds if each.point]
    part = f"in {len(did)} of {len(seeds)} seeds " if len(did) < len(seeds) else ""
    spent = Spread.of(each.curve.spent(each.point, "steps", False) for each in did if each.point)
    text = f"{part}after {spread(spent, '{:,.0f}'.format, ' ')} steps"
    if ratio := ratios(did, "steps", False):
        text += f": {times(ratio)} of what {measured.baseline.name} itself takes"
    if arm.staged and (ratio := ratios(did, "steps", True)):
        text += f", {times(ratio)} with stage 1 counted"
    return text


def _final(measured: Measured, evaluation: Evaluation) -> Finding | None:
    """Say how the arms differ from the baseline on the final items."""
    baseline = measured.baseline.name
    lines = [
        f"{arm.name}: {_difference(value)}."
        for arm in _others(measured)
        if (value := evaluation.differences.get((arm.name, baseline)))
    ]
    what = f"{evaluation.name}, {metric_title(evaluation.metric)}"
    text = f"{what}, on {evaluation.items:,} items, against {baseline}:"
    return Finding(text, lines) if lines else None


def _difference(value: Difference) -> str:
    if value.interval is None:
        return f"{signed(value.value)}, on too few images for an interval"
    text = f"{signed(value.value)} {interval(value.interval, signed)}"
    return text if is_shown(value) else f"{text}, within the interval: no difference is shown"


def _limits(measured: Measured) -> list[Finding]:
    """Say what the numbers do not cover."""
    limits = []
    counts = {len(arm.curves) for arm in measured.arms}
    if counts == {1}:
        limits.append(
            "One seed per arm: nothing here says how much another seed would change. Intervals are "
            "over test items alone."
        )
    elif 1 in counts:
        limits.append("Arms with one seed have no spread.")
    running = [
        f"{arm.name} seed {curve.run.seed}"
        for arm in measured.arms
        for curve in arm.curves
        if not curve.finished
    ]
    if running:
        limits.append(f"Not finished, with the numbers so far: {', '.join(running)}.")
    for arm in measured.arms:
        if arm.arm.diverged:
            seeds = ", ".join(map(str, arm.arm.diverged))
            limits.append(f"{arm.name} diverged with seed {seeds}, which is in no mean.")
    return [Finding(text) for text in limits]
