"""The tables of a comparison, as cells: — is not measured, a second line is a range."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from vadapter.compare.costs import Cost
from vadapter.compare.curves import (
    AXES,
    Criterion,
    Measured,
    MeasuredArm,
    Reached,
    Spread,
    reached,
)
from vadapter.compare.final_scores import Evaluation, FinalScore, is_shown
from vadapter.console import listing
from vadapter.metrics import bootstrap
from vadapter.metrics.blind_baselines import NAMES
from vadapter.metrics.bootstrap import Difference, Interval
from vadapter.metrics.judgments import is_judged

Row = tuple[str, ...]

NONE, NEVER = "—", "never"
BLIND = "blind (no image)"  # name of the row of baselines that see no image
SHOWN = ("steps", "flops", "seconds")  # axes of the table of what it took
_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Table(NamedTuple):
    """One table of a comparison."""

    title: str
    header: Row
    rows: list[Row]
    note: str
    marked: Collection[tuple[int, int]] = ()  # (row, column) of cells to be emphasized
    #: what the first column names: arms, arms like the header (pairs), or anything else
    kind: Literal["arms", "pairs", "words"] = "arms"


# -- cells ---------------------------------------------------------------------------------------


def compact(value: float, unit: str = "") -> str:
    """Return a count or an amount with three digits: `875`, `1.24M`; `3.1 PFLOP` with a unit."""
    power, prefix = _power(value)
    gap = " " if unit else ""
    return f"{value / power:.3g}{gap}{prefix}{unit}"


def _power(value: float) -> tuple[float, str]:
    # 999.5k would print as 1e+03k
    return next(((n, prefix) for n, prefix in _PREFIXES if value >= 0.9995 * n), (1.0, ""))


def amounts(axis: str, value: Spread) -> str:
    """Return an amount on an axis over the seeds: `1,200 (800–1,600)`, `3.1 (3–3.2) PFLOP`."""
    if axis == "flops":
        power, prefix = _power(value.mean)
        return spread(value, lambda x: f"{x / power:.3g}", " ") + f" {prefix}FLOP"
    return spread(value, "{:,.0f}".format, " ") + " s" * (axis == "seconds")


def times(value: Spread) -> str:
    """Return a ratio over the seeds: `0.69× (0.60–0.86)`."""
    mean, *ends = spread(value, "{:.2f}".format, " ").split(" ")
    return " ".join([f"{mean}×", *ends])


def points(value: float) -> str:
    """Return a score in hundredths, with one digit: `56.8`."""
    return f"{100 * value:.1f}"


def nats(value: float) -> str:
    """Return a loss in nats per token."""
    return f"{value:.3f}"


def formatter(criterion: Criterion) -> Callable[[float], str]:
    """Return the function that writes values of a criterion."""
    return points if criterion.higher else nats


def title(criterion: Criterion) -> str:
    """Return what a criterion measures, with its unit: `captions, CIDEr × 100`."""
    return ", ".join(_parts(criterion))


def on_items(criterion: Criterion) -> str:
    """Return on how many items it is measured, after a comma; "" if that does not matter."""
    return "" if criterion.count is None else f", on {criterion.count:,.0f} items"


def _parts(criterion: Criterion) -> tuple[str, str]:
    name, _, metric = criterion.key.rpartition("/")
    return name, metric_title(metric) if criterion.higher else "loss in nats per token"


def metric_title(metric: str) -> str:
    """Return the name of a score with its unit."""
    if is_judged(metric):
        what, _, kind = metric.partition("_")
        return f"{what} right in %" if what == "captions" else f"{kind} facts right in %".lstrip()
    return {"cider": "CIDEr × 100", "accuracy": "accuracy in %"}.get(metric, f"{metric} × 100")


def spread(value: Spread | None, show: Callable[[float], str], gap: str = "\n") -> str:
    """Return a mean, and minimum and maximum over seeds unless they are equal: `56.8⏎(55–58)`."""
    if value is None:
        return NONE
    mean, low, high = map(show, value[:3])
    return mean if low == high else f"{mean}{gap}({low}–{high})"


def interval(ends: Interval | None, show: Callable[[float], str] = points) -> str:
    """Return a 95 % interval in brackets; "" without one."""
    return f"[{show(ends[0])}, {show(ends[1])}]" if ends else ""


def signed(value: float) -> str:
    """Return a difference of scores in hundredths with its sign; the minus sign is a true one."""
    return f"{100 * value:+z.1f}".replace("-", "\N{MINUS SIGN}")


def difference(value: Difference) -> str:
    """Return a difference and its interval."""
    return f"{signed(value.value)}\n{interval(value.interval, signed)}".rstrip()


def visual_tokens(counts: Mapping[str, int]) -> str:
    """Return the number of visual tokens; by data set if it differs between them."""
    if len(set(counts.values())) == 1:
        return f"{next(iter(counts.values())):,}"
    return "\n".join(f"{name} {count:,}" for name, count in counts.items()) or NONE


# -- tables --------------------------------------------------------------------------------------


def results(measured: Measured, evaluations: Sequence[Evaluation]) -> Table:
    """Return one row per arm: its best validation values, final scores, sizes and speed."""
    criteria = measured.criteria
    header = (
        "arm",
        *("{}\nbest {}".format(*_parts(criterion)) for criterion in criteria),
        *(f"{each.name}\n{metric_title(each.metric)}" for each in evaluations),
        *("visual\ntokens", "parameters\ntrained", "parameters\nin all", "samples/s"),
        *("learning\nrate", "seeds"),
    )
    rows = []
    for arm in measured.arms:
        scores = (each.scores.get(arm.name) for each in evaluations)
        row = (
            arm.name,
            *(spread(best(arm, criterion), formatter(criterion)) for criterion in criteria),
            *(_final(score) for score in scores),
            *_sizes(arm.cost),
            spread(rate(arm), "{:,.1f}".format),
            f"{chosen(arm):g}" if arm.curves else NONE,
            _seeds(arm),
        )
        rows.append(row)
    blind = _blind_row(criteria, evaluations, len(header))
    names = listing(dict.fromkeys(f"{each.items:,} items of {each.name}" for each in evaluations))
    note = "Means over seeds, with minimum and maximum in parentheses where there are several. "
    if evaluations:
        note += f"Brackets: 95 % interval over the {names}, drawn by image or clip. "
    note += "Visual tokens: what the LLM reads for one sample. Samples/s: in training steps."
    if blind:
        note += (
            f" {BLIND}: {NAMES['cider']}, or {NAMES['accuracy']}. What is not above it does not "
            "show that images are used."
        )
    for criterion in criteria:
        if criterion.count is not None:
            note += f" Best {criterion.key}: of evaluations while training{on_items(criterion)}."
    return Table("Results", header, [*rows, *blind], note)


def _blind_row(
    criteria: Sequence[Criterion], evaluations: Sequence[Evaluation], width: int
) -> list[Row]:
    """Return the row of the baselines that see no image; none if nothing of it is known."""
    cells = [NONE if c.blind is None else points(c.blind) for c in criteria]
    for each in evaluations:
        sample = each.blind
        ends = "" if sample is None else f"\n{interval(bootstrap.interval(sample))}".rstrip()
        cells.append(NONE if sample is None else points(sample.value) + ends)
    if set(cells) <= {NONE}:
        return []
    return [(BLIND, *cells, *[NONE] * (width - 1 - len(cells)))]


def _seeds(arm: MeasuredArm) -> str:
    diverged = len(arm.arm.diverged)
    return f"{len(arm.curves)}" + f"\n{diverged} diverged" * (diverged > 0)


def _sizes(cost: Cost | None) -> Row:
    if cost is None:
        return (NONE, NONE, NONE)
    return visual_tokens(cost.visual_tokens), compact(cost.trained), compact(cost.total)


def chosen(arm: MeasuredArm) -> float:
    """Return the learning rate of an arm's runs; nan if every seed diverged."""
    return arm.arm.runs[0].lr if arm.arm.runs else math.nan


def _final(score: FinalScore | None) -> str:
    if score is None:
        return NONE
    return f"{spread(score.spread, points)}\n{interval(score.interval)}".rstrip()


def best(arm: MeasuredArm, criterion: Criterion) -> Spread | None:
    """Return the best value of each seed, over seeds."""
    found = (criterion.best(curve) for curve in arm.curves)
    return Spread.of(item[1] for item in found if item)


def at_chance(measured: Measured, criterion: Criterion) -> bool:
    """Return whether the baseline's best is not above what is reached without an image."""
    goal, blind = best(measured.baseline, criterion), criterion.blind
    return goal is not None and blind is not None and goal.mean <= blind


def rate(arm: MeasuredArm) -> Spread | None:
    """Return the samples per second of training steps, over seeds."""
    totals = (curve.total for curve in arm.curves)
    return Spread.of(t["samples"] / t["seconds"] for t in totals if t["seconds"])


def to_baseline(measured: Measured, criterion: Criterion) -> Table:
    """Return what each arm took to be as good as the baseline's best of the same seed."""
    counted = (False, True) if any(arm.staged for arm in measured.arms) else (False,)
    axes = [(axis, with_stage_1) for with_stage_1 in counted for axis in SHOWN]
    header = ("arm", *(AXES[axis].title + "\nwith stage 1" * counts for axis, counts in axes))
    rows = []
    for arm in measured.arms:
        seeds = reached(measured, arm, criterion)
        rows.append((arm.name, *(_took(seeds, axis, counts) for axis, counts in axes)))
    note = (
        "At the first evaluation that is at least as good as the baseline's best with the same "
        "seed. Below, the ratio to what the baseline took for its best itself, with minimum and "
        "maximum over the seeds. Never: not within the steps of the run."
    )
    if gap := _widest_gap(measured, criterion):
        note += f" Evaluations are up to {gap:,} steps apart: nothing finer is seen."
    name = measured.comparison.baseline
    return Table(f"To {name}'s best: {title(criterion)}", header, rows, note)


def _widest_gap(measured: Measured, criterion: Criterion) -> int:
    """Return the most steps from one evaluation, or the start, to the next; 0 without any."""
    curves = [curve for arm in measured.arms for curve in arm.curves]
    steps = ([0, *(point.step for point, _ in criterion.series(curve))] for curve in curves)
    return max((b - a for each in steps for a, b in pairwise(each)), default=0)


def _took(seeds: Sequence[Reached], axis: str, counted: bool) -> str:
    """Return what it took and its ratio to the baseline, in two lines; `never` if no seed did."""
    if not seeds:
        return NONE
    did = [each for each in seeds if each.point is not None]
    spent = Spread.of(each.curve.spent(each.point, axis, counted) for each in did if each.point)
    if spent is None:
        return NEVER
    part = f"\nin {len(did)} of {len(seeds)} seeds" * (len(did) < len(seeds))
    ratio = ratios(did, axis, counted)
    return amounts(axis, spent) + (f"\n{times(ratio)}" if ratio else "") + part


def ratios(seeds: Sequence[Reached], axis: str, counted: bool) -> Spread | None:
    """Return the ratio to what the baseline took, over the seeds that reached its best."""
    found = (each.ratio(axis, counted) for each in seeds)
    return Spread.of(value for value in found if value is not None)


def learning_rates(measured: Measured) -> Table | None:
    """Return the validation loss by arm and learning rate; None unless there were several."""
    rates = sorted({lr for arm in measured.arms for lr in arm.arm.grid})
    if len(rates) < 2:
        return None
    rows, marked = [], []
    for arm in measured.arms:
        cells = [_tried(arm, lr) for lr in rates]
        marked += [(len(rows), 1 + i) for i, lr in enumerate(rates) if lr == chosen(arm)]
        rows.append((arm.name, *cells))
    ends = (rates[0], rates[-1])
    edge = [arm.name for arm in measured.arms if arm.arm.grid and chosen(arm) in ends]
    note = f"{measured.comparison.loss} at the first seed; ✓ is the learning rate of all seeds."
    if edge:
        note += f" At the edge of the grid: {', '.join(edge)}; a better rate may lie outside of it."
    return Table("Learning rates", ("arm", *(f"{lr:g}" for lr in rates)), rows, note, marked)


def _tried(arm: MeasuredArm, lr: float) -> str:
    """Return the loss at a learning rate of the grid, and whether it was chosen."""
    loss = arm.arm.grid.get(lr)
    if loss is None:
        return NONE
    if not math.isfinite(loss):
        return "diverged"
    return nats(loss) + " ✓" * (lr == chosen(arm))


def difference_table(evaluation: Evaluation) -> Table:
    """Return the differences between all arms: row minus column."""
    names = list(evaluation.scores)
    rows, marked = [], []
    for i, first in enumerate(names):
        row = [first]
        for j, second in enumerate(names):
            value = evaluation.differences.get((first, second))
            row.append(difference(value) if value else "")
            if value and is_shown(value):
                marked.append((i, 1 + j))
        rows.append(tuple(row))
    note = (
        f"Row minus column, on the same {evaluation.items:,} items of {evaluation.name}: scores "
        "averaged over seeds for each item, then a paired bootstrap by image or clip (95 % "
        "interval). Emphasized: the interval leaves out 0. Anything else is not a difference that "
        "these items show."
    )
    name = f"{evaluation.name}, {metric_title(evaluation.metric)}"
    return Table(f"Differences: {name}", ("", *names), rows, note, marked, "pairs")


def tables(measured: Measured, evaluations: Sequence[Evaluation]) -> list[Table]:
    """Return all tables, in the order of the page; none of the way to a score at chance level."""
    criteria = [each for each in measured.criteria if not at_chance(measured, each)]
    took = [to_baseline(measured, criterion) for criterion in criteria]
    differences = [difference_table(each) for each in evaluations if each.differences]
    rates = learning_rates(measured)
    return [results(measured, evaluations), *took, *differences, *([rates] if rates else [])]
