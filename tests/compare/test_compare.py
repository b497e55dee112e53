"""`vadapter compare` from end to end: three arms and two seeds are trained once and read again."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.comparisons import ARMS, tiny_comparison, write_comparison
from support.patches import use_devices
from support.shared import make_once

from vadapter.checkpoints.array_io import read_meta
from vadapter.checkpoints.component_store import ComponentStore
from vadapter.cli.main import main
from vadapter.compare.plan import read_plan
from vadapter.compare.reuse import reuse_stages
from vadapter.errors import USER_ERROR
from vadapter.stages.initialization import STORE, finished

RATE = 0.01


def train(folder: Path) -> None:
    recipe = write_comparison(runs.prepare(folder))
    words = ["compare", f"--config={recipe}", "--seeds=2", f"--workdir={folder / 'compare'}"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as log:
        use_devices(patch, 1)
        assert main([*words, f"--config.lr={RATE}"]) == 0, log.getvalue()
    (folder / "log.txt").write_text(log.getvalue())


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with compare.py (the recipe), compare/ (what it trained) and log.txt."""
    return make_once(tmp_path_factory, "compared", train)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the comparison that the test may write to."""
    return Path(shutil.copytree(trained / "compare", tmp_path / "compare"))


@pytest.fixture
def call(capfd):
    """Run a command in this process: (exit code, stdout, stderr)."""

    def run(*words: Any) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    return run


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open() as file:
        return list(csv.DictReader(file))


def measured(folder: Path) -> set[tuple[str, ...]]:
    """The points of compare.csv without the names of arms."""
    keys = ("seed", "lr", "stage", "steps", "held_out_loss", "score", "flops_with_stage_1")
    return {tuple(row[key] for key in keys) for row in table(folder)}


def run_of(folder: Path, arm: str, seed: int = 0) -> Path:
    return folder / arm / f"lr-{RATE}-seed-{seed}"


# -- training ------------------------------------------------------------------------------------


def test_each_arm_is_trained_with_each_seed_and_everything_is_written(trained):
    folder = trained / "compare"
    rows = table(folder)
    assert {(row["arm"], row["seed"]) for row in rows} == {(a, s) for a in ARMS for s in "01"}
    for row in rows:
        assert float(row["training_loss"]) > 0 or row["held_out_loss"]
    assert len({row["data"] for row in rows if row["data"]}) == 1
    for name in ("compare.html", "table.md", "plots/score.png", "plots/loss.png"):
        assert (folder / name).stat().st_size > 1000
        assert f"{folder / name}\n" in (trained / "log.txt").read_text()


def test_each_run_is_announced_with_its_number(trained):
    log = (trained / "log.txt").read_text()
    said = re.findall(r"^\[(\d)/6\] (\w+), lr 0.01, seed (\d): 4 steps", log, re.MULTILINE)
    grid = [(arm, "0") for arm in ARMS] + [(arm, "1") for arm in ARMS]
    assert said == [(str(i), arm, seed) for i, (arm, seed) in enumerate(grid, 1)]
    assert "frozen parts: llm\n" in log


def test_frozen_parts_are_trained_once_and_features_computed_once(trained):
    folder, log = trained / "compare", (trained / "log.txt").read_text()
    assert log.count("llm: lm, ") == 1
    assert log.count("feature cache: ") == 1
    assert not any((run_of(folder, arm) / "features").exists() for arm in ARMS)
    llm = finished(folder / "parts" / "llm")["components"]["llm"]
    for arm in ARMS:
        for seed in (0, 1):
            run = run_of(folder, arm, seed)
            identity = finished(run / arm)["identity"]
            assert identity["start"]["llm"] == llm
            assert identity["seed"] == seed
            assert ComponentStore(run / STORE).describe("llm", llm)  # the run is complete


def test_seeds_start_and_end_in_different_parameters(trained):
    for arm in ARMS:
        one, other = (
            finished(run_of(trained / "compare", arm, seed) / arm)["components"] for seed in (0, 1)
        )
        assert set(one.values()).isdisjoint(other.values())


def test_the_record_names_every_run_and_every_evaluation_was_run(trained):
    folder = trained / "compare"
    record = json.loads((folder / "compare.json").read_text())
    assert record["finished"]
    assert record["test"] == ["test"]
    assert set(record["digests"]) == {"data", "protocol", "frozen"}
    for arm in ARMS:
        assert list(record["arms"][arm]["grid"]) == [str(RATE)]
        assert [run["seed"] for run in record["arms"][arm]["runs"]] == [0, 1]
        for run in record["arms"][arm]["runs"]:
            assert run["prior"] == (["decoder"] if arm == "vadapter" else [])
            score = json.loads(
                (folder / run["run"] / run["stage"] / "eval/test/score.json").read_text()
            )
            assert score["scores"]["n"] == 12


def test_a_second_call_trains_nothing_and_writes_the_same(trained, copy, call, monkeypatch):
    use_devices(monkeypatch, 1)
    folder = copy
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*/done.json")}
    points, record = table(folder), (folder / "compare.json").read_text()
    code, out, err = call(
        "compare", f"--config={trained / 'compare.py'}", "--seeds=2", f"--workdir={folder}",
        f"--config.lr={RATE}",
    )  # fmt: skip
    assert code == 0, err
    assert out.count("already finished") == 6
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*/done.json")} == before
    assert (table(folder), (folder / "compare.json").read_text()) == (points, record)


def test_a_missing_evaluation_is_run_again_and_nothing_else(trained, copy, call, monkeypatch):
    use_devices(monkeypatch, 1)
    folder = copy
    score = run_of(folder, "mlp") / "mlp/eval/test/score.json"
    before = json.loads(score.read_text())["scores"]
    score.unlink()
    code, out, _ = call(
        "compare", f"--config={trained / 'compare.py'}", "--seeds=2", f"--workdir={folder}",
        f"--config.lr={RATE}",
    )  # fmt: skip
    assert code == 0
    assert re.findall("^(.*): evaluating (.*)$", out, re.MULTILINE) == [
        ("mlp, lr 0.01, seed 0", "test")
    ]
    assert json.loads(score.read_text())["scores"] == before


def test_stages_before_the_last_are_trained_once_for_all_rates(trained, copy):
    plan = read_plan(tiny_comparison(trained), copy, seeds=2)
    done, new = plan.run("vadapter", RATE, 1), plan.run("vadapter", 1e-3, 1)
    reuse_stages(new, [plan.run("vadapter", 0.5, 1), new, done])
    record = finished(new.workdir / "decoder")
    assert record == finished(done.workdir / "decoder")
    for name, digest in record["components"].items():
        assert ComponentStore(new.workdir / STORE).describe(name, digest)
    assert not (new.workdir / "vadapter").exists()
    (new.workdir / "decoder" / "done.json").write_text("{}")  # what has begun is left alone
    reuse_stages(new, [done])
    assert (new.workdir / "decoder" / "done.json").read_text() == "{}"


def test_a_stage_is_reused_with_the_tokenizer_of_its_public_weights(trained, copy):
    plan = read_plan(tiny_comparison(trained), copy, seeds=2)
    done, new = (with_public_tlm(plan.run("vadapter", rate, 1)) for rate in (RATE, 1e-3))
    tokenizer = done.workdir / "tokenizers" / "tlm.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text("{}")
    reuse_stages(new, [done])
    assert (new.workdir / "tokenizers" / "tlm.json").read_text() == "{}"


def with_public_tlm(run):
    tlm = run.recipe.components["tlm"] | {"weights": "owner/name"}
    recipe = dataclasses.replace(run.recipe, components=run.recipe.components | {"tlm": tlm})
    return dataclasses.replace(run, recipe=recipe)


# -- reading -------------------------------------------------------------------------------------


def test_the_pages_of_a_comparison_can_be_written_again(copy, call):
    points = table(copy)
    for name in ("compare.csv", "compare.html"):
        (copy / name).unlink()
    code, out, _ = call("compare", copy)
    assert code == 0
    assert table(copy) == points
    assert f"{copy / 'compare.html'}\n" in out


def test_another_baseline_may_be_named_when_reading(copy, call):
    assert call("compare", copy, "--baseline=mlp")[0] == 0
    assert "mlp" in (copy / "table.md").read_text().split("# To ")[1].splitlines()[0]


def test_runs_give_the_points_of_the_comparison_with_seeds_as_one_arm(trained, tmp_path, call):
    folder = trained / "compare"
    paths = [run_of(folder, arm, seed) for arm in ARMS for seed in (1, 0)]
    code, _, err = call("compare", *paths, f"--out={tmp_path / 'out'}")
    assert code == 0, err
    assert measured(tmp_path / "out") == measured(folder)
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(record["arms"]) == list(ARMS)
    assert record["baseline"] == "perceiver"
    assert all([run["seed"] for run in arm["runs"]] == [0, 1] for arm in record["arms"].values())
    own = json.loads((folder / "compare.json").read_text())["digests"]
    assert {key: record["digests"][key] for key in ("data", "frozen")} == {
        key: own[key] for key in ("data", "frozen")
    }
    assert record["test"] == ["captions", "test"]  # whatever all runs were scored on


def test_a_stage_may_be_named_and_the_pages_lie_beside_the_runs(copy, call):
    one, other = run_of(copy, "mlp") / "mlp", run_of(copy, "vadapter")
    assert call("compare", one, other)[0] == 0
    assert {row["arm"] for row in table(copy / "compare")} == {"mlp", "vadapter"}
    assert call("compare", copy / "compare")[0] == 0  # it has a record of its own


# What a finished stage records of what must be equal, and the key of the difference.
UNEQUAL = {
    "data": (("data", "images", "texts"), 5, "data.sets.images.texts"),
    "content": (("fingerprints", "images"), "other", "data.content.images"),
    "weight": (("config", "data", "images"), 2.0, "data.data.images"),
    "batch": (("config", "batch"), 16, "data.batch"),
    "tokenizer": (("tokenizer",), "other", "frozen.tokenizer"),
    "encoder": (("start", "encoder"), "other", "frozen.encoder.content"),
    "LLM": (("start", "llm"), "other", "frozen.llm.content"),
    "dtype": (("dtype",), "bfloat16", "frozen.dtype"),
}


@pytest.mark.parametrize("case", UNEQUAL)
def test_runs_that_differ_in_more_than_the_connector_are_refused(copy, call, case):
    keys, value, named = UNEQUAL[case]
    path = run_of(copy, "mlp") / "mlp" / "done.json"
    record = json.loads(path.read_text())
    node = record["identity"]
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    path.write_text(json.dumps(record))
    for words in ([copy], [run_of(copy, "mlp"), run_of(copy, "vadapter")]):
        code, _, err = call("compare", *words)
        assert code == USER_ERROR
        assert "cannot be compared" in err
        assert named in err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda c: c["evals"]["captions"].update(max_new=3), "protocol.evals.captions.max_new"),
        (lambda c: c["stages"]["mlp"].update(loss_batches=3), "protocol.loss_batches"),
        (lambda c: c["stages"]["mlp"].update(evals=[]), "protocol.evals.captions"),
        (lambda c: c["data"]["held"].update(text_len=20), "protocol.sets.held.text_len"),
    ],
)
def test_runs_that_were_evaluated_differently_are_refused(copy, call, change, named):
    path = run_of(copy, "mlp") / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    code, _, err = call("compare", run_of(copy, "mlp"), run_of(copy, "vadapter"))
    assert code == USER_ERROR
    assert named in err


def test_a_run_records_the_content_of_what_its_losses_and_scores_were_measured_on(trained):
    directory = run_of(trained / "compare", "mlp") / "mlp"
    score = json.loads((directory / "eval" / "captions" / "score.json").read_text())
    measured = {"held": score["protocol"]["data"]}
    assert finished(directory)["measured"] == measured
    (checkpoint, *_) = sorted((directory / "checkpoints").glob("[0-9]*"))
    assert read_meta(checkpoint)["measured"] == measured


def unfinished(folder: Path) -> list[Any]:
    (run_of(folder, "mlp") / "mlp" / "done.json").unlink()
    return [run_of(folder, "mlp"), run_of(folder, "vadapter")]


def without_adapter(folder: Path) -> list[Any]:
    return [folder / "parts", run_of(folder, "mlp")]


def export(folder: Path) -> list[Any]:
    (folder / "export").mkdir()
    (folder / "export" / "config.json").write_text('{"format": "vadapter-export"}')
    return [folder / "export", run_of(folder, "mlp")]


def killed(folder: Path) -> list[Any]:
    record = json.loads((folder / "compare.json").read_text())
    (folder / "compare.json").write_text(json.dumps(record | {"finished": False}))
    return [folder]


def corrupt(folder: Path) -> list[Any]:
    text = (folder / "compare.json").read_text()
    (folder / "compare.json").write_text(text[: len(text) // 2])
    return [folder]


def lost(folder: Path) -> list[Any]:
    shutil.rmtree(run_of(folder, "mlp"))
    return [folder]


def spoiled(folder: Path, text: str | None) -> Path:
    path = run_of(folder, "mlp") / "mlp" / "eval" / "test" / "score.json"
    path.unlink() if text is None else path.write_text(text)
    return folder


def read_only(folder: Path) -> list[Any]:
    (folder / "pages").write_text("a file, where a folder cannot be made")
    return [run_of(folder, "mlp"), run_of(folder, "vadapter"), f"--out={folder / 'pages'}"]


MISTAKES: dict[str, tuple[Callable[[Path], list[Any]], str]] = {
    "nothing": (lambda _: [], "give either --config="),
    "both": (lambda f: ["--config=x.py", f], "give either --config="),
    "no directory": (lambda _: ["--config=x.py"], "needs --workdir=DIR"),
    "no such recipe": (lambda f: ["--config=x.py", f"--workdir={f}"], "x.py: no such file"),
    "a recipe": (lambda f: ["--config=configs/quickstart.py", f"--workdir={f}"], "it has no arms"),
    "an option of training": (lambda f: [f, "--seeds=2"], "--seeds=2: only with --config"),
    "an override": (lambda f: [f, "--config.lr=1"], "--config.lr=1: only with --config"),
    "no run": (lambda f: [f / "mlp", run_of(f, "mlp")], "there is no config.json"),
    "nowhere": (lambda f: [f / "nowhere", run_of(f, "mlp")], "no run in"),
    "an export": (export, "is an exported adapter, not a run"),
    "no adapter": (without_adapter, "parts has no stage of kind adapter, only llm (lm)"),
    "another stage": (lambda f: [run_of(f, "vadapter") / "decoder", run_of(f, "mlp")],
                      "has no stage of kind adapter, only decoder (decoder)"),
    "an unknown stage": (lambda f: [run_of(f, "vadapter") / "vadaptor", run_of(f, "mlp")],
                         "did you mean 'vadapter'"),
    "one arm": (lambda f: [run_of(f, "mlp", 0), run_of(f, "mlp", 1)], "only one arm, mlp"),
    "a run twice": (lambda f: [run_of(f, "mlp"), run_of(f, "mlp")], "the same seed"),
    "unfinished": (unfinished, "mlp/lr-0.01-seed-0/mlp is not finished (step 4 of 4)"),
    "killed": (killed, "is not finished (6 of its runs so far): rerun the command"),
    "corrupt": (corrupt, "compare.json is corrupt"),
    "a lost run": (lost, "the run of arm mlp with seed 0, is missing from the comparison: rerun"),
    "a score that is missing": (
        lambda f: [spoiled(f, None)], "evaluation test of arm mlp, seed 0: "
    ),
    "a score that is corrupt": (
        lambda f: [spoiled(f, '{"scores"')], "is corrupt; rerun the command that trained"
    ),
    "a score of a run that is corrupt": (
        lambda f: [run_of(spoiled(f, "[]"), "mlp"), run_of(f, "vadapter"), f"--out={f / 'o'}"],
        "lr-0.01-seed-0 --stage=mlp --evals=test`",
    ),
    "a baseline": (lambda f: [f, "--baseline=percever"], "did you mean 'perceiver'"),
    "several": (lambda f: [f, run_of(f, "mlp")], "is a comparison: give it alone"),
    "out is a run": (lambda f: [f, f"--out={run_of(f, 'mlp')}"], "is a run or an exported"),
    "out is another": (lambda f: [run_of(f, "mlp"), run_of(f, "vadapter"), f"--out={f}"],
                       "another comparison was trained there; give another folder for the pages, "
                       "--out=DIR"),
    "no permission": (read_only, "pages"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_bad_input_is_explained_in_a_line_and_changes_nothing(copy, call, case):
    make, words = MISTAKES[case]
    arguments = make(copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    code, out, err = call("compare", *arguments)
    assert code == USER_ERROR, out
    assert words in err
    assert err.startswith("vadapter: ")
    assert len(err.splitlines()) == 1
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "words", [["eval"], ["export", "--out=x"], ["rewind", "--step=1"], ["train", "--config="]]
)
def test_commands_on_runs_refuse_a_comparison_by_name(copy, trained, call, words):
    verb, *options = words
    if verb == "train":
        recipe = runs.write_recipe(trained)
        argv = ["train", f"--config={recipe}", f"--workdir={copy}"]
    else:
        argv = [verb, copy, *(["x"] if verb == "export" else options)]
    code, _, err = call(*argv)
    assert code == USER_ERROR
    assert "is a comparison, not a run" in err
