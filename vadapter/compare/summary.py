"""What a comparison shows, in sentences made from its numbers: no more than they say."""

from collections.abc import Iterator, Sequence
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
from vadapter.compare.provenance import machine
from vadapter.compare.table import (
    at_chance,
    best,
    formatter,
    interval,
    metric_title,
    on_items,
    points,
    ratios,
    signed,
    spread,
    times,
    title,
)
from vadapter.config import plain
from vadapter.metrics.blind_baselines import NAMES
from vadapter.metrics.bootstrap import Difference
from vadapter.recipe.schema import trained, used_data
from vadapter.stages.restore import read_run

# Keys of a stage that may differ between arms, beside the learning rate, which is in a table.
_SCHEDULE = ("steps", "accumulate", "use_dropout", "eval_every")


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
    what = f"{title(criterion)}{on_items(criterion)}"
    if at_chance(measured, criterion):
        return Finding(f"{what}: {_chance(measured, criterion)}")
    lines = []
    for arm in _others(measured):
        seeds = reached(measured, arm, criterion)
        if any(each.point for each in seeds):
            lines.append(f"{arm.name} reaches it {_when(measured, arm, seeds)}.")
        elif seeds:
            own = spread(best(arm, criterion), show, " ")
            lines.append(f"{arm.name} never does; its best is {own}.")
    goal_text = spread(goal, show, " ")
    return Finding(f"{what}: {baseline.name}'s best is {goal_text}.", lines)


def _chance(measured: Measured, criterion: Criterion) -> str:
    """Say that the baseline's best is no better than a guess, and which arms are above that."""
    blind = criterion.blind or 0.0
    above = [
        f"{arm.name} {points(own.mean)}"
        for arm in measured.arms
        if (own := best(arm, criterion)) and own.mean > blind
    ]
    known = f"what {NAMES[criterion.metric]} reaches without an image ({points(blind)})"
    name = measured.baseline.name
    if above:
        return (
            f"{name}'s best is not above {known}, so speed to it says nothing; above it: "
            f"{', '.join(above)}."
        )
    return f"no arm's best is above {known}, so speed to {name}'s best says nothing."


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
            "over the evaluated items alone."
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
    limits += [*_blind(measured), *_other_seeds(measured), *_unequal(measured)]
    limits += _uncounted(measured)
    curves = [curve for arm in measured.arms for curve in arm.curves]
    if len(machines := sorted({machine(curve.run.workdir) for curve in curves})) > 1:
        listed = "; ".join(machines)
        limits.append(f"Seconds are of different machines and cannot be compared: {listed}.")
    limits += _beyond_the_curve(measured)
    return [Finding(text) for text in limits]


def _blind(measured: Measured) -> Iterator[str]:
    """Say which arms see blank images, whatever their names are."""
    for arm in measured.arms:
        for curve in arm.curves[:1]:
            recipe = read_run(curve.run.workdir)
            blank = [n for n, rows in recipe.data.items() if rows.blank]
            if set(blank) & {*used_data(recipe, recipe.stages[curve.run.stage])}:
                yield f"{arm.name} sees blank images, in {', '.join(blank)}: a blind control."


def _other_seeds(measured: Measured) -> Iterator[str]:
    """Say which arms have other seeds than the baseline, beside those that diverged."""

    def seeds(arm: MeasuredArm) -> list[int]:
        return sorted({curve.run.seed for curve in arm.curves} | {*arm.arm.diverged})

    baseline = measured.baseline
    for arm in _others(measured):
        if seeds(arm) != seeds(baseline):
            own, other = (", ".join(map(str, seeds(each))) for each in (arm, baseline))
            yield (
                f"{arm.name} has seeds {own} and {baseline.name} {other}: they read other batches, "
                "and the way to the baseline's best is over equal seeds alone."
            )


def _unequal(measured: Measured) -> Iterator[str]:
    """Say in which settings of their training arms differ."""
    settings = {}
    for arm in measured.arms:
        for curve in arm.curves[:1]:
            stage = plain(read_run(curve.run.workdir).stages[curve.run.stage])
            optim = {f"optim.{key}": x for key, x in stage["optim"].items() if key != "lr"}
            settings[arm.name] = {key: stage[key] for key in _SCHEDULE} | optim
    for key in next(iter(settings.values()), {}):
        values = {name: each[key] for name, each in settings.items()}
        if len({repr(value) for value in values.values()}) > 1:
            listed = ", ".join(f"{name} {value}" for name, value in values.items())
            yield f"Arms differ in {key}: {listed}."


def _uncounted(measured: Measured) -> Iterator[str]:
    """Say which arms start from something whose training is not counted."""
    for arm in measured.arms:
        for curve in arm.curves[:1]:
            run, recipe = curve.run, read_run(curve.run.workdir)
            counted, found = ("random", *run.prior), dict[str, str]()
            for name in (*run.prior, run.stage):
                stage = recipe.stages[name]
                for part in trained(stage):
                    known = "weights" if recipe.components[part].get("weights") else "random"
                    source = stage.start.get(part, known)
                    if source not in counted:
                        short = source.rpartition("/")[2]
                        found[part] = "public weights" if source == "weights" else f"stage {short}"
            if found:
                listed = ", ".join(f"{part} ({source})" for part, source in found.items())
                yield (
                    f"{arm.name} starts with what was trained before: {listed}. What that took is "
                    "not counted, nor in stage 1."
                )


def _beyond_the_curve(measured: Measured) -> Iterator[str]:
    """Say where the last score of the runs is on other items than the curve."""
    for criterion in measured.criteria:
        lasts = [
            point.values.get(criterion.count_key)
            for arm in measured.arms
            for curve in arm.curves
            if curve.finished
            and curve.points
            and criterion.key in (point := curve.points[-1]).values
        ]
        if criterion.count is not None and any(count != criterion.count for count in lasts):
            yield (
                f"The curve of {criterion.key} is over {criterion.count:,.0f} items and lacks the "
                "last step of runs, which was evaluated on others. The best, and when it was "
                "reached, are of the steps before; train with eval_limit=0 to include the last."
            )
