"""The files of a comparison: numbers against sums written out here, and one safe page."""

import csv
import html.parser
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from support import paths
from support.compared import LOSS, SCORE, compare, points, write_run

from vadapter.compare import curves
from vadapter.compare.comparison import Arm, Comparison, evaluation_folder
from vadapter.compare.costs import Cost
from vadapter.compare.csv_file import COLUMNS, COUNTS, csv_text, curves_of, runs_text
from vadapter.compare.curves import AXES, band, measure, reached
from vadapter.compare.final_scores import evaluations
from vadapter.compare.provenance import equal, origin
from vadapter.compare.read import read_runs
from vadapter.compare.summary import findings
from vadapter.compare.table import compact, learning_rates, results, signed, tables, to_baseline
from vadapter.compare.write import write_comparison
from vadapter.data.scenes.source import ScenesSource
from vadapter.errors import ConfigError
from vadapter.evaluate.runner import save_result
from vadapter.metrics import bootstrap
from vadapter.metrics.blind_baselines import constant_caption
from vadapter.metrics.bootstrap import Sample
from vadapter.metrics.scoring import METRICS, Generation, score_generations

COSTS = {
    "perceiver": Cost(8, 3e9, 400.0, {"images": 4, "clips": 32}, 10_000, 1_234_567),
    "vadapter": Cost(8, 5e9, 400.0, {"images": 4, "clips": 4}, 12_345, 110_000),
    "decoder": Cost(8, 1e9, 0.0, {"images": 4}, 20, 50),
}
STEPS = (10, 20, 30, 40)
NASTY = '<script>alert("1")</script>|$x^2_y$ & \' onload="x" _'


@pytest.fixture(autouse=True)
def known_costs(monkeypatch):
    """Costs from the table above: a model need not be traced for each run."""
    monkeypatch.setattr(
        curves, "stage_costs", lambda workdir, names: {name: COSTS[name] for name in names}
    )


def items(name, seed=0):
    """(image, score) of two items for each of 40 images; `worse` differs by 0 on average."""
    draw = np.random.default_rng(seed)
    shift = {"better": lambda i: 0.5, "worse": lambda i: 0.1 - 0.2 * (i // 2 % 2)}
    by = shift.get(name, lambda i: 0.0)
    return [(f"image-{i // 2}", float(draw.uniform()) + by(i)) for i in range(80)]


def averaged(name):
    """The items of an arm, averaged over both seeds."""
    both = zip(items(name, 0), items(name, 1), strict=True)
    pairs = [(a[0], (a[1] + b[1]) / 2) for a, b in both]
    return Sample.of_means(range(80), *zip(*pairs, strict=True))


@pytest.fixture
def three(tmp_path):
    """Perceiver, an arm with stage 1 that is better and a worse one, with two seeds each."""
    made = []
    for name, stage, prior, losses in (
        ("perceiver", "perceiver", {}, ([4, 3, 2, 2.5], [4, 3, 3, 1])),
        ("better", "vadapter", {"decoder": 6}, ([3, 2, 1, 1], [3, 2, 2, 1])),
        ("worse", "perceiver", {}, ([5, 5, 4, 4], [5, 5, 4, 1])),
    ):
        runs = tuple(
            write_run(
                tmp_path / f"{name}-{seed}", stage,
                points(STEPS, losses[seed], [1 / y for y in losses[seed]]), seed=seed, prior=prior,
                finals={"test": items(name, seed)}, step_ms=100.0 + 100 * seed,
            )
            for seed in (0, 1)
        )  # fmt: skip
        made.append(Arm(name, runs, {1e-2: 1.5, 1e-3: 1.25 + len(made), 1e-1: math.inf}))
    return Comparison("three", tuple(made), "perceiver", LOSS, SCORE, ("test",))


def test_the_results_hold_means_ranges_and_sizes(three):
    measured = measure(three)
    scored = evaluations(measured)
    table = results(measured, scored)
    row = dict(zip(table.header, table.rows[0], strict=True))
    assert row["captions\nbest CIDEr × 100"] == "75.0\n(50.0–100.0)"  # 1/2 and 1/1
    assert row["held\nbest loss in nats per token"] == "1.500\n(1.000–2.000)"
    assert row["visual\ntokens"] == "images 4\nclips 32"
    assert dict(zip(table.header, table.rows[1], strict=True))["visual\ntokens"] == "4"
    assert (row["parameters\ntrained"], row["parameters\nin all"]) == ("10k", "1.23M")
    assert row["samples/s"] == "60.0\n(40.0–80.0)"  # 8 samples in 0.1 s and in 0.2 s
    assert row["seeds"] == "2"
    means = [np.mean([x for _, x in items("perceiver", seed)]) for seed in (0, 1)]
    ends = bootstrap.interval(averaged("perceiver"))
    assert ends is not None
    assert row["test\nCIDEr × 100"] == (
        f"{100 * np.mean(means):.1f}\n({100 * min(means):.1f}–{100 * max(means):.1f})\n"
        f"[{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]"
    )


def test_the_interval_of_a_single_seed_is_that_of_its_score_file(tmp_path):
    run = write_run(tmp_path / "run", "perceiver", {}, finals={"test": items("perceiver")})
    path = tmp_path / "run" / "perceiver" / "eval" / "test" / "score.json"
    path.write_text('{"scores": {"cider": 0.5}, "intervals": {"cider": [0.25, 0.75]}}')
    comparison = Comparison("x", (Arm("a", (run,), {}),), "a", LOSS, "", ("test", "absent"))
    (evaluation,) = evaluations(measure(comparison))
    assert evaluation.scores["a"].interval == (0.25, 0.75)
    assert evaluation.differences == {}


def test_runs_that_were_measured_on_other_content_are_refused_as_far_as_it_is_recorded(tmp_path):
    paths = [tmp_path / str(run) / "perceiver" for run in range(3)]
    for path, content, lr in zip(paths, ("one", "", "other"), (1e-1, 1e-2, 1e-3), strict=True):
        write_run(path.parent, path.name, {}, lr=lr)
        done = path / "done.json"
        record = json.loads(done.read_text()) | ({"measured": {"held": content}} if content else {})
        done.write_text(json.dumps(record))
    for recorded in (paths[:2], paths[1:]):
        assert len(read_runs(recorded)[0].arms) == 2
    for different in (paths, paths[::-1], paths[::2]):
        with pytest.raises(ConfigError, match="cannot be compared") as raised:
            read_runs(different)
        assert "protocol.content.held" in str(raised.value)


def test_another_score_of_finished_runs_may_be_that_of_the_curves(tmp_path):
    runs = []
    for lr, right in ((1e-2, 0.25), (1e-3, 0.5)):
        logged = {10: {LOSS: 1.0, SCORE: 0.5, "captions/captions_right": right, "captions/n": 8.0}}
        run = write_run(tmp_path / f"{lr}", "perceiver", logged, lr=lr)
        runs.append(run.workdir / run.stage)
    assert read_runs(runs)[0].score == SCORE
    comparison, _ = read_runs(runs, score="captions/captions_right")
    (score, _) = measure(comparison).criteria
    assert [score.series(arm.curves[0])[0][1] for arm in measure(comparison).arms] == [0.25, 0.5]
    with pytest.raises(ConfigError, match="did you mean 'captions/captions_right'"):
        read_runs(runs, score="captions/caption_right")


def test_captions_that_are_judged_are_compared_by_what_is_right_beside_their_metric(tmp_path):
    source = ScenesSource("image", "val", count=40)
    arms = []
    for name, wrong in (("perceiver", 20), ("better", 5)):
        run = write_run(tmp_path / name, "perceiver", {5: {"captions/facts": 0.5, LOSS: 1.0}})
        said = [source.text_only(i + (i < wrong)).captions[0] for i in range(40)]
        generations = [Generation(i, text, True) for i, text in enumerate(said)]
        result = score_generations(source, generations, METRICS["cider"])
        save_result(evaluation_folder(run, "test"), result)
        arms.append((Arm(name, (run,), {}), result))
    comparison = Comparison(
        "x", tuple(arm for arm, _ in arms), "perceiver", LOSS, "captions/facts", ("test",)
    )
    measured = measure(comparison)
    found = evaluations(measured)
    assert [each.metric for each in found] == ["cider", "captions_right", "facts"]
    for each in found:
        first, second = (result.scores[each.metric] for _, result in arms)
        assert each.differences["better", "perceiver"].value == pytest.approx(second - first)
    header = results(measured, found).header
    assert {"test\ncaptions right in %", "test\nfacts right in %"} < {*header}
    assert "captions\nbest facts right in %" in header
    titles = [table.title for table in tables(measured, found)]
    assert len(set(titles)) == len(titles)
    page = write_comparison(comparison, tmp_path / "pages")
    with page.csv.open() as file:
        logged = [row for row in csv.DictReader(file) if row["steps"] == "5"]
    assert [(row["score"], row["facts_right"], row["captions_right"]) for row in logged] == [
        ("0.5", "0.5", "")
    ] * 2


def test_differences_are_paired_over_items_averaged_over_seeds(three):
    (evaluation,) = evaluations(measure(three))
    assert len(evaluation.differences) == 6
    for (a, b), difference in evaluation.differences.items():
        expected = bootstrap.paired(averaged(a), averaged(b))
        assert difference.value == pytest.approx(expected.value, abs=1e-9)
        assert difference.interval == pytest.approx(expected.interval, abs=0.01)
        mirrored = evaluation.differences[b, a]
        assert mirrored.value == -difference.value


def test_the_way_to_the_baseline_says_never_some_seeds_and_ratios(three):
    measured = measure(three)
    loss = measured.criteria[1]
    table = to_baseline(measured, loss)
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    counted = "steps\nwith stage 1"
    # Seed 0: its best, 2, at step 30; seed 1: 1 at step 40.
    assert cells["perceiver"]["steps"] == "35 (30–40)\n1.00×"
    assert cells["perceiver"][counted] == "35 (30–40)\n1.00×"
    assert cells["better"]["steps"] == "30 (20–40)\n0.83× (0.67–1.00)"  # 20/30 and 40/40
    assert cells["better"][counted] == "36 (26–46)\n1.01× (0.87–1.15)"  # 26/30 and 46/40
    assert cells["better"]["training FLOPs"] == "150 (100–200) GFLOP\n1.39× (1.11–1.67)"
    assert cells["worse"]["steps"] == "40\n1.00×\nin 1 of 2 seeds"
    first = Comparison("x", three.arms[:1] + three.arms[2:], "perceiver", LOSS, SCORE, ())
    alone = Arm("worse", three.arms[2].runs[:1], {})
    without = measure(Comparison("x", (first.arms[0], alone), "perceiver", LOSS, SCORE, ()))
    table = to_baseline(without, without.criteria[1])
    assert table.rows[1] == ("worse", "never", "never", "never")  # no columns with stage 1


def test_the_grid_shows_what_was_chosen_what_diverged_and_where_it_ends(three):
    table = learning_rates(measure(three))
    assert table is not None
    assert table.header == ("arm", "0.001", "0.01", "0.1")
    assert table.rows[1] == ("better", "2.250", "1.500 ✓", "diverged")
    assert "edge" not in table.note
    arms = tuple(Arm(a.name, a.runs, {1e-2: 1.0, 1e-3: 2.0}) for a in three.arms)
    edge = learning_rates(measure(Comparison("x", arms, "perceiver", LOSS, "", ())))
    assert edge is not None
    assert "edge of the grid: perceiver, better, worse" in edge.note
    for grid in ({}, {1e-2: 1.5}):
        few = tuple(Arm(a.name, a.runs, grid) for a in three.arms)
        measured = measure(Comparison("x", few, "perceiver", LOSS, "", ()))
        assert learning_rates(measured) is None
        shown = [row[1] for row in equal(measured, {}).rows if row[0] == "learning rate"]
        assert shown == ["0.01, the only one tried"] * len(grid)


def test_the_findings_say_no_more_than_the_numbers(three):
    measured = measure(three)
    found = findings(measured, evaluations(measured))
    score, loss = found["Speed"]
    assert loss.text == "held, loss in nats per token: perceiver's best is 1.500 (1.000–2.000)."
    assert loss.arms == [
        "better reaches it after 30 (20–40) steps: 0.83× (0.67–1.00) of what perceiver itself "
        "takes, 1.01× (0.87–1.15) with stage 1 counted.",
        "worse reaches it in 1 of 2 seeds after 40 steps: 1.00× of what perceiver itself takes.",
    ]
    assert ", on 8 items: perceiver's best is " in score.text
    assert len(score.arms) == 2
    better, worse = found["Final scores"][0].arms
    assert re.fullmatch(r"better: \+\d+\.\d \[\+[\d.]+, \+[\d.]+\]\.", better)
    assert worse.endswith("within the interval: no difference is shown.")
    (limit,) = found["Limits"]  # the tiny LM of stage 1 was trained on text
    assert limit.text.startswith("better starts with what was trained before: tlm (stage tlm).")


@pytest.fixture
def described(three):
    """The arms of `three` with references for the items of their evaluations; and these."""
    nouns = ["dog", "cat", "man", "car", "cat"]
    references = [[f"a {nouns[i % 5]} is here", "something is here"] for i in range(20)]
    rows = [
        {"id": f"image-{i}", "index": i, "references": each, "score": 0.5}
        for i, each in enumerate(references)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for run in (run for arm in three.arms for run in arm.runs):
        for name in ("captions", "test"):
            folder = run.workdir / run.stage / "eval" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "predictions.jsonl").write_text(text)
    return three, references


def test_the_last_row_of_the_results_is_what_is_reached_without_an_image(described):
    comparison, references = described
    measured = measure(comparison)
    table = results(measured, evaluations(measured))
    row = dict(zip(table.header, table.rows[-1], strict=True))
    first, every = constant_caption(references[:8]), constant_caption(references)
    assert row.pop("arm") == "blind (no image)"
    assert row.pop("captions\nbest CIDEr × 100") == f"{100 * first:.1f}"  # captions/n is 8
    assert row.pop("test\nCIDEr × 100").startswith(f"{100 * every:.1f}\n[")
    assert set(row.values()) == {"—"}


@pytest.mark.parametrize("share", [0.5, 1.0, 1.5])
def test_speed_to_a_score_at_chance_level_is_held_back(described, tmp_path, share):
    comparison, references = described
    chance = constant_caption(references[:8])
    for arm in comparison.arms:
        for run in arm.runs:
            path = run.workdir / run.stage / "metrics.jsonl"
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            ours = share * (2 if arm.name == "better" else 1)
            rows = [row | ({SCORE: ours * chance} if SCORE in row else {}) for row in rows]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = write_comparison(comparison, tmp_path / "out")
    held_back, known = (
        share <= 1,
        f"what a constant caption reaches without an image ({100 * chance:.1f})",
    )
    finding = findings(measure(comparison), [])["Speed"][0]
    assert (known in finding.text, not finding.arms) == (held_back, held_back)
    if share == 0.5:
        assert "no arm's best is above" in finding.text
    elif share == 1:
        assert finding.text.endswith(f"above it: better {200 * chance:.1f}.")
    markdown = written.table.read_text(encoding="utf-8")
    page = plain(Page(written.page.read_text(encoding="utf-8")).text)
    for text in (markdown, page, written.text):
        assert "blind (no image)" in text
        assert ("To perceiver's best: captions" in text) == (not held_back)
        assert "To perceiver's best: held" in text


def test_the_limits_say_where_arms_were_not_trained_alike(tmp_path):
    measured = points(STEPS, [4, 3, 2, 1], [0.1, 0.2, 0.3, 0.4])
    longer = points((10, 80), [4, 1], [0.1, 0.4])
    longer[80]["captions/n"] = 100.0
    first = [write_run(tmp_path / f"a{s}", "perceiver", measured, seed=s) for s in (0, 1)]
    second = write_run(tmp_path / "b", "perceiver", longer, steps=80, blank=True)
    (tmp_path / "b" / "env.json").write_text('{"jax": "0.10.2", "devices": ["tpu:0", "tpu:1"]}')
    arms = (Arm("perceiver", tuple(first), {}), Arm("longer", (second,), {}))
    measured = measure(Comparison("x", arms, "perceiver", LOSS, SCORE, ()))
    limits = [each.text for each in findings(measured, [])["Limits"]]
    assert "Arms differ in steps: perceiver 40, longer 80." in limits
    assert any("different machines" in limit and "2 × tpu" in limit for limit in limits)
    assert "longer sees blank images, in images: a blind control." in limits
    assert any("longer has seeds 0 and perceiver 0, 1" in limit for limit in limits)
    assert any(f"of {SCORE} is over 8 items and lacks the last" in limit for limit in limits)
    alike = measure(Comparison("x", arms[:1], "perceiver", LOSS, SCORE, ()))
    assert findings(alike, [])["Limits"] == []


def test_evaluations_are_named_and_not_called_tests(three, tmp_path):
    runs = tuple(Arm(a.name, a.runs[:1], {}) for a in three.arms)
    comparison = Comparison("x", runs, "perceiver", LOSS, SCORE, ("held_captions",))
    for run in (arm.runs[0] for arm in runs):
        folder = run.workdir / run.stage / "eval"
        (folder / "test").rename(folder / "held_captions")
    written = write_comparison(comparison, tmp_path / "out")
    for path in (written.page, written.table):
        text = Page(path.read_text(encoding="utf-8")).text
        assert "interval over the 80 items of held_captions, drawn" in plain(text)
        assert not re.search(r"\btests? items?|\btest set", text)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_evaluation_that_is_not_finite_is_no_best_and_no_point(tmp_path, bad):
    arms = (
        ("perceiver", "perceiver", {}, {0: points(STEPS, [bad, 3, 2, bad])}),
        ("ours", "perceiver", {}, {0: points(STEPS, [bad, bad, 2, 1])}),
    )
    measured = measure(compare(tmp_path, *arms, score=""))
    (criterion,) = measured.criteria
    found = [criterion.best(arm.curves[0]) for arm in measured.arms]
    assert [(each[0].step, each[1]) for each in found if each] == [(30, 2), (40, 1)]
    (ours,) = curves.reached(measured, measured.arms[1], criterion)
    assert (ours.target, ours.point and ours.point.step) == (2, 30)


@pytest.mark.parametrize("value", [0.0, -0.0, 4e-4, -4e-4])
def test_a_difference_that_rounds_to_zero_is_not_negative(value):
    assert signed(value) == "+0.0"
    assert signed(value - 1e-3) == "\N{MINUS SIGN}0.1"


@pytest.mark.parametrize("power", range(20))
def test_amounts_are_short_and_within_half_a_percent(power):
    draw = np.random.default_rng(power)
    for value in (10.0**power, *(draw.uniform(0.9, 10, 20) * 10**power)):
        for unit in ("", "FLOP"):
            shown = compact(value, unit).removesuffix(unit).strip()
            prefix = shown[-1] if shown[-1].isalpha() else ""
            number = shown.removesuffix(prefix).strip()
            scale = 10 ** (3 * " kMGTPE".index(prefix or " "))
            assert float(number) * scale == pytest.approx(value, rel=0.0051)
            assert len(number) <= 5


def test_the_csv_has_every_point_with_all_digits(three):
    measured = measure(three)
    origins = {c.run: origin(c.run, three.test) for arm in measured.arms for c in arm.curves}
    read = list(csv.DictReader(io.StringIO(csv_text(measured, origins))))
    assert list(read[0]) == list(COLUMNS)
    assert all(column.meaning for column in COLUMNS.values())
    flat = [(arm, c, p) for arm in measured.arms for c in arm.curves for p in c.points]
    assert len(read) == len(flat) == 6 * 21
    for row, (arm, curve, point) in zip(read, flat, strict=True):
        assert (row["arm"], int(row["seed"])) == (arm.name, curve.run.seed)
        for axis in AXES:
            assert float(row[axis]) == point.spent[axis]
            assert float(row[f"{axis}_with_stage_1"]) == point.spent[axis] + curve.before[axis]
        for name in COUNTS - {"flops", "flops_with_stage_1"}:
            assert re.fullmatch(r"\d*", row[name])
        assert row["score_items"] == ("8" if SCORE in point.values else "")
        for column, key in (("training_loss", "loss"), ("held_out_loss", LOSS), ("score", SCORE)):
            logged = point.values.get(key)
            assert row[column] == ("" if logged is None else repr(logged))
        assert re.fullmatch("[0-9a-f]{64}", row["recipe"])
    alike = [row for row in read if row["stage"] == "perceiver"]  # two arms, two seeds
    for column in ("data", "protocol", "frozen"):
        (digest,) = {row[column] for row in alike}
        assert re.fullmatch("[0-9a-f]{64}", digest)
    assert len({row["recipe"] for row in read}) > 1  # the seed is part of a recipe


def test_the_curves_of_a_csv_are_those_of_the_runs(three):
    measured = measure(three)
    origins = {c.run: origin(c.run, three.test) for arm in measured.arms for c in arm.curves}
    text = csv_text(measured, origins)
    read = curves_of(text, name="three", baseline="perceiver", loss=LOSS, score=SCORE)
    assert [arm.staged for arm in read.arms] == [arm.staged for arm in measured.arms]
    assert [(c.key, c.higher, c.count) for c in read.criteria] == [
        (c.key, c.higher, c.count) for c in measured.criteria
    ]
    for criterion in measured.criteria:
        for arm, own in zip(measured.arms, read.arms, strict=True):
            for axis in AXES:
                for counted in (False, True):
                    lines = band(arm, criterion, axis, counted), band(own, criterion, axis, counted)
                    expected, found = map(np.array, (line[:4] for line in lines if line))
                    np.testing.assert_allclose(found, expected, rtol=1e-12)
            ratios = [
                [each.ratio("steps", True) for each in reached(m, a, criterion)]
                for m, a in ((measured, arm), (read, own))
            ]
            assert ratios[0] == ratios[1]


def test_the_table_of_runs_has_what_each_took_and_every_score_at_its_end(three):
    measured = measure(three)
    rows = list(csv.DictReader(io.StringIO(runs_text(measured))))
    flat = [(arm, curve) for arm in measured.arms for curve in arm.curves]
    assert len(rows) == len(flat) == 6
    for row, (arm, curve) in zip(rows, flat, strict=True):
        assert (row["arm"], int(row["seed"])) == (arm.name, curve.run.seed)
        assert int(row["steps"]) == 40
        assert int(row["steps_with_stage_1"]) == 40 + (6 if arm.name == "better" else 0)
        saved = evaluation_folder(curve.run, "test") / "score.json"
        scores = json.loads(saved.read_text())["scores"]
        assert {k: float(row[f"test/{k}"]) for k in scores} == scores
        assert int(row["trained_parameters"]) == COSTS[curve.run.stage].trained


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, markup):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def plain(text):
    """Text of a page without what guides its line breaks."""
    return text.replace("\u2060", "").replace("\xa0", " ")


def test_the_page_is_whole_and_loads_nothing(three, tmp_path):
    written = write_comparison(three, tmp_path / "out")
    markup = written.page.read_text(encoding="utf-8")
    page = Page(markup)
    assert "http" not in markup.replace('http-equiv="Content', "")
    assert not {"script", "link", "iframe", "object", "img", "metadata"} & {t for t, _ in page.tags}
    for _, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith("#")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    uses = [v for _, attrs in page.tags for k, v in attrs.items() if k.endswith("href")]
    assert {use.removeprefix("#") for use in uses} <= set(ids)
    figures = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(figures) == 2 * 2 * 4  # criteria, stage 1 counted or not, axes
    measured = measure(three)
    shown = tables(measured, evaluations(measured))
    assert len(shown) == 5
    for table in shown:
        for row in table.rows:
            for line in "\n".join(row).split("\n"):
                assert line in plain(page.text)
    for name in COLUMNS:
        assert name in page.text


def test_the_text_and_markdown_hold_the_same_tables(three, tmp_path):
    written = write_comparison(three, tmp_path)
    markdown = written.table.read_text(encoding="utf-8")
    for part in ("Results", "To perceiver's best", "Differences: test", "Learning rates", "Equal"):
        assert part in written.text
        assert part in markdown
    assert "| better |" in markdown
    assert max(map(len, written.text.split("Results")[0].split("\n"))) <= 98
    assert [path.name for path in written.plots] == ["score.png", "loss.png"]
    for path in written.files():
        assert path.is_file()
    for path in written.plots:
        with Image.open(path) as image:
            assert image.size[0] > 1500
            assert np.asarray(image.convert("L")).std() > 10  # something is drawn


def test_names_are_text_wherever_they_are_shown(tmp_path):
    arms = (
        (NASTY, "perceiver", {}, {0: points(STEPS, [4, 3, 2, 1])}),
        ("_$\\frac{", "perceiver", {}, {0: points(STEPS, [4, 3, 2, 1])}),
    )
    comparison = compare(tmp_path / "runs", *arms)
    written = write_comparison(comparison, tmp_path / "out")
    markup = written.page.read_text(encoding="utf-8")
    page = Page(markup)
    assert "<script" not in markup
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    for name, *_ in arms:
        assert plain(page.text).count(name) >= 3
    rows = list(csv.DictReader(io.StringIO(written.csv.read_text(encoding="utf-8"))))
    assert {row["arm"] for row in rows} == {name for name, *_ in arms}


def test_a_comparison_that_has_measured_nothing_yet_has_a_page(tmp_path):
    comparison = compare(tmp_path / "runs", ("perceiver", "perceiver", {}, {0: {}}))
    written = write_comparison(comparison, tmp_path / "out")
    assert written.plots == ()
    assert "perceiver" in Page(written.page.read_text(encoding="utf-8")).text


def test_arms_look_different_from_each_other():
    from vadapter.compare.curves import Measured, MeasuredArm
    from vadapter.compare.plots import looks

    arms = tuple(Arm(str(i), (), {}) for i in range(30))
    comparison = Comparison("x", arms, "0", LOSS, "", ())
    measured = Measured(comparison, tuple(MeasuredArm(arm, None, ()) for arm in arms), ())
    assert len(set(looks(measured).values())) == 30


def test_the_guide_names_every_column_of_the_csv():
    guide = (paths.ROOT / "vadapter" / "compare" / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+)`", guide))
    named |= {f"{name}_with_stage_1" for name in AXES if "_with_stage_1" in named}
    named |= {f"held_out_loss{end}" for end in ("_wrong", "_mean") if end in named}
    assert set(COLUMNS) <= named
