"""Memory that a run needs and a device has not: told before compiling, or by what ran out of it."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from support import faults, runs
from support import hosts as drive
from support.patches import use_devices, use_fake_step

from vadapter.checkpoints.manager import steps
from vadapter.cli import main
from vadapter.console import size
from vadapter.distributed import memory, topology
from vadapter.distributed.mesh import MeshConfig, make_mesh, to_mesh
from vadapter.errors import USER_ERROR, ConfigError, Problems
from vadapter.inspect.check import check
from vadapter.recipe.schema import read
from vadapter.stages.run import Run
from vadapter.stages.steps import init_state
from vadapter.train import loop
from vadapter.train.loop import train

PLAN = "`vadapter plan --config=… --topology="


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("memory"))


@pytest.fixture
def mesh(monkeypatch):
    """Two devices, which split the weights."""
    use_devices(monkeypatch, 2)


def halves(config):
    """The recipe with its weights over two devices."""
    with config.unlocked():
        config.mesh.fsdp = 2
        config.dtype = "bfloat16"
    return read(config)


def use_all(*_):
    """What a CPU really says when there is no memory: nothing is faked."""
    return jnp.zeros((1 << 50,), jnp.uint8)


# -- before -----------------------------------------------------------------------------------


def test_allocated_memory_is_that_of_a_stage_before_its_first_step(folder, tmp_path, mesh):
    ready = Run(halves(runs.blind(folder)), tmp_path).stage("decoder")
    stays = ready.check({}, problems := Problems()).memory
    problems.settle()

    trainable, frozen = ready.load_params()
    opt = init_state(trainable, ready.tx).opt_state
    batch = to_mesh(next(loop._loader(ready, frozen, 0)), ready.mesh)
    device = ready.mesh.devices.flat[0]
    on_it = lambda tree: sum(  # noqa: E731
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == device
    )
    held = {**trainable, **frozen, "optimizer": opt, "batch": batch}
    assert stays.keys() == held.keys()
    for what in held:  # moments of what is split may lie as the compiler likes, until they are put
        assert stays[what] == pytest.approx(on_it(held[what]), rel=0.02), what


@pytest.mark.parametrize("spare", [0, -1])
def test_more_than_a_device_has_is_refused_before_anything_is_compiled(
    folder, tmp_path, mesh, monkeypatch, spare
):
    recipe = halves(runs.blind(folder))
    begun = []
    monkeypatch.setattr(loop, "train_stage", begun.append)
    stays = Run(recipe, tmp_path).stage("decoder").check({}, Problems()).memory
    limits = [sum(stays.values()) + spare]
    monkeypatch.setattr(memory, "limit", lambda mesh: limits[0])
    if spare == 0:
        train(recipe, tmp_path)
        assert len(begun) == 1
        return
    with pytest.raises(ConfigError) as met:
        train(recipe, tmp_path)
    assert not begun
    total = size(sum(stays.values()))
    for part in (f"stages.decoder: {total} are needed on each device", *stays, PLAN):
        assert part in str(met.value)
    limits[0] = 1
    _, problems = check(lambda: recipe, tmp_path)
    assert ["B are needed on each device" in line for line in problems.lines()] == [True]


def test_the_limit_is_that_of_the_device_with_least_and_of_a_cpu_there_is_none():
    assert memory.limit(make_mesh(MeshConfig())) is None
    device = lambda **stats: SimpleNamespace(memory_stats=lambda: stats)  # noqa: E731
    devices = [device(bytes_limit=9), device(bytes_limit=7), device(peak_bytes_in_use=1)]
    assert memory.limit(SimpleNamespace(local_devices=devices)) == 7  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "slices", "n", "name"), [
    ("TPU v5 lite", 1, 16, "v5e:4x4"), ("TPU v5 lite", 2, 32, "2*v5e:4x4"),
    ("TPU v5", 1, 4, "v5p:2x2x1"), ("TPU v4", 1, 4, "v4:2x2x1"), ("TPU v6 lite", 1, 3, "v6e"),
    ("NVIDIA H100 80GB HBM3", 1, 8, "h100:8"), ("NVIDIA A100-SXM4-40GB", 1, 1, ""),
    ("NVIDIA H200", 1, 9, "h200"), ("TPU v3", 1, 8, ""), ("cpu", 1, 2, "cpu:2"),
])  # fmt: skip
def test_the_devices_of_this_machine_have_the_name_that_plan_uses(
    monkeypatch, kind, slices, n, name
):
    made = [SimpleNamespace(device_kind=kind, slice_index=i % slices) for i in range(n)]
    monkeypatch.setattr(jax, "devices", lambda: made)
    assert topology.present() == name
    if name:
        assert topology.smallest(name) or topology.parse(name).chips == n


# -- once it is used up -------------------------------------------------------------------------
# Real errors of XLA:CPU, of an array alone: of a whole program it may say nothing, and who waits
# for the result waits forever.


def test_a_step_that_runs_out_of_memory_is_named_and_checkpoints_stay_intact(
    folder, tmp_path, mesh, monkeypatch, capsys
):
    use_fake_step(monkeypatch)
    faults.at("decoder:step:3", use_all, monkeypatch.setattr)
    config = f"--config={runs.write_recipe(folder, 'blind')}"
    assert main.main(["train", config, f"--workdir={tmp_path}"]) == USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("vadapter: decoder, step 3: cpu is out of memory (RESOURCE_EXHAUSTED: ")
    assert f"{PLAN}cpu:8` finds a setting that fits: a smaller batch" in said
    assert steps(tmp_path / "decoder/checkpoints") == [2]
    faults.at("decoder:finish", use_all, monkeypatch.setattr)
    with pytest.raises(ConfigError, match=r"^decoder, evaluation at the end: cpu is out of memory"):
        train(read(runs.blind(folder)), tmp_path)


def test_other_runtime_errors_are_raised_unchanged(monkeypatch):
    other = pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL")
    with other, memory.memory_errors(lambda: "here"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")
    assert not memory.exhausted(MemoryError("RESOURCE_EXHAUSTED"))


def test_every_verb_that_computes_is_marked(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("vadapter.hub.load.open_either", use_all)
    assert main.main(["caption", str(tmp_path), "photo.jpg"]) == USER_ERROR
    said = capsys.readouterr().err
    assert said.startswith("vadapter: cpu is out of memory (RESOURCE_EXHAUSTED: ")
    assert PLAN in said


ONE = """
import argparse, sys, time
import jax.numpy as jnp
from vadapter.cli import common, main
from vadapter.distributed import hosts, shutdown
def run(args):
    if hosts.index() == 1:
        jnp.zeros((1 << 50,), jnp.uint8)
    hosts.exchange("", "a step")
code, reason = main._attempt(argparse.Namespace(row=common.verb(example="")(run)))
sys.exit(shutdown.end_job(code, reason))
"""


def test_too_little_memory_on_one_host_ends_all_with_what_to_change(tmp_path):
    job = drive.Job(tmp_path, tmp_path).start(command=(sys.executable, "-c", ONE))
    assert job.wait() == [USER_ERROR] * 2, job.logs()
    told = "cpu is out of memory (RESOURCE_EXHAUSTED: "
    assert job.log(0).startswith(f"vadapter: host 1 of 2 stopped: {told}")
    assert job.log(1).startswith(f"vadapter: {told}")
    assert "Traceback" not in job.logs()
