"""A run that is killed or stopped anywhere goes on with the same command and ends in the same bits.

Real processes of `python -m vadapter train` on one device. One run is stopped at every point of
`POINTS` in turn, each time by another signal, and compared with a run that nothing has stopped.
"""

import dataclasses
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import runs

from vadapter.checkpoints.manager import steps
from vadapter.distributed.preemption import signals
from vadapter.errors import PREEMPTED, ConfigError, Preempted
from vadapter.io.json_files import history, rows
from vadapter.recipe.schema import read
from vadapter.train.loop import train

KILLED = -signal.SIGKILL
# (signal and point, exit code, step that the next process goes on from; None: from the start)
POINTS = (
    ("KILL:llm:step:5", KILLED, (2, 4)),  # the save of step 4 may be in flight still
    ("TERM:llm:step:5", PREEMPTED, 5),
    ("KILL:llm:stored", KILLED, 6),  # trained, but nobody was told
    ("TERM:decoder:features:0", PREEMPTED, None),
    ("KILL:decoder:features:0", KILLED, None),
    ("TERM:decoder:saving:2", PREEMPTED, 2),
    ("KILL:decoder:saving:4", KILLED, (2, 4)),
    ("INT:vadapter:step:1", PREEMPTED, 1),
    ("TERM:vadapter:evaluate:0", PREEMPTED, 3),
    ("KILL:vadapter:finish", KILLED, 6),
)


@dataclasses.dataclass
class Runs:
    """A run that nothing stopped, one that was stopped at every point, and its processes."""

    whole: Path
    stopped: Path
    recipe: Path
    outputs: list[Any]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Runs:
    folder = runs.prepare(tmp_path_factory.mktemp("resume"))
    recipe = runs.write_recipe(folder)
    whole = runs.run(recipe, folder / "whole")
    assert whole.returncode == 0, whole.stdout
    outputs = [runs.run(recipe, folder / "stopped", fault=point) for point, *_ in POINTS]
    outputs.append(runs.run(recipe, folder / "stopped"))
    return Runs(folder / "whole", folder / "stopped", recipe, outputs)


@pytest.mark.slow
def test_a_run_stopped_anywhere_ends_in_the_same_bits(done):
    codes = [output.returncode for output in done.outputs]
    assert codes == [*(code for _, code, _ in POINTS), 0], done.outputs[-1].stdout
    assert runs.trained_digests(done.stopped) == runs.trained_digests(done.whole)


@pytest.mark.slow
def test_each_process_resumes_from_the_last_saved_step(done):
    for (point, _, at), after in zip(POINTS, done.outputs[1:], strict=True):
        stage = point.split(":")[1]
        resumed = [line for line in after.stdout.splitlines() if line.startswith(f"{stage}: res")]
        steps = at if isinstance(at, tuple) else (at,)
        wanted = [f"{stage}: resumed at step {step}" for step in steps]
        assert (resumed and resumed[0] in wanted) or (not resumed and at is None), point


@pytest.mark.slow
def test_a_signal_is_reported_in_one_line_without_a_traceback(done):
    for (point, code, _), output in zip(POINTS, done.outputs, strict=False):
        assert "Traceback" not in output.stdout, output.stdout
        if code == PREEMPTED:
            kind, stage, *_ = point.split(":")
            last = output.stdout.splitlines()[-1]
            assert last.startswith(f"vadapter: {stage}, ")
            assert last.endswith(f"stopped by SIG{kind}; run the same command again to resume")


@pytest.mark.slow
def test_the_stopped_run_has_the_metrics_of_the_whole_one(done):
    for stage in runs.CHAIN:
        whole, stopped = (
            [{k: v for k, v in row.items() if k not in ("time", "attempt", "step_ms", "compile_s")}
             for row in history(run / stage / "metrics.jsonl")]
            for run in (done.whole, done.stopped)
        )  # fmt: skip
        assert stopped == whole
        assert len(whole) >= runs.STEPS
    looks = [r["step"] for r in rows(done.stopped / "vadapter/metrics.jsonl") if "captions/n" in r]
    assert looks == [3, 6]  # the one that a signal cut short was made up for, once


@pytest.mark.slow
def test_an_incomplete_cache_is_computed_again_and_a_complete_one_is_not(done):
    cut, killed, after, *later = (output.stdout for output in done.outputs[3:])
    assert "features: 24/24" not in cut + killed
    assert "features: 24/24" in after
    assert "features: 24/24" not in later[0]
    whole, stopped = (
        {p.relative_to(run): p.read_bytes() for p in (run / "features").rglob("*") if p.is_file()}
        for run in (done.whole, done.stopped)
    )
    assert whole.keys() == stopped.keys()  # nothing half-written stays
    assert len(whole) > 1
    assert whole == stopped


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(done):
    before = {
        p: p.stat().st_mtime_ns for name in runs.CHAIN for p in (done.whole / name).rglob("*")
    }
    again = runs.run(done.recipe, done.whole)
    assert again.returncode == 0
    assert again.stdout.splitlines()[:3] == [f"{name}: already finished" for name in runs.CHAIN]
    assert before == {path: path.stat().st_mtime_ns for path in before}


WAIT = """
import time
from vadapter.distributed.preemption import signals
with signals() as stop:
    print("ready", flush=True)
    while not stop.signal:
        time.sleep(0.01)
    print("asked", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_the_second_ctrl_c_ends_immediately(first):
    command = [sys.executable, "-c", WAIT]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=runs.TESTS.parent, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(first)
        assert process.stdout.readline() == "asked\n"
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
        error = process.stderr.read()
        assert "stopping after this step and saving a checkpoint" in error
        assert ("press Ctrl-C again" in error) == (first == signal.SIGINT)


def test_a_second_sigterm_changes_nothing():
    with signals() as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Preempted, match=r"^here: stopped by SIGTERM; run the same command"):
            stop.check("here")


def test_a_run_whose_signals_go_elsewhere_is_refused():
    with signals() as stop:
        stop.require_handlers()
        signal.signal(signal.SIGTERM, lambda *_: None)  # as a library may do
        with pytest.raises(
            ConfigError, match=r"SIGTERM is handled by <function .*would not be saved"
        ):
            stop.require_handlers()


def test_training_asks_where_signals_go_before_it_compiles(tmp_path):
    def take(stage):
        signal.signal(signal.SIGTERM, lambda *_: None)

    recipe = read(runs.text_only(runs.prepare(tmp_path)))
    with pytest.raises(ConfigError, match="SIGTERM is handled by"):
        train(recipe, tmp_path / "run", before=take)
    assert not (tmp_path / "run/llm/checkpoints").exists()


def test_a_signal_during_compilation_takes_effect_after_the_first_step(tmp_path):
    recipe = runs.write_recipe(runs.prepare(tmp_path), "text_only")
    recipe.write_text(runs.COMPILING + recipe.read_text())
    fresh = {"VADAPTER_COMPILE_CACHE": str(tmp_path / "programs"), "INTERRUPTED": "yes"}
    output = runs.run(recipe, tmp_path / "run", more=fresh)
    assert output.returncode == PREEMPTED, output.stdout
    said = [line.split()[0] for line in output.stdout.splitlines() if line]
    assert said.index("compiling") < said.index("asked") < said.index("compiled")
    assert "vadapter: llm, step 1, saved: stopped by SIGTERM" in output.stdout
    assert steps(tmp_path / "run/llm/checkpoints") == [1]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_times_change_nothing(done, tmp_path, seed):
    rng, killed = random.Random(seed), 0
    began = time.monotonic()
    assert runs.run(done.recipe, tmp_path / "uninterrupted").returncode == 0
    length = time.monotonic() - began  # with the programs compiled before
    for _ in range(12):
        with runs.start(done.recipe, tmp_path / "run") as process:
            try:
                process.communicate(timeout=rng.uniform(0.2, 0.6) * length)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        killed += process.returncode == KILLED
        if process.returncode == 0:
            break
        assert process.returncode == KILLED
    last = runs.run(done.recipe, tmp_path / "run")
    assert last.returncode == 0, last.stdout
    assert killed
    assert runs.trained_digests(tmp_path / "run") == runs.trained_digests(done.whole)


@pytest.mark.slow
def test_signals_at_random_times_lose_no_step(done, tmp_path):
    rng, code = random.Random(9), None
    for _ in range(12):
        with runs.start(done.recipe, tmp_path / "run") as process:
            time.sleep(rng.uniform(4, 10))
            process.send_signal(rng.choice([signal.SIGTERM, signal.SIGINT]))
            out, _ = process.communicate(timeout=300)
        code = process.returncode
        # Before and after the run itself a signal simply ends the process.
        assert code in (0, PREEMPTED, -signal.SIGTERM, -signal.SIGINT, 1), out
        if code == 0:
            break
    assert code == 0 or runs.run(done.recipe, tmp_path / "run").returncode == 0
    assert runs.trained_digests(tmp_path / "run") == runs.trained_digests(done.whole)
