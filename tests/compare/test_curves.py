"""Curves of runs, against sums and searches written out here."""

import itertools
import math
import random

import pytest
from support.compared import LOSS, SCORE, append_rows, compare, points, write_run

from vadapter.compare import curves
from vadapter.compare.comparison import Arm, Comparison
from vadapter.compare.costs import Cost, stage_costs
from vadapter.compare.curves import AXES, Criterion, band, measure, reached, read_curve

COSTS = {
    "perceiver": Cost(8, 3e9, 400.0, {"images": 4}, 10, 100),
    "vadapter": Cost(8, 5e9, 400.0, {"images": 4}, 12, 110),
    "decoder": Cost(8, 1e9, 0.0, {"images": 4}, 20, 50),
}
STEPS = (10, 20, 30, 40)


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Costs from the table above: a model need not be traced for each run."""
    monkeypatch.setattr(
        curves, "stage_costs", lambda workdir, names: {name: COSTS[name] for name in names}
    )


def simple(folder, ours, theirs, prior=(), score=""):
    """Two arms, the second `ours`, and the criterion, of losses by seed."""
    by_seed = lambda losses: {s: points(STEPS, y) for s, y in losses.items()}  # noqa: E731
    arms = (
        ("perceiver", "perceiver", {}, by_seed(theirs)),
        ("ours", "vadapter", dict(prior), by_seed(ours)),
    )
    measured = measure(compare(folder, *arms, score=score))
    (criterion,) = measured.criteria
    return measured, measured.arms[1], criterion


def test_costs_come_from_the_recipe_and_count_what_the_llm_reads(tmp_path):
    run = write_run(tmp_path / "run", "vadapter", {}, prior={"decoder": 6})
    costs = stage_costs(run.workdir, ("decoder", "vadapter"))
    ours, stage_1 = costs["vadapter"], costs["decoder"]
    assert ours.samples == stage_1.samples == 8
    assert ours.visual_tokens == {"images": 4, "clips": 4}  # four queries
    # BOS, "Describe the following:" in bytes, four queries, and a text of 40.
    assert ours.llm_tokens == 8 * (1 + len(b"Describe the following:") + 4 + 40)
    assert stage_1.llm_tokens == 0  # the tiny LM reads there, not the LLM
    assert 0 < ours.trained < ours.total
    assert stage_1.trained > ours.trained  # embedding and head of the tiny LM
    assert ours.flops > stage_1.flops > 0


def test_a_point_holds_what_was_spent_by_then(tmp_path):
    run = write_run(
        tmp_path, "vadapter", points(STEPS, (4.0, 3.0, 2.0, 1.0)), step_ms=250.0,
        prior={"decoder": 6},
    )  # fmt: skip
    curve = read_curve(run, COSTS)
    assert [p.step for p in curve.points] == [1, *range(2, 41, 2)]
    for point in curve.points:
        assert point.spent == pytest.approx(
            {
                "steps": point.step,
                "samples": 8 * point.step,
                "llm_tokens": 400 * point.step,
                "flops": 5e9 * point.step,
                "seconds": 0.25 * point.step,
            }
        )
        for axis in AXES:
            assert curve.spent(point, axis, False) == point.spent[axis]
    assert curve.before == pytest.approx(
        {"steps": 6, "samples": 48, "llm_tokens": 0, "flops": 6e9, "seconds": 1.5}
    )
    last = curve.points[-1]
    assert curve.spent(last, "flops", True) == pytest.approx(40 * 5e9 + 6e9)
    assert last.values["loss"] == pytest.approx(2.0)
    assert last.values[LOSS] == 1.0


def test_seconds_follow_the_time_of_each_step_and_are_interpolated_between_logged_ones(tmp_path):
    run = write_run(tmp_path, "perceiver", {}, steps=1)
    rows = [{"step": 11, "loss": 1.0, "step_ms": 500.0}, {"step": 6, LOSS: 1.5}]
    append_rows(tmp_path / "perceiver", rows)
    curve = read_curve(run, COSTS)
    assert [p.step for p in curve.points] == [1, 6, 11]
    assert [p.spent["seconds"] for p in curve.points] == pytest.approx([0.1, 2.6, 5.1])


def test_of_a_step_that_a_resumed_run_repeated_only_the_last_attempt_counts(tmp_path):
    run = write_run(tmp_path, "perceiver", points((20,), (2.0,)))
    again = [
        {"step": 20, "attempt": 2, "loss": 9.0, "step_ms": 100.0},
        {"step": 20, "attempt": 2, LOSS: 1.5},
    ]
    append_rows(tmp_path / "perceiver", again)
    curve = read_curve(run, COSTS)
    steps = [p.step for p in curve.points]
    assert len(steps) == len(set(steps))
    point = next(p for p in curve.points if p.step == 20)
    assert (point.values["loss"], point.values[LOSS]) == (9.0, 1.5)
    assert curve.total["seconds"] == pytest.approx(4.0)  # not longer than without the repetition


def test_a_run_without_steps_has_no_points(tmp_path):
    run = write_run(tmp_path, "perceiver", {}, finished=False)
    (tmp_path / "perceiver" / "metrics.jsonl").unlink()
    curve = read_curve(run, COSTS)
    assert curve.points == ()
    assert curve.total == dict.fromkeys(AXES, 0.0)
    assert not curve.finished
    assert Criterion(LOSS, False).best(curve) is None


@pytest.mark.parametrize("seed", range(4))
def test_the_step_that_reaches_the_baseline_is_that_of_a_search_by_hand(tmp_path, seed):
    draw = random.Random(seed)
    losses = {s: [round(draw.uniform(1, 2), 1) for _ in STEPS] for s in (0, 1)}
    ours = {s: [round(draw.uniform(1, 2), 1) for _ in STEPS] for s in (0, 1)}
    measured, arm, criterion = simple(tmp_path, ours, losses, prior=[("decoder", 6)])
    found = reached(measured, arm, criterion)
    assert [each.curve.run.seed for each in found] == [0, 1]
    for each in found:
        s = each.curve.run.seed
        target = min(losses[s])
        own = STEPS[losses[s].index(target)]
        expected = next((x for x, y in zip(STEPS, ours[s], strict=True) if y <= target), None)
        assert (each.target, each.own.step) == (target, own)
        assert (each.point and each.point.step) == expected
        if expected is None:
            assert each.ratio("steps", False) is None
        else:
            assert each.ratio("steps", False) == pytest.approx(expected / own)
            assert each.ratio("steps", True) == pytest.approx((expected + 6) / own)


def test_the_baseline_reaches_its_own_best_at_ratio_1(tmp_path):
    measured, _, criterion = simple(tmp_path, {0: [5] * 4}, {0: [3, 2, 1, 2], 1: [1, 1, 2, 3]})
    found = reached(measured, measured.baseline, criterion)
    assert [each.point and each.point.step for each in found] == [30, 10]
    for each, axis in itertools.product(found, AXES):
        assert each.ratio(axis, True) == each.ratio(axis, False) == 1.0


def test_a_score_is_reached_from_below_and_a_loss_from_above(tmp_path):
    theirs = points(STEPS, (4, 3, 2, 2), (0.1, 0.5, 0.4, 0.3))
    ours = points(STEPS, (5, 4, 3, 2), (0.5, 0.2, 0.6, 0.6))
    arms = ("perceiver", "perceiver", {}, {0: theirs}), ("ours", "vadapter", {}, {0: ours})
    measured = measure(compare(tmp_path, *arms))
    score, loss = measured.criteria
    assert (score.key, loss.key) == (SCORE, LOSS)
    (by_score,), (by_loss,) = (reached(measured, measured.arms[1], c) for c in (score, loss))
    assert by_score.point is not None
    assert by_score.point.step == 10
    assert by_loss.point is not None
    assert by_loss.point.step == 40
    best = score.best(measured.arms[1].curves[0])
    assert best is not None
    assert (best[0].step, best[1]) == (30, 0.6)


def test_a_seed_that_the_baseline_lacks_is_not_compared(tmp_path):
    measured, arm, criterion = simple(tmp_path, {0: [1] * 4, 7: [1] * 4}, {0: [2] * 4})
    assert [each.curve.run.seed for each in reached(measured, arm, criterion)] == [0]


def test_scores_on_another_number_of_items_are_left_out(tmp_path):
    evaluated = {
        step: {SCORE: score, "captions/n": n}
        for step, score, n in ((10, 0.2, 64), (20, 0.3, 64), (40, 0.9, 200))
    }
    measured = measure(compare(tmp_path, ("perceiver", "perceiver", {}, {0: evaluated})))
    (criterion,) = measured.criteria  # the loss was not measured
    assert criterion.count == 64
    best = criterion.best(measured.baseline.curves[0])
    assert best is not None
    assert best[0].step == 20


def test_a_comparison_without_a_score_has_the_loss_alone(tmp_path):
    _, _, criterion = simple(tmp_path, {0: [2] * 4}, {0: [1] * 4}, score="")
    assert criterion == Criterion(LOSS, higher=False)


def test_an_arm_whose_seeds_all_diverged_has_no_curves(tmp_path):
    comparison = compare(tmp_path, ("perceiver", "perceiver", {}, {0: points(STEPS, [1] * 4)}))
    lost = Arm("lost", (), {1e-2: math.inf}, diverged=(0, 1))
    measured = measure(Comparison("x", (*comparison.arms, lost), "perceiver", LOSS, "", ()))
    arm = measured.arms[1]
    assert arm.curves == ()
    assert arm.cost is None
    assert reached(measured, arm, measured.criteria[0]) == []
    assert band(arm, measured.criteria[0], "steps", False) is None


def test_a_band_spans_the_seeds_at_the_steps_that_all_have_measured(tmp_path):
    seeds = {0: points((10, 20, 40), (3, 2, 1)), 1: points((10, 30, 40), (5, 9, 3)), 2: {}}
    measured = measure(compare(tmp_path, ("perceiver", "perceiver", {}, seeds)))
    drawn = band(measured.baseline, measured.criteria[0], "steps", False)
    assert drawn is not None
    assert drawn.seeds == 2
    assert drawn.x.tolist() == [10, 40]
    assert drawn.mean.tolist() == [4, 2]
    assert (drawn.low.tolist(), drawn.high.tolist()) == ([3, 1], [5, 3])


def test_stage_1_moves_a_band_to_the_right_by_what_it_spent(tmp_path):
    losses = {0: [4, 3, 2, 1]}
    measured, arm, criterion = simple(tmp_path, losses, losses, prior=[("decoder", 6)])
    without, counted = (band(arm, criterion, "steps", x) for x in (False, True))
    assert without is not None
    assert counted is not None
    assert (counted.x - without.x).tolist() == [6] * 4
    assert arm.staged
    assert not measured.baseline.staged
