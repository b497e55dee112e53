"""The page of results is what its command writes from the tables beside it."""

import csv
import runpy
import subprocess
import sys

import pytest
from support.paths import ROOT

FOLDER = ROOT / "docs" / "results"
AXES = ("steps", "samples", "llm_tokens", "flops", "seconds")


@pytest.fixture(scope="module")
def make():
    """The functions of the command."""
    return runpy.run_path(str(FOLDER / "make.py"))


def test_the_page_and_its_figures_are_what_the_command_writes(tmp_path):
    command = [sys.executable, FOLDER / "make.py", f"--out={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120)
    written = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert written == (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    figures = {path.name: path for path in FOLDER.glob("*.svg")}
    assert figures.keys() == {path.name for path in (tmp_path / "results").glob("*.svg")}
    for name, path in figures.items():  # the bytes depend on the version of matplotlib
        drawn = (tmp_path / "results" / name).read_text()
        assert drawn.count("<path") == path.read_text().count("<path") > 10


def test_every_table_of_the_folder_is_on_the_page(make):
    named = {"paper.csv"}
    for name in make["read_comparisons"](FOLDER):
        named |= {f"{name}.csv", f"{name}_runs.csv"}
    for found in make["read_matrices"](FOLDER):
        named |= set(found.entry["runs"].values())
    assert {path.name for path in FOLDER.glob("*.csv")} <= named


MATRIX = """
[[matrix]]
title = "Both encoders"
across = "encoder"
runs = { strong = "strong_runs.csv", weak = "weak_runs.csv" }
command = "vadapter compare --config=Y"
machine = "one core"
date = "2026-11-30"
show = ["held/loss", "captions/cider"]
note = "Two of them."
"""
ENTRY = """
[[comparison]]
name = "{name}"
title = "{name}: arms"
command = "vadapter compare --config=X --seeds=2"
machine = "one core"
date = "2026-11-30"
baseline = "perceiver"
loss = "held/loss"
score = "captions/cider"
claims = {claims}
weaker = "weak"
paper = ["2", "ViT-L"]
show = ["held/loss", "captions/cider"]
"""


def curve(arm, seed, losses, before=0):
    """Rows of a compare.csv: an evaluation every 100 steps; scores are 2 - loss."""
    rows = []
    for at, loss in enumerate(losses, 1):
        row = {"arm": arm, "seed": seed, "lr": 0.001, "stage": arm, "held_out_loss": loss}
        row |= {"score": 2 - loss, "score_items": 8, "training_loss": ""}
        for axis in AXES:
            row |= {axis: 100 * at, f"{axis}_with_stage_1": 100 * at + before}
        rows.append(row)
    return rows


def write_table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def page(make, tmp_path):
    """The page of two comparisons, a strong and a weak encoder, with chosen curves."""
    folder, entries = tmp_path / "tables", ""
    folder.mkdir()
    (folder / "paper.csv").write_bytes((FOLDER / "paper.csv").read_bytes())
    for name, gain, claims in (
        ("strong", 0.0, ["speed", "end", "start", "encoder"]),
        ("weak", 0.2, []),
    ):
        curves = {
            "perceiver": [[1.8, 1.6, 1.4, 1.2], [1.8, 1.6, 1.4, 1.2]],
            "vadapter": [[1.6, 1.2, 1.1, 1.0], [1.6, 1.4, 1.2, 1.1]],
            "table3_random": [[1.9, 1.9, 1.9, 1.9]], "table3_text": [[1.9, 1.8, 1.7, 1.7]],
            "table3_stage1": [[1.6, 1.2, 1.1, 1.0]],
        }  # fmt: skip
        lag = {"perceiver": 0.5 * gain}
        rows = [
            row
            for arm, seeds in curves.items()
            for seed, losses in enumerate(seeds)
            for row in curve(
                arm, seed, [x + lag.get(arm, gain) for x in losses], 200 * (arm == "vadapter")
            )
        ]
        write_table(folder / f"{name}.csv", rows)
        ends = [
            {"arm": arm, "seed": seed, "steps": 400, "seconds_with_stage_1": 1800.0,
             "held/loss": losses[-1] + gain, "captions/cider": 2 - losses[-1] - gain}
            for arm, seeds in curves.items() for seed, losses in enumerate(seeds)
        ]  # fmt: skip
        write_table(folder / f"{name}_runs.csv", ends)
        entries += ENTRY.format(name=name, claims=claims)
    (folder / "comparisons.toml").write_text(entries + MATRIX)
    make["write"](folder, tmp_path / "out")
    assert (tmp_path / "out" / "results" / "strong.svg").read_text().count("<path") > 30
    return (tmp_path / "out" / "results.md").read_text(encoding="utf-8")


def test_the_summary_answers_each_claim_from_the_curves(page):
    lines = page.splitlines()
    row = {words: next(line for line in lines if line.startswith(f"| {words}")) for words in (
        "Steps to", "Best of", "Start of", "Gain from",
    )}  # fmt: skip
    # The perceiver's best is 1.2 after 400 steps; seed 0 reaches it after 200, seed 1 after 300.
    assert "0.24× (Table 2)" in row["Steps to"]
    assert "0.62× (0.50–0.75) in 2 of 2 seeds, with stage 1 1.12× (1.00–1.25)" in row["Steps to"]
    assert "[strong: arms](#strong-arms)" in row["Steps to"]
    assert "COCO CIDEr 82.4 → 89.6 (ViT-L) (Table 2)" in row["Best of"]
    assert "1.200 → 1.050 (1.000–1.100)" in row["Best of"]
    assert "CIDEr × 100: 80.0 → 95.0 (90.0–100.0)" in row["Best of"]
    assert "random 1.900, text 1.700, stage1 1.000" in row["Start of"]
    assert "perceiver +1.0, VAdapter +6.6 (Table 2)" in row["Gain from"]
    assert "perceiver +0.1, vadapter +0.2" in row["Gain from"]
    for line in row.values():
        assert "`vadapter compare --config=X --seeds=2`" in line
        assert "3 h 30 min, one core" in line  # seven runs of half an hour


def test_the_table_of_runs_has_means_over_seeds_beside_the_paper(page):
    strong = page.split("## strong: arms")[1].split("## weak: arms")[0]
    (row,) = (line for line in strong.splitlines() if line.startswith("| `vadapter` | 2 |"))
    assert "| 1.050<br>(1.000–1.100) | 95.0<br>(90.0–100.0) | 89.6 |" in row
    assert "[strong.csv](results/strong.csv), [strong_runs.csv](results/strong_runs.csv)." in strong
    assert strong.count("At the first evaluation") == 1
    assert "![strong: arms: validation against steps](results/strong.svg)" in strong


def test_a_matrix_has_the_arms_of_several_comparisons_side_by_side(page):
    found = page.split("## Both encoders")[1].splitlines()
    loss, score = (at for at, line in enumerate(found) if line.startswith("**"))
    assert "nats, by encoder" in found[loss]
    assert "CIDEr × 100, by encoder" in found[score]
    assert "| arm | strong | weak |" in found[loss:score]
    row = "| `vadapter` | 1.050<br>(1.000–1.100) | 1.250<br>(1.200–1.300) |"
    assert row in found[loss:score]
    assert any(line.startswith("| `vadapter` | 95.0<br>") for line in found[score:])
    assert "2026-11-30; 7 h 0 min, one core. Two of them." in found


def test_a_claim_without_a_comparison_was_not_run(make):
    text = make["summary"]({}, make["read_table"](FOLDER / "paper.csv"))
    rows = text.splitlines()[2:]
    assert len(rows) == len(make["CLAIMS"])
    assert all(" | not run | – | – |" in row for row in rows)
