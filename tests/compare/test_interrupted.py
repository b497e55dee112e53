"""A comparison that is killed or stopped anywhere ends in the same numbers; two hosts train one.

Real processes of `python -m vadapter compare`.
"""

import csv
import json
import random
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support import runs
from support.comparisons import ARMS, RATES, write_comparison
from support.hosts import Job

from vadapter.errors import PREEMPTED

TIMED = ("seconds", "seconds_with_stage_1")  # columns of compare.csv that no two runs share
SEEDS = 2


def command(world: Path, workdir: Path) -> tuple[str, ...]:
    recipe = world / "compare.py"
    return (*runs.VADAPTER, "compare", f"--config={recipe}", f"--seeds={SEEDS}",
            f"--workdir={workdir}")  # fmt: skip


def to_end(world: Path, workdir: Path, **options: Any) -> subprocess.CompletedProcess:
    with runs.launch(command(world, workdir), **options) as process:
        out, _ = process.communicate(timeout=900)
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def points(folder: Path) -> list[dict[str, str]]:
    with (folder / "compare.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMED} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = runs.prepare(tmp_path_factory.mktemp("interrupted"))
    write_comparison(folder)
    return folder


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """A comparison that nothing stopped; it is moved away, as digests of recipes have the path."""
    done = to_end(world, world / "compare")
    assert done.returncode == 0, done.stdout
    return Path(shutil.move(world / "compare", world / "whole"))


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_comparison_killed_at_random_times_ends_in_the_same_numbers(world, whole, seed):
    rng, workdir, killed = random.Random(seed), world / "compare", 0
    shutil.rmtree(workdir, ignore_errors=True)
    for _ in range(8):
        with runs.launch(command(world, workdir)) as process:
            try:
                process.communicate(timeout=rng.uniform(8, 20))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        killed += 1
    last = to_end(world, workdir)
    assert last.returncode == 0, last.stdout
    assert killed >= 2
    assert points(workdir) == points(whole)
    assert record(workdir) == record(whole)


@pytest.mark.slow
def test_ctrl_c_saves_the_state_and_the_same_command_continues(world, whole):
    workdir, codes = world / "compare", []
    shutil.rmtree(workdir, ignore_errors=True)
    for point in ("INT:mlp:step:1", "INT:vadapter:step:3", "TERM:perceiver:finish", ""):
        done = to_end(world, workdir, fault=point)
        codes.append(done.returncode)
        assert "Traceback" not in done.stdout
        if point:
            assert "run the same command again to resume" in done.stdout.splitlines()[-1]
            unfinished = to_end_reading(workdir)
            assert unfinished.returncode == 78
            assert "is not finished" in unfinished.stdout
    assert codes == [PREEMPTED, PREEMPTED, PREEMPTED, 0]
    assert points(workdir) == points(whole)


def to_end_reading(workdir: Path) -> subprocess.CompletedProcess:
    words = (*runs.VADAPTER, "compare", str(workdir))
    return subprocess.run(
        words, env=runs.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_the_rate_is_chosen_among_complete_runs_and_stage_1_is_trained_once_per_seed(whole):
    for arm in ARMS:
        losses = {
            lr: json.loads((whole / arm / f"lr-{lr}-seed-0" / arm / "done.json").read_text())
            for lr in RATES
        }
        losses = {lr: done["scores"]["held/loss"] for lr, done in losses.items()}
        made = record(whole)["arms"][arm]
        assert made["lr"] == min(losses, key=lambda lr: losses[lr])
        assert {float(lr): loss for lr, loss in made["grid"].items()} == losses
    logs = [
        (whole / "vadapter" / f"lr-{lr}-seed-0" / "decoder" / "metrics.jsonl").read_text()
        for lr in RATES
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_two_hosts_train_a_comparison_together(world, tmp_path):
    workdir = tmp_path / "compare"
    recipe = f"--config={world / 'compare.py'}:mlp,vadapter"
    words = (*runs.VADAPTER, "compare", recipe, "--seeds=2", f"--workdir={workdir}",
             "--config.lr=0.01", "--baseline=mlp")  # fmt: skip
    job = Job(tmp_path / "job", world / "compare.py")
    assert job.start(command=words).wait() == [0, 0], job.logs()
    numbers = [re.findall(r"^\[(\d)/4\]", job.log(host), re.MULTILINE) for host in (0, 1)]
    assert numbers == [["1", "2", "3", "4"], []]  # the first host alone reports
    assert {(row["arm"], row["seed"]) for row in points(workdir)} == {
        (arm, seed) for arm in ("mlp", "vadapter") for seed in "01"
    }
    assert record(workdir)["finished"]
    again = Job(tmp_path / "again", world / "compare.py")
    assert again.start(command=words).wait() == [0, 0], again.logs()
    assert again.log(0).count("already finished") == 4
