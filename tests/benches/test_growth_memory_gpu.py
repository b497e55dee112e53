"""The benchmarks of growth and memory report what they measure; jobs for a GPU share their time."""

import json
import subprocess

import jax
import pytest
from support.patches import use_clock

from benches import gpu, gpu_photos, growth, memory
from benches.peer.case import Case
from vadapter.config import load, override
from vadapter.recipe.schema import Recipe, read

WORK = [1.0, 2.0, 4.0, 8.0, 16.0]


def test_times_on_a_line_do_not_deviate_wherever_it_begins():
    for start, slope in ((0.0, 3.0), (5.0, 0.5)):
        times = [start + slope * work for work in WORK]
        assert growth.deviations(WORK, times) == pytest.approx([0] * len(WORK), abs=1e-9)


def test_times_that_grow_with_the_square_deviate_most_at_the_end():
    off = growth.deviations(WORK, [work**2 for work in WORK])
    assert max(off) == off[-1] > 0.15


@pytest.mark.parametrize("size", growth.SIZES)
def test_a_size_of_the_growth_benchmark_increases_the_work(size, monkeypatch):
    least, keys = growth.SIZES[size]

    def flops(value):
        overrides = [*growth.COMMON, *(key.format(value, value - 2) for key in keys)]
        return sum(growth.flops.formula(growth.CASE.open(overrides)).values())

    assert flops(16 * least) > 1.2 * flops(least)


def test_a_row_of_memory_compares_both_numbers_with_what_is_measured(monkeypatch, capsys):
    row = {"measured": 200, "compiled": 190, "planned": 210, "arguments": 100, "temporaries": 90}

    def run(args, **kwargs):
        assert args[1:] == ["-m", "benches.memory", "nano-lm", "--here"]
        return subprocess.CompletedProcess(args, 0, json.dumps(row) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    memory.main(["nano-lm"])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:3] == ["nano-lm", "200", "B"]
    assert line.split()[-2:] == ["-5.0%", "+5.0%"]


def test_the_memory_of_a_process_grows_by_what_it_holds():
    before = memory.resident()
    held = bytearray(b"x" * 50_000_000)
    assert memory.resident() - before >= 0.9 * len(held)
    memory.forget_peak()
    del held
    assert memory.resident("VmHWM") > before


@pytest.mark.parametrize("sizes", [gpu.FULL, gpu.TINY], ids=["full", "tiny"])
def test_the_recipe_and_stage_of_every_job_exist(sizes):
    for arguments in sizes.jobs().values():
        assert arguments[:1] == ["-m"]
        values = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
        config = load(values["config"])
        override(config, [f"{k[7:]}={v}" for k, v in values.items() if k[:7] == "config."], Recipe)
        assert values["stage"] in read(config).stages


def test_jobs_share_the_time_and_one_that_fails_does_not_stop_the_others(monkeypatch):
    now, left = use_clock(monkeypatch), []

    def run(args, timeout, **kwargs):
        left.append(timeout)
        now[0] += 40
        if "late" in args:
            raise subprocess.TimeoutExpired(args, timeout, output=b'{"ms": 1}\n')
        failed = "bad" in args
        return subprocess.CompletedProcess(args, failed, '{"ms": 2}\nnoise\n', "a\nb\n")

    monkeypatch.setattr(subprocess, "run", run)
    jobs = {name: [name] for name in ("good", "bad", "late", "never")}
    results = list(gpu.run(jobs, 100))
    assert left == [100, 60, 20]
    assert results == [
        {"job": "good", "ms": 2}, {"job": "bad", "ms": 2}, {"job": "bad", "error": "b"},
        {"job": "late", "ms": 1}, {"job": "late", "error": "stopped after 20 s: no time was left"},
        {"job": "never", "error": "not begun: no time was left"},
    ]  # fmt: skip


def test_drawn_int8_kernels_are_not_all_zero():
    pytest.importorskip("qwix")
    case = Case("configs/quickstart.py:weights=", "vadapter")
    stage = case.open(["components.llm.int8=true", "chain=vadapter"])
    kernels = jax.tree.leaves(case.decoding_parameters(stage, {"llm": stage.abstract["llm"]}))
    int8 = [x for x in kernels if x.dtype == "int8"]
    assert int8
    assert all(int(abs(x).max()) == 127 for x in int8)


def test_the_photos_of_the_gpu_benchmark_are_compared_and_timed_for_every_arm(tmp_path):
    jobs = gpu_photos.jobs("LM", tmp_path, 256, 300)
    (compare,) = (a for a in jobs.pop("comparison") if a.startswith("--config=configs/compare.py"))
    arms = load(compare.removeprefix("--config=")).arms
    assert set(jobs) == {*arms, "stage 1"} == {*gpu_photos.ARMS, "stage 1"}
    for arguments in jobs.values():
        values = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        recipe = load(values["config"])
        stage = recipe.stages[values["stage"]]
        assert (stage.batch, stage.steps) == (256, 300)
        assert recipe.components.llm.weights == "LM"
        for name, trained in arms[recipe.chain[-1]].stages.items():
            assert recipe.stages[name].data == trained.data
            assert recipe.stages[name].chain == trained.chain
