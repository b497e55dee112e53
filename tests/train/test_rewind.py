"""Back to an earlier checkpoint, and on from there."""

import json

import pytest
from support import faults, runs

from vadapter.checkpoints.manager import steps
from vadapter.cli.main import main
from vadapter.errors import USER_ERROR, CheckpointError, ConfigError
from vadapter.io.lock import lock
from vadapter.recipe.schema import read
from vadapter.train.loop import train
from vadapter.train.rewind import rewind


@pytest.fixture
def recipe(tmp_path):
    return read(runs.text_only(runs.prepare(tmp_path), keep=9))


@pytest.fixture
def stopped(recipe, tmp_path):
    """A run that ended in an error at its fifth step, with steps 2 and 4 saved."""
    with faults.injected("RAISE:llm:step:5"), pytest.raises(RuntimeError, match="injected"):
        train(recipe, tmp_path / "run")
    return tmp_path / "run"


def test_training_resumes_from_the_restored_step_and_ends_in_the_same_bits(
    recipe, stopped, tmp_path, capsys
):
    assert main(["rewind", str(stopped), "--step=3"]) == 0
    assert capsys.readouterr().out.endswith(
        "llm: will resume from step 2; moved to quarantine/: 4\n"
    )
    saved = stopped / "llm/checkpoints"
    assert (steps(saved), steps(saved / "quarantine")) == ([2], [4])
    train(recipe, stopped)
    said = capsys.readouterr().out
    assert "llm: resumed at step 2\n" in said
    assert "saved with" not in said
    assert (steps(saved), steps(saved / "quarantine")) == ([2, 4, 6], [4])
    rows = [json.loads(line) for line in (stopped / "llm/metrics.jsonl").read_text().splitlines()]
    again = [(row["step"], row["attempt"]) for row in rows if "loss" in row][4:]
    assert again == [(3, 2), (4, 2), (5, 2), (6, 2)]
    train(recipe, tmp_path / "whole")
    assert runs.trained_digests(stopped, ("llm",)) == runs.trained_digests(
        tmp_path / "whole", ("llm",)
    )
    with pytest.raises(CheckpointError, match="llm is finished; a finished stage cannot be"):
        rewind(stopped, 2)


def test_a_step_that_is_quarantined_twice_is_kept_twice(recipe, stopped):
    assert rewind(stopped, 2, "llm") == ("llm", 2, [4])
    assert rewind(stopped, 2, "llm") == ("llm", 2, [])
    with faults.injected("RAISE:llm:step:5"), pytest.raises(RuntimeError, match="injected"):
        train(recipe, stopped)
    assert rewind(stopped, 2) == ("llm", 2, [4])
    aside = stopped / "llm/checkpoints/quarantine"
    assert sorted(path.name for path in aside.iterdir()) == ["4", "4.1"]


def test_an_impossible_rewind_is_explained_and_changes_nothing(stopped, tmp_path, capsys):
    for argv, says in {
        (stopped, "--step=1"): "no step up to 1 in ",
        (stopped, "--step=2", "--stage=lm"): "--stage=lm: unknown; ",
        (tmp_path, "--step=2"): f"no run in {tmp_path}",
    }.items():
        assert main(["rewind", *map(str, argv)]) == USER_ERROR
        assert says in capsys.readouterr().err
    with lock(stopped / ".lock"), pytest.raises(ConfigError, match="in use by another run"):
        rewind(stopped, 2)
    assert steps(stopped / "llm/checkpoints") == [2, 4]
