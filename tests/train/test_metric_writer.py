import json
import os
import pty
import subprocess
import sys

import pytest
from support.patches import use_clock

from vadapter.io.json_files import history, rows, write_json
from vadapter.train.metric_writer import MetricWriter


def write(directory, *steps, **values):
    with MetricWriter(directory, "stage", 10) as writer:
        for step in steps:
            writer.write(step, values or {"loss": 1 / step})


def test_a_row_holds_step_attempt_time_and_values(tmp_path):
    write(tmp_path, 1, loss=2.5, bad=0)
    [row] = rows(tmp_path / "metrics.jsonl")
    assert row.pop("time") > 1.7e9
    assert row == {"step": 1, "attempt": 1, "loss": 2.5, "bad": 0.0}


def test_each_writer_is_an_attempt_and_the_last_one_counts(tmp_path):
    write(tmp_path, 1, 2, 3, loss=1.0)
    write(tmp_path, 2, 3, 4, loss=2.0)
    path = tmp_path / "metrics.jsonl"
    assert [(row["step"], row["attempt"]) for row in rows(path)] == [
        (1, 1), (2, 1), (3, 1), (2, 2), (3, 2), (4, 2)
    ]  # fmt: skip
    assert [(row["step"], row["loss"]) for row in history(path)] == [(1, 1), (2, 2), (3, 2), (4, 2)]


def test_scores_and_losses_of_one_step_are_both_kept(tmp_path):
    with MetricWriter(tmp_path, "stage", 10) as writer:
        writer.write(5, {"loss": 1.0})
        writer.write(5, {"val/loss": 2.0})
        writer.write(5, {"val/cider": 0.5})
    kept = [
        {k for k in row if "/" in k or k == "loss"} for row in history(tmp_path / "metrics.jsonl")
    ]
    assert sorted(kept, key=len) == [{"loss"}, {"val/loss", "val/cider"}]


def test_a_partial_line_is_ignored_and_the_next_is_valid(tmp_path):
    write(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    assert [row["step"] for row in rows(path)] == [1]
    write(tmp_path, 3)
    assert [(row["step"], row["attempt"]) for row in rows(path)] == [(1, 1), (3, 2)]
    path.write_bytes(path.read_bytes() + b'\x00\xff\n[1]\n{"other": 1}\n\n')
    assert [row["step"] for row in rows(path)] == [1, 3]


def test_no_file_is_no_rows(tmp_path):
    assert list(rows(tmp_path / "metrics.jsonl")) == history(tmp_path / "metrics.jsonl") == []


def test_evaluated_steps_are_recorded(tmp_path):
    write(tmp_path, 3, loss=1.0)
    write(tmp_path, 4, **{"val/cider": 1.0})
    with MetricWriter(tmp_path, "stage", 10) as writer:
        assert [writer.evaluated(step) for step in (3, 4, 5)] == [False, True, False]


class Full:
    """A file on a disk with little space."""

    def __init__(self, file, space):
        self.file, self.space, self.name = file, space, file.name

    def write(self, data):
        if not self.space:
            raise OSError(28, "No space left on device")
        taken, self.space = data[: self.space], max(0, self.space - len(data))
        return self.file.write(taken)

    def close(self):
        self.file.close()


def test_rows_that_a_full_disk_refused_are_written_once_there_is_space(tmp_path, capsys):
    with MetricWriter(tmp_path, "stage", 10) as writer:
        writer.write(1, {"loss": 1.0})
        writer._file = Full(writer._file, 30)  # half a line
        for step in (2, 3, 4):
            writer.write(step, {"loss": 1.0})
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
        assert capsys.readouterr().out.count("cannot write") == 1
        writer._file.space = 10_000
        writer.write(5, {"loss": 1.0})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path, 1, loss=3.0)
    write(tmp_path, 2, loss=2.0, accuracy=0.5)
    events = accumulator.EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 3.0), (2, 2.0)]
    assert [(e.step, e.value) for e in events.Scalars("accuracy")] == [(2, 0.5)]


def test_without_tensorboard_nothing_is_missing_but_its_files(tmp_path, monkeypatch):
    loaded = {name for name in sys.modules if name.startswith("tensorboard.")}
    for name in ("tensorboard", *loaded):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    write(tmp_path, 1, loss=3.0)
    assert [row["loss"] for row in rows(tmp_path / "metrics.jsonl")] == [3.0]
    assert not (tmp_path / "tb").exists()


def test_lines_are_few_and_begin_with_the_stage(tmp_path, capsys, monkeypatch):
    now = use_clock(monkeypatch, 100.0)
    with MetricWriter(tmp_path, "stage", 10) as writer:
        for step in range(1, 11):
            now[0] += 3
            writer.write(step, {"loss": 1.0}, loud=step == 2)
    said = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == [f"stage: step {step}/10" for step in (1, 2, 5, 9, 10)]


def test_a_terminal_shows_a_bar_and_keeps_what_is_said(tmp_path):
    script = """
import sys
from pathlib import Path
from vadapter.train.metric_writer import MetricWriter
with MetricWriter(Path(sys.argv[1]), "stage", 2) as writer:
    writer.write(1, {"loss": 0.5})
    writer.say("look [abc1] at [/b].png")
"""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=follower, stderr=subprocess.PIPE
    )
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    os.close(follower)
    shown = os.read(leader, 100_000).decode()
    os.close(leader)
    assert "stage: look [abc1] at [/b].png" in shown
    assert "1/2" in shown


def test_json_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]
