"""`vadapter eval RUN --benchmarks`: official files in; predictions, scores and a submission."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from support import official_files
from support.cases import some_slow
from support.patches import wrap_generate
from support.paths import TESTS
from support.small_benchmarks import PHOTOS, QUESTIONS, write_benchmarks

from vadapter.cli.main import main
from vadapter.config import digest
from vadapter.data.benchmarks.source import open_benchmark
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.errors import USER_ERROR
from vadapter.evaluate.protocols import PROTOCOLS

PAPER = PROTOCOLS["paper"]
FILES = {"predictions.jsonl", "score.json", "gallery.html"}
SHOTLESS = "--config.protocol.shots=0"
# Its language models have room for few examples.
SHORT = ("--config.protocol.shots=1", "--config.protocol.decode.max_new=4")


@pytest.fixture(scope="module")
def trained(chain, tmp_path_factory):
    return shutil.copytree(chain / "run", tmp_path_factory.mktemp("benchmarks") / "run")


@pytest.fixture
def run(trained):
    """The run, without results of benchmarks."""
    shutil.rmtree(trained / "vadapter" / "eval", ignore_errors=True)
    return trained


@pytest.fixture(scope="module")
def data(chain, tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("official"), chain / "shapes")


@pytest.fixture
def evaluate(run, data, capsys):
    """`vadapter eval` with arguments: exit code, stdout, stderr."""

    def call(*arguments):
        code = main(["eval", str(run), "--stage=vadapter", f"--data={data}", *arguments])
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """(folder, {arguments: what was printed}) of `evaluated`."""
    return tmp_path_factory.mktemp("evaluated"), {}


@pytest.fixture
def evaluated(run, evaluate, store):
    """As `evaluate`, at the beginning of a test: run once, later tests get copies of its files."""
    folder, printed = store

    def call(*arguments):
        kept = folder / digest(arguments)[:8]
        if arguments not in printed:
            printed[arguments] = evaluate(*arguments)
            shutil.copytree(run / "vadapter" / "eval", kept)
        else:
            shutil.copytree(kept, run / "vadapter" / "eval")
        return printed[arguments]

    return call


def results(run, name):
    folder = run / "vadapter" / "eval" / name
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return folder, json.loads((folder / "score.json").read_text()), rows


# -- What it writes ----------------------------------------------------------------------------


def test_captions_have_predictions_scores_a_submission_and_a_gallery(run, evaluated):
    code, out, err = evaluated("--benchmarks=flickr8k")
    assert code == 0, err
    folder, score, rows = results(run, "flickr8k")
    assert {path.name for path in folder.iterdir()} == FILES | {"submission.json"}
    assert f"{folder}/score.json\n" in out
    assert [row["id"] for row in rows] == [f"{1000 + n}_{n:010x}.jpg" for n in range(PHOTOS)]
    assert len(rows[0]["references"]) == 5
    sent = json.loads((folder / "submission.json").read_text())
    assert sent == [{"image_id": r["id"], "caption": r["prediction"]} for r in rows]
    assert score["protocol_digest"] == digest(PAPER["flickr8k"])
    assert score["protocol"]["decode"]["max_new"] == 32
    assert score["versions"].keys() >= {"vadapter", "jax", "python"}
    assert {"cider", "bleu4", "rouge_l", "n"} <= score["scores"].keys()
    page = (folder / "gallery.html").read_text()
    groups = ("<h3>Best<", "<h3>Worst<", "<h3>Random<")
    assert all(words in page for words in (*groups, "not the complete official"))
    assert page.count("data:image/") == PHOTOS


def test_a_partial_set_is_reported_as_unofficial_and_a_complete_one_as_official(
    run, evaluate, evaluated, data, monkeypatch
):
    _, _, err = evaluated("--benchmarks=flickr8k")
    note = f"{PHOTOS} of 1,000 images"
    _, score, _ = results(run, "flickr8k")
    assert score["official"] is False
    assert note in score["note"]
    assert f"flickr8k: not official: {score['note']}" in err
    assert note in (run / "vadapter/eval/flickr8k/gallery.html").read_text()
    source = open_benchmark("flickr8k", data / "flickr8k", "test")
    examples = [source.text_only(i) for i in range(len(source))]
    monkeypatch.setitem(BENCHMARKS, "flickr8k", official_files.shrunk("flickr8k", examples))
    _, _, err = evaluate("--benchmarks=flickr8k")
    _, score, _ = results(run, "flickr8k")
    assert (score["official"], score["note"]) == (True, "")
    assert "not official" not in err
    for limit, official in ((PHOTOS, True), (2, False)):
        evaluate("--benchmarks=flickr8k", f"--limit={limit}")
        assert results(run, f"flickr8k-first-{limit}")[1]["official"] is official


def test_questions_follow_examples_of_the_training_split(run, evaluate, evaluated, data):
    code, _, err = evaluated("--benchmarks=okvqa", *SHORT)
    assert code == 0, err
    (folder,) = (run / "vadapter/eval").glob("okvqa-*")
    folder, score, rows = results(run, folder.name)
    assert folder.name == f"okvqa-{score['protocol_digest'][:8]}"
    (example,) = score["examples"]
    assert "Question: What is " in example
    assert "Answer: net" in example
    ids = [q.id for e in open_benchmark("okvqa", data / "okvqa") for q in e.qa]
    assert [row["question_id"] for row in rows] == ids
    sent = json.loads((folder / "submission.json").read_text())
    assert sent == [{"question_id": int(r["question_id"]), "answer": r["prediction"]} for r in rows]
    shutil.rmtree(folder)
    evaluate("--benchmarks=okvqa", *SHORT)
    assert results(run, folder.name)[1]["examples"] == [example]


def test_without_public_answers_there_is_no_score_but_a_submission(run, evaluate):
    code, _, err = evaluate("--benchmarks=vqav2", "--config.protocol.split=test-dev", *SHORT)
    assert code == 0, err
    (folder,) = (run / "vadapter/eval").glob("vqav2-*")
    folder, score, rows = results(run, folder.name)
    assert "accuracy" not in score["scores"]
    assert not any("score" in row for row in rows)
    sent = json.loads((folder / "submission.json").read_text())
    assert [entry["question_id"] for entry in sent] == [1001, 1002]
    assert "Random" in (folder / "gallery.html").read_text()


def test_several_benchmarks_share_a_table_and_a_missing_one_stops_no_other(evaluate, data):
    code, out, err = evaluate("--benchmarks=flickr8k,coco,daquar", SHOTLESS, "--limit=2")
    assert code == USER_ERROR
    assert err.splitlines()[-1].startswith(f"vadapter: {data}/coco: no such folder")
    assert "vadapter data doctor coco" in err
    rows = [line.split()[0] for line in out.splitlines()[-2:]]
    assert rows == ["flickr8k", "daquar"]


# -- Protocols ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    some_slow(
        ["shots=2", "shot_kind=image", "shot_seed=1", "decode.beams=2", "decode.max_new=2"],
        fast=["shots=2", "decode.max_new=2"],
    ),
)
def test_every_change_of_the_protocol_has_its_own_directory(run, evaluate, evaluated, change):
    evaluated("--benchmarks=okvqa", *SHORT)
    (plain,) = (run / "vadapter/eval").iterdir()
    code, _, err = evaluate("--benchmarks=okvqa", *SHORT, f"--config.protocol.{change}")
    assert code == 0, err
    other = [p for p in (run / "vadapter/eval").iterdir() if p != plain]
    assert len(other) == 1
    _, score, rows = results(run, other[0].name)
    before = results(run, plain.name)[1]
    key, _, value = change.rpartition(".")[2].partition("=")
    there = score["protocol"]["decode"] if "decode" in change else score["protocol"]
    assert str(there[key]) == value
    assert score["protocol_digest"] != before["protocol_digest"]
    if change == "shots=2":
        assert len(score["examples"]) == 2
    if change == "decode.max_new=2":
        assert not any(len(row["prediction"].split()) > 2 for row in rows)


# -- Interrupted, and on several devices -----------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "gallery.html"}


def count_generations(monkeypatch, stop_after=None):
    """Return a list that receives all generations from now on.

    Args:
      stop_after: raise KeyboardInterrupt after so many, as Ctrl-C does.
    """
    generations = []

    def counting(generate, *args, **kwargs):
        for group in generate(*args, **kwargs):
            generations.extend(group)
            if len(generations) == stop_after:
                raise KeyboardInterrupt
            yield group

    wrap_generate(monkeypatch, counting)
    return generations


DAQUAR = ("--benchmarks=daquar", SHOTLESS, "--batch=8")


def test_an_interrupted_evaluation_resumes_with_the_same_result(
    run, evaluate, evaluated, monkeypatch
):
    evaluated(*DAQUAR)
    (folder,) = (run / "vadapter/eval").iterdir()
    whole = contents(folder)
    shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        count_generations(patch, stop_after=16)
        assert evaluate(*DAQUAR)[0] == 130
    assert (folder / "predictions.jsonl.part").exists()
    assert not (folder / "score.json").exists()
    generations = count_generations(monkeypatch)
    code, _, err = evaluate(*DAQUAR)
    assert code == 0
    assert f"daquar: resuming: 8 of {QUESTIONS} already done" in err
    assert len(generations) == QUESTIONS - 8
    assert contents(folder) == whole


# Two batches are kept, the third is torn when the process is killed.
KILLED = """
import os, signal, sys
from vadapter.cli.main import main
from vadapter.evaluate.partial_results import PartialResults

append = PartialResults.append

def torn(self, texts):
    append(self, texts)
    if texts[0][0] == 16:
        os.truncate(self._path, self._path.stat().st_size - 3)
        os.kill(os.getpid(), signal.SIGKILL)

PartialResults.append = torn
main(sys.argv[1:])
"""


def test_a_killed_process_resumes_with_the_same_result(run, data, evaluate, evaluated, monkeypatch):
    arguments = ["eval", str(run), "--stage=vadapter", f"--data={data}", *DAQUAR]
    evaluated(*DAQUAR)
    (folder,) = (run / "vadapter/eval").iterdir()
    whole = contents(folder)
    shutil.rmtree(folder)
    killed = [sys.executable, "-c", KILLED, *arguments]
    done = subprocess.run(killed, env=environment(8), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in folder.iterdir()] == ["predictions.jsonl.part"]
    generations = count_generations(monkeypatch)
    _, _, err = evaluate(*DAQUAR)
    assert f"daquar: resuming: 16 of {QUESTIONS} already done" in err
    assert len(generations) == QUESTIONS - 16
    assert contents(folder) == whole


def test_complete_benchmarks_are_not_run_again(run, evaluate, evaluated, monkeypatch):
    evaluated(*DAQUAR)
    (folder,) = (run / "vadapter/eval").iterdir()
    whole = contents(folder)
    generations = count_generations(monkeypatch)
    _, out, err = evaluate("--benchmarks=daquar,flickr8k", SHOTLESS)
    assert len(generations) == PHOTOS
    assert "daquar: already complete" in err
    assert [line.split()[0] for line in out.splitlines()[-2:]] == ["daquar", "flickr8k"]
    assert contents(folder) == whole
    score = json.loads((folder / "score.json").read_text())
    low, high = score.pop("intervals")["accuracy"]
    text = f"{100 * score['scores']['accuracy']:.1f}"
    assert f"  {text} [{100 * low:.1f}, {100 * high:.1f}]  " in out
    (folder / "score.json").write_text(json.dumps(score))  # as earlier versions wrote it
    _, out, err = evaluate("--benchmarks=daquar", SHOTLESS)
    assert "daquar: already complete" in err
    assert re.search(rf"  {text}  +{QUESTIONS}  ", out)
    (folder / "predictions.jsonl").unlink()
    evaluate("--benchmarks=daquar", SHOTLESS)
    assert contents(folder) == whole


def environment(devices):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    tests = TESTS
    return {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "XLA_FLAGS": flags}


@pytest.mark.slow
def test_eight_devices_generate_the_same_as_one(run, data, evaluate):
    both = ("--benchmarks=flickr8k,daquar", SHOTLESS, "--batch=8")
    evaluate(*both)  # on eight
    folders = sorted((run / "vadapter/eval").iterdir())
    eight = {folder.name: contents(folder) for folder in folders}
    lines = {line for files in eight.values() for line in files["predictions.jsonl"].splitlines()}
    assert len({json.loads(line)["prediction"] for line in lines}) > 2, (
        "equal generations prove little"
    )
    shutil.rmtree(run / "vadapter/eval")
    command = [sys.executable, "-m", "vadapter", "eval", run, "--stage=vadapter", f"--data={data}"]
    subprocess.run([*command, *both], env=environment(1), check=True, capture_output=True)
    assert {folder.name: contents(folder) for folder in folders} == eight


@pytest.mark.parametrize("spoil", ["missing", "double"])
def test_generations_that_are_not_one_per_item_are_an_error(evaluate, spoil, monkeypatch):
    change = {"missing": lambda g: g[:-1], "double": lambda g: [*g, g[0]]}[spoil]
    wrap_generate(
        monkeypatch, lambda generate, *args, **kwargs: map(change, generate(*args, **kwargs))
    )
    with pytest.raises(RuntimeError, match="expected one generation for each"):
        evaluate("--benchmarks=flickr8k", "--config.protocol.decode.max_new=4")


# -- User errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--benchmarks=flicker8k"], "has no benchmark 'flicker8k'; did you mean 'flickr8k'"),
        (["--benchmarks=okvqa", "--protocol=papr"], "--protocol=papr: unknown; did you mean"),
        (["--benchmarks=okvqa", "--config.protocol.shot=1"], "did you mean 'shots'"),
        (
            ["--benchmarks=flickr8k", "--config.protocol.shots=4"],
            "text-only examples exist for questions only",
        ),
        (["--benchmarks="], "pass all, or some of coco, "),
        (["--benchmarks=okvqa", "--config.protocol.shots=two"], "--config.protocol.shots=two: "),
        (["--benchmarks=coco"], "`vadapter data doctor coco` lists them"),
        (["--benchmarks=okvqa", "--config.protocol.shots=40"], "shots=40: the training split of"),
        (["--benchmarks=flickr8k", "--config.protocol.decode.max_new=400"], "tokens"),
        (["--benchmarks=flickr8k", "--limit=1"], "CIDEr needs at least 2 items"),
        (["--protocol=paper"], "--protocol=paper: applies only to benchmarks"),
        (["--evals=captions", "--protocol=paper"], "--protocol=paper: applies only to benchmarks"),
        (["--evals=captions", "--config.protocol.shots=1"], "applies only to benchmarks"),
        (["--benchmarks=flickr8k", "--stage=tlm"], "is text-only"),
    ],
)
def test_user_errors_are_reported_in_one_line(run, data, capsys, arguments, words):
    given = [f"--data={data}"] if arguments[0].startswith("--benchmarks") else []
    assert main(["eval", str(run), *given, *arguments]) == USER_ERROR
    assert words in the_error(capsys.readouterr().err)


def the_error(err):
    """Return the only line that is no note on the benchmark or stage, and not progress."""
    (line,) = (
        line
        for line in err.splitlines()
        if not re.search(r"not official|^vadapter: using stage|^\w+: \d+/\d+", line)
    )
    assert line.startswith("vadapter: ")
    return line


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("okvqa", "OpenEnded_mscoco_val2014_questions.json"),
        ("okvqa", "mscoco_train2014_annotations.json"),  # of the examples
        ("okvqa", "val2014"),
        ("flickr8k", "dataset_flickr8k.json"),
    ],
)
def test_missing_official_files_are_named_with_the_command_that_checks_them(
    run, data, tmp_path, capsys, name, file
):
    folder = shutil.copytree(data / name, tmp_path / name)
    (folder / file).rename(tmp_path / "elsewhere")
    command = ["eval", str(run), "--stage=vadapter", f"--data={tmp_path}", f"--benchmarks={name}"]
    assert main([*command, "--config.protocol.decode.max_new=4"]) == USER_ERROR
    line = the_error(capsys.readouterr().err)
    assert file in line
    assert line.endswith(f"; run `vadapter data doctor {name} --dir={folder}` to check the files")


def test_a_missing_data_folder_is_reported(run, tmp_path, capsys):
    assert main(["eval", str(run), "--benchmarks=all", f"--data={tmp_path / 'x'}"]) == USER_ERROR
    assert (
        "no such folder; it must hold one folder of official files for each"
        in capsys.readouterr().err
    )


def test_evaluations_and_benchmarks_exclude_each_other(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), "--evals=captions", "--benchmarks=all"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


# -- The real sets -----------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_sets_are_official_until_they_are_limited(run, data_root, tmp_path):
    (tmp_path / "flickr8k").symlink_to(data_root / "flickr8k")
    (tmp_path / "daquar").symlink_to(data_root / "daquar")
    arguments = [f"--data={tmp_path}", "--benchmarks=flickr8k,daquar", "--limit=3", SHOTLESS]
    assert main(["eval", str(run), "--stage=vadapter", *arguments]) == 0
    captions = open_benchmark("flickr8k", tmp_path / "flickr8k", "test")
    assert (len(captions), captions.official) == (1000, True)
    assert sum(len(captions.text_only(i).captions) for i in range(1000)) == 5000
    photos = open_benchmark("daquar", tmp_path / "daquar", "test")
    assert (len(photos), photos.official) == (653, True)
    assert sum(len(photos.text_only(i).qa) for i in range(653)) == 5673
    for folder in (run / "vadapter/eval").iterdir():
        score = json.loads((folder / "score.json").read_text())
        assert score["note"] == "only the first 3"
        assert score["scores"]["n"] == 3
