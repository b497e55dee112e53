"""A run that version 0.1.0 wrote and did not finish: it resumes, is evaluated, exported and used.

`fixtures/run_0_1_0.tar.gz` holds the recipe with that version's keys, its images, and a run on one
CPU device that was killed at step 3 of its last stage, whose checkpoint is of step 2.
"""

import json
import subprocess
import tarfile

import pytest
from support import runs
from support.paths import TESTS

import vadapter


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with the run, resumed to its end."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(TESTS / "fixtures" / "run_0_1_0.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    # Evaluations are free to change, and compile as much as the whole rest.
    free = ("--config.stages.vadapter.evals=[]", "--config.stages.vadapter.eval_every=0")
    renamed = "--config.stages.vadapter.dropout=false"
    log = vadapter_in(folder, "train", "--config=recipe.py:shapes", "--workdir=run", renamed, *free)
    assert "resumed at step 2" in log
    assert "vadapter: warning: --config.stages.vadapter.dropout is now use_dropout" in log
    assert "vadapter: warning: config.stages.llm.dropout is now use_dropout" in log
    return folder


def vadapter_in(folder, *arguments):
    """Run a command there, on one device; return what it prints."""
    done = subprocess.run(
        [*runs.VADAPTER, *arguments],
        env=runs.environment(), cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_run_of_an_earlier_version_ends_within_rounding(old):
    expected = json.loads((old / "expected_done.json").read_text())
    done = json.loads((old / "run/vadapter/done.json").read_text())
    assert done["components"].keys() == expected["components"].keys()
    loss = expected["scores"]["held/loss"]
    assert done["scores"]["held/loss"] == pytest.approx(loss, abs=1e-5)


def test_it_is_evaluated_exported_and_used(old):
    vadapter_in(old, "eval", "run", "--stage=vadapter", "--evals=captions", "--limit=2")
    folder = old / "run/vadapter/eval/captions-first-2"
    scores = json.loads((folder / "score.json").read_text())
    assert scores["scores"]["n"] == 2
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]

    vadapter_in(old, "export", "run", "export")
    model = vadapter.VAdapter.from_pretrained(old / "export")
    images = [old / "shapes" / row["id"] for row in rows]
    captions = model.caption(images, max_new=scores["eval"]["max_new"])
    assert captions == [row["prediction"] for row in rows]
