"""`vadapter eval RUN --benchmarks`: official files in; predictions, scores and what is sent out."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import official_files
import pytest
from official_files import MAKERS
from plain_files import write_json

from vadapter.cli import main
from vadapter.config import digest
from vadapter.data.benchmarks.registry import BENCHMARKS, open_benchmark
from vadapter.errors import USER_ERROR
from vadapter.evals import runner
from vadapter.evals.protocols import PROTOCOLS

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
    """Small benchmarks in their official form, with drawn pictures."""
    root = tmp_path_factory.mktemp("official")
    for name in ("flickr8k", "okvqa", "vqav2", "daquar"):
        MAKERS[name](root / name)
    (root / "okvqa/train2014").mkdir()  # for examples with pictures
    (root / "okvqa/train2014/COCO_train2014_000000000009.jpg").touch()
    lines = "".join(f"what is number {n} in the image{n % 5} ?\na box\n" for n in range(30))
    (root / "daquar/qa.894.raw.test.txt").write_text(lines)
    for n in range(5):
        (root / f"daquar/nyu_depth_images/image{n}.png").touch()
    asked = [{"image_id": n, "question": "What?", "question_id": 1000 + n} for n in (1, 2)]
    folder = root / "vqav2"
    write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    for n in (1, 2):
        path = folder / f"test2015/COCO_test2015_{n:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    pictures = sorted((chain / "shapes").glob("*.png"))
    media = [p for p in root.rglob("*") if p.suffix in (".jpg", ".png")]
    for path, picture in zip(sorted(media), pictures, strict=False):
        shutil.copy(picture, path)
    return root


@pytest.fixture
def evaluate(run, data, capsys):
    """`vadapter eval` with arguments: exit code, stdout, stderr."""

    def call(*arguments):
        code = main(["eval", str(run), "--stage=vadapter", f"--data={data}", *arguments])
        return code, *capsys.readouterr()

    return call


def results(run, name):
    folder = run / "vadapter" / "eval" / name
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return folder, json.loads((folder / "score.json").read_text()), rows


# -- What it writes ----------------------------------------------------------------------------


def test_captions_have_predictions_scores_a_file_to_send_in_and_a_gallery(run, evaluate):
    code, out, err = evaluate("--benchmarks=flickr8k")
    assert code == 0, err
    folder, score, rows = results(run, "flickr8k")
    assert {path.name for path in folder.iterdir()} == FILES | {"submission.json"}
    assert f"{folder}/score.json\n" in out
    assert [row["id"] for row in rows] == ["2258277193_586949ec62.jpg", "3385593926_d3e9c21170.jpg"]
    assert len(rows[0]["references"]) == 5
    sent = json.loads((folder / "submission.json").read_text())
    assert sent == [{"image_id": r["id"], "caption": r["prediction"]} for r in rows]
    assert score["protocol_digest"] == digest(PAPER["flickr8k"])
    assert score["protocol"]["decode"]["max_new"] == 32
    assert score["versions"].keys() >= {"vadapter", "jax", "python"}
    assert {"cider", "bleu4", "rouge_l", "n"} <= score["scores"].keys()
    page = (folder / "gallery.html").read_text()
    assert all(heading in page for heading in ("Best", "not the complete official"))
    assert page.count("data:image/") >= 2


def test_a_partial_set_is_named_as_such_everywhere_and_a_complete_one_is_official(
    run, evaluate, data, monkeypatch
):
    _, _, err = evaluate("--benchmarks=flickr8k")
    note = "2 of 1,000 images"
    _, score, _ = results(run, "flickr8k")
    assert score["official"] is False
    assert note in score["note"]
    assert f"flickr8k: not official: {score['note']}" in err
    assert note in (run / "vadapter/eval/flickr8k/gallery.html").read_text()
    records = MAKERS["flickr8k"](data / "again")
    shrunk = official_files.shrunk("flickr8k", records)
    monkeypatch.setitem(BENCHMARKS, "flickr8k", shrunk)
    _, _, err = evaluate("--benchmarks=flickr8k")
    _, score, _ = results(run, "flickr8k")
    assert (score["official"], score["note"]) == (True, "")
    assert "not official" not in err
    _, _, err = evaluate("--benchmarks=flickr8k", "--limit=2")  # of two: that is all
    assert results(run, "flickr8k-first-2")[1]["official"] is True


def test_questions_follow_examples_of_the_training_split(run, evaluate, data):
    code, _, err = evaluate("--benchmarks=okvqa", *SHORT)
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
    evaluate("--benchmarks=okvqa", *SHORT)
    assert results(run, folder.name)[1]["examples"] == [example]


def test_without_public_answers_there_is_no_score_but_a_file_to_send_in(run, evaluate):
    code, _, err = evaluate("--benchmarks=vqav2", "--config.protocol.split=test-dev", *SHORT)
    assert code == 0, err
    (folder,) = (run / "vadapter/eval").glob("vqav2-*")
    folder, score, rows = results(run, folder.name)
    assert "accuracy" not in score["scores"]
    assert not any("score" in row for row in rows)
    sent = json.loads((folder / "submission.json").read_text())
    assert [entry["question_id"] for entry in sent] == [1001, 1002]
    assert "Random" in (folder / "gallery.html").read_text()


def test_several_are_told_in_one_table_and_one_that_is_missing_stops_no_other(evaluate, data):
    code, out, err = evaluate("--benchmarks=flickr8k,coco,daquar", SHOTLESS, "--limit=2")
    assert code == USER_ERROR
    assert err.splitlines()[-1].startswith(f"vadapter: {data}/coco: no such folder")
    assert "vadapter data doctor coco" in err
    rows = [line.split()[0] for line in out.splitlines()[-2:]]
    assert rows == ["flickr8k", "daquar"]


# -- Protocols ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    ["shots=2", "shot_kind=image", "shot_seed=1", "decode.beams=2", "decode.max_new=2"],
)
def test_every_change_of_the_protocol_has_a_folder_of_its_own(run, evaluate, change):
    evaluate("--benchmarks=okvqa", *SHORT)
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


# -- Stopped, and on several devices -----------------------------------------------------------


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "gallery.html"}


def test_what_is_done_is_not_done_again_and_the_end_is_the_same(run, evaluate, monkeypatch):
    evaluate("--benchmarks=daquar", SHOTLESS, "--batch=8")
    (folder,) = (run / "vadapter/eval").iterdir()
    whole = contents(folder)
    shutil.rmtree(folder)
    read, texts = runner.Decoder._read, []

    def until_the_second(self, arrays, out):
        found = read(self, arrays, out)
        texts.extend(found)
        if len(texts) == 16:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(runner.Decoder, "_read", until_the_second)
    assert evaluate("--benchmarks=daquar", SHOTLESS, "--batch=8")[0] == 130
    assert (folder / "predictions.jsonl.part").exists()
    assert not (folder / "score.json").exists()
    texts.clear()
    monkeypatch.setattr(runner.Decoder, "_read", lambda *a: texts.append(read(*a)) or texts[-1])
    code, _, err = evaluate("--benchmarks=daquar", SHOTLESS, "--batch=8")
    assert code == 0
    assert "daquar: 8 of 30 done before" in err
    assert sum(map(len, texts)) == 22
    assert contents(folder) == whole


def environment(devices):
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    tests = Path(__file__).resolve().parents[1]
    return {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "XLA_FLAGS": flags}


def test_a_killed_process_goes_on_and_eight_devices_say_what_one_says(run, data):
    command = [
        *(sys.executable, "-m", "vadapter", "eval", str(run), "--stage=vadapter"),
        *("--benchmarks=flickr8k,daquar", f"--data={data}", SHOTLESS, "--batch=8"),
    ]
    process = subprocess.Popen(command, env=environment(1), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    eval_folder = run / "vadapter/eval"
    while time.monotonic() < end and process.poll() is None:
        if any(p.read_bytes().count(b"\n") > 8 for p in eval_folder.glob("daquar*/*.part")):
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    found = {}
    for devices in (1, 8):
        subprocess.run(command, env=environment(devices), check=True, capture_output=True)
        folders = sorted(eval_folder.iterdir())
        found[devices] = {f.name: contents(f)["predictions.jsonl"] for f in folders}
        shutil.rmtree(eval_folder)
    assert found[1] == found[8]
    assert len(found[1]) == 2


@pytest.mark.parametrize("spoil", ["missing", "double"])
def test_texts_that_are_not_one_of_each_item_are_an_error(evaluate, spoil, monkeypatch):
    read = runner.Decoder._read
    change = {"missing": lambda t: t[:-1], "double": lambda t: [*t, t[0]]}[spoil]
    monkeypatch.setattr(runner.Decoder, "_read", lambda *a: change(read(*a)))
    with pytest.raises(RuntimeError, match="each must have one"):
        evaluate("--benchmarks=flickr8k", "--config.protocol.decode.max_new=4")


# -- Mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--benchmarks=flicker8k"], "none for benchmark 'flicker8k'; did you mean 'flickr8k'"),
        (["--benchmarks=okvqa", "--protocol=papr"], "--protocol=papr: unknown; did you mean"),
        (["--benchmarks=okvqa", "--config.protocol.shot=1"], "did you mean 'shots'"),
        (["--benchmarks=flickr8k", "--config.protocol.shots=4"], "text-only examples are of"),
        (["--benchmarks=coco"], "vadapter data doctor coco"),
        (["--benchmarks=okvqa", "--config.protocol.shots=40"], "shots=40: the training split of"),
        (["--benchmarks=flickr8k", "--config.protocol.decode.max_new=400"], "tokens"),
        (["--evals=captions", "--protocol=paper"], "--protocol=paper: is of benchmarks"),
        (["--evals=captions", "--config.protocol.shots=1"], "is of benchmarks"),
        (["--benchmarks=flickr8k", "--stage=tlm"], "reads text alone"),
    ],
)
def test_mistakes_are_told_in_a_line(run, data, capsys, arguments, words):
    given = [] if arguments[0].startswith("--evals") else [f"--data={data}"]
    assert main(["eval", str(run), *given, *arguments]) == USER_ERROR
    err = capsys.readouterr().err
    assert words in err
    assert err.splitlines()[-1].startswith("vadapter: ")
    assert "Traceback" not in err


def test_a_folder_that_is_not_there_is_told(run, tmp_path, capsys):
    assert main(["eval", str(run), "--benchmarks=all", f"--data={tmp_path / 'x'}"]) == USER_ERROR
    assert "no such folder; in it each benchmark has one of its name" in capsys.readouterr().err


def test_evaluations_and_benchmarks_are_one_or_the_other(run, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["eval", str(run), "--evals=captions", "--benchmarks=all"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


# -- The real sets -----------------------------------------------------------------------------


@pytest.mark.data
def test_the_real_flickr8k_is_read_in_its_official_form(run, data_root, tmp_path, capsys):
    (tmp_path / "flickr8k").symlink_to(data_root / "flickr8k")
    (tmp_path / "daquar").symlink_to(data_root / "daquar")
    arguments = [f"--data={tmp_path}", "--benchmarks=flickr8k,daquar", "--limit=3", SHOTLESS]
    assert (
        main(["eval", str(run), "--stage=vadapter", "--benchmarks=flickr8k,daquar", *arguments])
        == 0
    )
    captions = open_benchmark("flickr8k", tmp_path / "flickr8k", "test")
    assert (len(captions), captions.official) == (1000, True)
    assert sum(len(captions.words(i).captions) for i in range(1000)) == 5000
    for folder in (run / "vadapter/eval").iterdir():
        score = json.loads((folder / "score.json").read_text())
        assert score["note"] == "only the first 3"
        assert score["scores"]["n"] == 3
