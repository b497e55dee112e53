"""The command line: what goes where, what it exits with, what it says about mistakes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import guides
from support.paths import RECIPES, ROOT

from vadapter.cli.main import EXIT_CODES, main
from vadapter.errors import LOST, NON_FINITE, PREEMPTED, USER_ERROR
from vadapter.train import loop

VERBS = (
    "quickstart", "train", "rewind", "check", "plan", "eval", "caption", "ask", "export", "compare",
)  # fmt: skip


@pytest.fixture
def call(capfd):
    """Run a command in this process: (exit code, lines of stdout, stderr)."""

    def run(*argv):
        code = main(list(map(str, argv)))
        out, err = capfd.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def run(chain, tmp_path):
    """A copy of the run that the test may write to."""
    return Path(shutil.copytree(chain / "run", tmp_path / "run"))


def test_the_quickstart_says_what_it_does_and_where_the_results_are(chain):
    log = (chain / "log.txt").read_text()
    said = [line for line in log.splitlines() if line.startswith("[")]
    assert len(said) == 6
    assert said[0] == "[1/6] tlm: train tlm as a language model on text only; 40 steps."
    assert "(stage 1)" in said[3]
    assert "(stage 2)" in said[4]
    assert "baseline" in said[5]
    table = (chain / "run" / "table.txt").read_text()
    assert table in log
    for name in ("table.md", "plots/convergence.png", "gallery.html"):
        assert f"\n{chain / 'run' / name}\n" in log
        assert (chain / "run" / name).is_file()
    assert re.search(r"\nTook (\d+ min )?\d+ s\. Now try: vadapter caption ", log)


def test_the_quickstart_trains_encoder_and_language_models_only_from_scratch(
    monkeypatch, tmp_path, call
):
    chains = []
    monkeypatch.setattr(loop, "train", lambda recipe, *_, **__: chains.append(recipe.chain))
    for words in ([], ["--from-scratch"]):
        assert call("quickstart", f"--workdir={tmp_path / 'run'}", *words)[0] == 0
    packaged, whole = chains
    assert packaged == ("decoder", "perceiver", "vadapter")
    assert whole == ("tlm", "llm", "vision", *packaged)
    with pytest.raises(SystemExit):
        call("quickstart", "--from-scratch", f"--config={RECIPES}")


def test_a_second_quickstart_reuses_finished_stages(chain, run, call):
    recipe = RECIPES
    before = {p: p.stat().st_mtime_ns for p in run.rglob("checkpoints/*/state/*")}
    code, out, _ = call("quickstart", f"--config={recipe}:{chain / 'shapes'}", f"--workdir={run}")
    assert code == 0
    assert sum(line.endswith(": already finished") for line in out) == 6
    assert {p: p.stat().st_mtime_ns for p in run.rglob("checkpoints/*/state/*")} == before
    assert str(run / "gallery.html") in out


def test_training_ends_with_the_report_where_there_are_evaluations(chain, run, call):
    recipe = f"{RECIPES}:{chain / 'shapes'}"
    (run / "gallery.html").unlink()
    code, out, _ = call("train", f"--config={recipe}", f"--workdir={run}")
    assert code == 0
    assert out[-3:] == [str(run / n) for n in ("table.md", "plots/convergence.png", "gallery.html")]
    (run / "table.md").unlink()
    call("train", f"--config={recipe}", f"--workdir={run}", '--config.chain=["tlm","llm"]')
    assert not (run / "table.md").exists()


def test_captions_go_to_stdout_and_nothing_else(chain, call):
    shapes = chain / "shapes"
    files = [shapes / name for name in ("02.png", "02.gif", "05.png")]
    code, out, err = call("caption", chain / "run", "--stage=vadapter", *files)
    assert code == 0
    assert [line.split(": ")[0] for line in out] == list(map(str, files))
    assert all(len(line.split(": ")[1]) > 3 for line in out)
    assert "vadapter: using stage vadapter, step 40" in err
    # The same file, asked again, in other company and alone.
    again = call("caption", chain / "run", "--stage=vadapter", files[2], files[0])[1]
    assert again == [out[2], out[0]]


def test_captions_are_those_of_the_evaluation(chain, call):
    rows = (chain / "run/vadapter/eval/captions/predictions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows[:9]]  # more than one batch of files
    files = [chain / "shapes" / row["id"] for row in rows]
    _, out, _ = call("caption", chain / "run", "--stage=vadapter", "--max-new=12", *files)
    said = [" ".join(row["prediction"].split()) for row in rows]
    assert out == [f"{file}: {text}" for file, text in zip(files, said, strict=True)]


def test_a_file_that_cannot_be_read_is_named_and_the_others_are_captioned(chain, call, tmp_path):
    good = chain / "shapes" / "02.png"
    torn = tmp_path / "torn.png"
    torn.write_bytes(good.read_bytes()[:60])
    note = tmp_path / "note.jpg"
    note.write_text("a note")
    bad = [tmp_path / "nowhere.jpg", torn, note, tmp_path, os.devnull]
    code, out, err = call("caption", chain / "run", bad[0], good, *bad[1:], good)
    assert code == USER_ERROR
    assert len(out) == 2
    assert len(set(out)) == 1
    assert out[0].startswith(f"{good}: ")
    for path, why in zip(
        bad, ("no such file", "", "not an image", "is a directory", "not a regular"), strict=True
    ):
        assert re.search(rf"vadapter: {re.escape(str(path))}: .*{why}", err)
    assert "Traceback" not in err


def test_names_may_hold_any_bytes(chain, tmp_path, call):
    name = os.fsencode(tmp_path) + b"/two: \xff lines\n.png"
    shutil.copy(os.fsencode(chain / "shapes" / "02.png"), name)
    code, out, _ = call("caption", chain / "run", os.fsdecode(name))
    assert code == 0
    assert "\n".join(out).startswith(f"{tmp_path}/two: \\udcff lines")


def test_an_answer_is_one_line(chain, call):
    image, clip = chain / "shapes" / "02.png", chain / "shapes" / "02.gif"
    for file in (image, clip):
        code, out, _ = call("ask", chain / "run", "--stage=vadapter", file, "what colour is it?")
        assert code == 0
        assert len(out) == 1
        assert str(file) not in out[0]
    code, out, err = call("ask", chain / "run", chain / "nowhere.png", "what colour is it?")
    assert (code, out) == (USER_ERROR, [])
    assert "nowhere.png: no such file" in err


def test_unsupported_questions_are_explained(chain, call):
    image = chain / "shapes" / "02.png"
    for question, words in ((" ", "the question is empty"), ("why " * 200, "shorten the question")):
        code, _, err = call("ask", chain / "run", image, question)
        assert code == USER_ERROR
        assert words in err


MISTAKES = {
    "a text-only stage": (["--stage=tlm"], "stage tlm is text-only; choose a stage that takes"),
    "an unknown stage": (["--stage=vadaptor"], "did you mean 'vadapter'"),
    "the encoder's stage": (["--stage=vision"], "choose one of decoder, vadapter, perceiver"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_stage_that_cannot_caption_is_explained(chain, call, case):
    argv, words = MISTAKES[case]
    code, out, err = call("caption", chain / "run", chain / "shapes" / "02.png", *argv)
    assert (code, out) == (USER_ERROR, [])
    assert words in err
    assert err.count("\n") <= 2


def test_a_directory_without_a_run_is_explained(chain, call, tmp_path):
    code, _, err = call("caption", tmp_path, chain / "shapes" / "02.png")
    assert code == USER_ERROR
    assert f"no run in {tmp_path}" in err


def test_an_evaluation_prints_scores_and_leaves_its_files(run, call):
    scores = json.loads((run / "perceiver" / "done.json").read_text())["scores"]
    folder = run / "perceiver" / "eval" / "captions"
    shutil.rmtree(folder)
    code, out, err = call("eval", run)
    assert code == 0
    assert "vadapter: using stage perceiver, step 40" in err
    head = next(i for i, line in enumerate(out) if line.split() == ["score", "captions"])
    table = dict(re.split(r"\s{2,}", line) for line in out[head + 2 :])
    saved = json.loads((folder / "score.json").read_text())
    assert list(table) == ["n", *(name for name in saved["scores"] if name != "n")]
    assert table["n"] == "12"
    score, low, high = map(float, re.fullmatch(r"(.+) \[(.+), (.+)\]", table["cider"]).groups())
    assert score == pytest.approx(100 * scores["captions/cider"], abs=0.06)
    assert (low, high) == pytest.approx([100 * x for x in saved["intervals"]["cider"]], abs=0.06)
    assert low < score < high
    assert re.fullmatch(r"\d+\.\d", table["ended"])  # a share, without an interval
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["gallery.html", "predictions.jsonl", "score.json"]
    assert "perceiver: captions" in (folder / "gallery.html").read_text()


def test_an_evaluation_of_a_part_over_data_that_has_moved(chain, run, call, tmp_path):
    config = (run / "config.json").read_text().replace(str(chain / "shapes"), "/nowhere")
    (run / "config.json").write_text(config)
    code, _, err = call("eval", run, "--evals=captions", "--limit=4", "--batch=8")
    assert code == USER_ERROR
    assert "/nowhere" in err
    whole = (run / "perceiver/eval/captions/predictions.jsonl").read_text().splitlines()
    moved = shutil.copytree(chain / "shapes", tmp_path / "moved")
    override = f"--config.data.held.source.table={moved / 'images.jsonl'}"
    code, _, err = call("eval", run, "--evals=captions", "--limit=4", "--batch=8", override)
    assert code == 0, err
    part = (run / "perceiver/eval/captions-first-4/predictions.jsonl").read_text().splitlines()
    text = lambda lines: [json.loads(line)["prediction"] for line in lines]  # noqa: E731
    assert text(part) == text(whole[:4])


def test_help_loads_neither_jax_nor_numpy():
    code = """
import sys
from vadapter.cli.main import main
try:
    main(["--help"])
finally:
    print(len(sys.modules), *sys.modules, sep="\\n", file=sys.stderr)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    count, *names = done.stderr.splitlines()
    assert "usage: vadapter" in done.stdout
    assert not {"jax", "numpy", "flax", "orbax", "rich", "ml_collections"} & set(names)
    assert int(count) < 250
    assert sum(name.startswith("vadapter") for name in names) < 20


def test_a_renamed_option_works_with_a_warning(capsys):
    argv = ["plan", "--config=nowhere.py", "--topology=cpu:1", "--utilisation=0.5"]
    assert main(argv) == USER_ERROR
    error = capsys.readouterr().err
    assert (
        "vadapter: warning: --utilisation is now --utilization; the old name will be removed"
        in error
    )
    assert "nowhere.py: no such file" in error


def test_help_and_the_guide_list_the_same_exit_codes():
    table = guides.section("launch/README.md", "Exit codes").split("| exit code |")[1]
    codes = re.findall(r"^\| (\d+) \|", table, re.MULTILINE)
    assert re.findall(r"\b\d+\b", EXIT_CODES) == codes
    assert {LOST, PREEMPTED, NON_FINITE, USER_ERROR} <= set(map(int, codes))


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_lists_every_option_and_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"] if verb else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    if not verb:
        assert all(f"\n    {name}" in text for name in VERBS)
        assert "exit codes" in text
        return
    assert f"example:\n  vadapter {verb} " in text
    assert ("--config.a.b=VALUE" in text) == (verb != "rewind")
    options = re.findall(r"^  (--[\w-]+|[A-Z]+)\b(.*(?:\n {10,}.*)?)", text, re.MULTILINE)
    assert options
    assert all(len(words.split()) > 1 for _, words in options)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["captoin"],
        ["caption"],
        ["caption", "RUN"],
        ["ask", "RUN", "FILE"],
        ["train", "--config=configs/quickstart.py"],
        ["rewind", "RUN", "--step=1", "--config.seed=1"],
        ["data", "index", "SHARDS", "--config.seed=1"],
        ["eval", "RUN", "--limt=3"],
        ["eval", "RUN", "--limit=0"],
        ["caption", "RUN", "FILE", "--max-new=-1"],
    ],
    ids=" ".join,
)
def test_mistakes_in_the_command_are_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "usage: vadapter" in capsys.readouterr().err


def options_of(verb, capsys):
    with pytest.raises(SystemExit):
        main([*verb.split(), "--help"])
    usage = capsys.readouterr().out
    return sorted(set(re.findall(r"^  (?:-\w, )?(--[a-z][a-z-]+)(?=[ =,\n])", usage, re.MULTILINE)))


@pytest.mark.parametrize("verb", [*VERBS, "inspect", "data show"])
def test_every_misspelled_option_is_answered_with_the_nearest_one(verb, capsys):
    options = options_of(verb, capsys)
    assert "--help" in options
    for option in options:
        wrong = option[:-2] + option[-1] + option[-2]  # the last two letters are swapped
        if wrong == option:
            wrong = option + "x"
        with pytest.raises(SystemExit) as stop:
            main([*verb.split(), f"{wrong}=2"])
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert f"usage: vadapter {verb}" in error
        assert f"{wrong}: did you mean {option}?" in error


def test_a_word_that_is_near_no_option_and_a_known_one_have_no_hint(capsys):
    for words in (["--qqqqqq=1"], ["--limit=nothing"], ["--config=a.py"]):
        with pytest.raises(SystemExit):
            main(["eval", "RUN", *words])
        assert "did you mean" not in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "--sedes=2"])
    assert "did you mean --seeds?" in capsys.readouterr().err


def test_a_closed_pipe_is_no_crash(chain):
    words = [sys.executable, "-m", "vadapter", "caption", str(chain / "run")]
    words += [str(chain / "shapes" / "02.png")] * 3
    command = f"{' '.join(words)} | head -c 5; echo ${{PIPESTATUS[0]}}"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env["XLA_FLAGS"] = env["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert done.stdout[:5] == str(chain)[:5]
    assert done.stdout[5:].strip() in ("0", "141")


def test_a_compilation_cache_that_others_can_write_to_is_refused(tmp_path, monkeypatch, call):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    monkeypatch.setenv("VADAPTER_COMPILE_CACHE", str(tmp_path / "cache"))
    code, _, errors = call("eval", tmp_path / "nowhere")
    assert code == USER_ERROR
    assert "other users can write to the compilation cache, and so run code as you" in errors
