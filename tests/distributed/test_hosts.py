"""Several hosts train as one, stop as one, and end as one, whatever happens to one of them.

Real processes on this machine, each with two devices. One run is left alone; another has its
second host killed, hung, stopped and so on, one after the other, and goes on each time.
"""

import dataclasses
import itertools
import json
import re
import shutil
import signal
import sys
import threading
import tomllib
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from jax._src.clusters import ClusterEnv
from support import hosts as drive
from support import paths, runs
from support.patches import use_batches, use_devices, use_host_count
from support.small_benchmarks import write_benchmarks

from vadapter.checkpoints.manager import steps
from vadapter.data.pipeline import make_loader
from vadapter.distributed import hosts
from vadapter.distributed.mesh import MeshConfig
from vadapter.distributed.startup import check_in, gather
from vadapter.errors import LOST, NON_FINITE, PREEMPTED, USER_ERROR, ConfigError, HostError
from vadapter.io.json_files import history, rows
from vadapter.recipe.schema import read
from vadapter.stages import run
from vadapter.train.host_agreement import require_own_rows
from vadapter.train.loop import train

STEPS = 10
MESH = {"data": 2, "fsdp": 2}
OVERRIDES = tuple(f"mesh.{axis}={size}" for axis, size in MESH.items())
KILLED, ABORTED = -signal.SIGKILL, -signal.SIGABRT
HEARTBEAT = 10  # seconds, where the deadline is 30
STACK = "(most recent call first)"  # above the stack of a thread


@dataclasses.dataclass
class Runs:
    """A job that nothing stopped, and one whose attempts left these exit codes and logs."""

    folder: Path
    whole: drive.Job
    stopped: drive.Job
    killed: tuple[list[int], list[str]]
    asked: tuple[list[int], list[str]]
    last: tuple[list[int], list[str]]


def recipe_of(folder, **stage):
    config = runs.text_only(folder, steps=STEPS, **stage)
    with config.unlocked():
        config.mesh.update(MESH)
    return read(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.prepare(tmp_path_factory.mktemp("hosts"))


@pytest.fixture(scope="module")
def recipe(folder):
    return runs.write_recipe(folder, "text_only")


def said(log):
    """Lines of a log without those of Gloo, which speaks of ranks."""
    return [line for line in log.splitlines() if line and "ank" not in line]


def attempt(job, fault="", **options):
    codes = job.start(faults={1: fault}, **options).wait()
    return codes, [job.log(host) for host in (0, 1)]


@pytest.fixture(scope="module")
def done(folder, recipe):
    overrides = (*OVERRIDES, f"stages.llm.steps={STEPS}")
    whole = drive.Job(folder / "whole", recipe, *overrides).start()  # beside the other one
    stopped = drive.Job(folder / "stopped", recipe, *overrides)
    killed = attempt(stopped, "KILL:llm:step:5", deadline=30)  # the save of 4 may be in flight
    assert whole.wait() == [0, 0], whole.logs()
    asked = attempt(stopped, "TERM:llm:step:5")
    shutil.copytree(stopped.workdir, folder / "cut")
    return Runs(folder, whole, stopped, killed, asked, attempt(stopped))


# --- One run ---------------------------------------------------------------------------------


def test_when_one_host_is_killed_the_other_ends_too_and_both_resume_from_a_common_step(done):
    (first, second), (log, _) = done.killed
    assert second == KILLED
    assert first in (LOST, ABORTED), log
    resumed = [line for line in done.asked[1][0].splitlines() if "resumed" in line]
    assert resumed in (["llm: resumed at step 2"], ["llm: resumed at step 4"])


def test_a_signal_to_one_host_stops_all_at_one_step_and_each_reports_it(done):
    codes, logs = done.asked
    assert codes == [PREEMPTED, PREEMPTED], logs
    for log in logs:
        assert "vadapter: llm, step 7, saved: stopped by SIGTERM" in log.splitlines()[-1]
        assert "Traceback" not in log
    assert steps(done.folder / "cut/llm/checkpoints")[-1] == 7
    assert "llm: resumed at step 7\n" in done.last[1][0]


def test_the_job_that_was_killed_and_stopped_ends_in_the_same_bits(done):
    assert done.last[0] == [0, 0], done.last[1]
    stopped, whole = (
        runs.trained_digests(job.workdir, ("llm",)) for job in (done.stopped, done.whole)
    )
    assert stopped == whole


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
@pytest.mark.parametrize(
    "fault", ["RAISE:llm:step:9", "HANG:llm:step:9", "KILL:llm:begin", "KILL:llm:saving:8"]
)
def test_after_any_fault_of_a_host_all_end_and_no_saved_step_is_lost(done, tmp_path, fault, host):
    job = drive.Job(tmp_path, done.stopped.recipe, *done.stopped.overrides)
    shutil.copytree(done.folder / "cut", job.workdir)
    codes = job.start(faults={host: fault}, deadline=30, VADAPTER_WATCHDOG="6").wait()
    may = {KILLED, LOST, ABORTED} if fault.startswith("KILL") else {LOST}
    assert may.issuperset(codes), job.logs()
    limit = {"RAISE": 0, "HANG": 6, "KILL": HEARTBEAT}[fault.partition(":")[0]] + drive.MARGIN
    if not fault.endswith("begin"):  # else the last row of metrics was written a moment before it
        assert 0 < job.took(job.workdir / "llm/metrics.jsonl") < limit
    assert STACK in job.log(1 - host)
    visible = steps(job.workdir / "llm/checkpoints")[-1]
    assert visible == 7 or not list(job.workdir.rglob("8.orbax-checkpoint-tmp*"))
    codes, (log, _) = attempt(job)
    assert codes == [0, 0]
    assert f"llm: resumed at step {visible}\n" in log
    stopped, whole = (runs.trained_digests(at.workdir, ("llm",)) for at in (job, done.whole))
    assert stopped == whole
    assert not list(job.workdir.rglob("*orbax-checkpoint-tmp*"))


def test_only_the_first_host_writes_and_prints(done):
    path = done.whole.workdir / "llm"
    assert [row["step"] for row in rows(path / "metrics.jsonl")] == [*range(1, STEPS + 1)]
    assert len(list((path / "tb").iterdir())) == 1
    assert not said(done.whole.log(1))
    leftovers = {p.name for p in done.whole.workdir.iterdir() if p.name.startswith(".")}
    assert leftovers == {".lock"}


@pytest.fixture
def seen(monkeypatch):
    """The rows of every batch that training in this process, on four devices, sees."""
    batches = []

    def record(batch):
        batches.append(batch["id"].tolist())
        return batch

    use_batches(monkeypatch, record)
    use_devices(monkeypatch, 4)
    return batches


def rows_after(step, recipe, workdir):
    """The rows of the steps after `step`, of a loader for one process."""
    stage = run.Run(recipe, workdir).stage("llm")
    loader = make_loader(
        {"documents": (*stage.stream("documents", {}), 1.0)},
        global_batch=stage.config.batch, seed=recipe.seed, start_step=step, num_steps=STEPS,
    )  # fmt: skip
    return [batch["id"].tolist() for batch in loader]


def test_two_hosts_train_what_one_process_does(done, tmp_path, seen):
    train(recipe_of(done.folder), tmp_path)
    one, two = (history(at / "llm/metrics.jsonl") for at in (tmp_path, done.whole.workdir))
    assert len(one) == len(two) == len(seen) == STEPS
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["targets"]) == (b["step"], b["targets"])
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
        np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("devices", [4, 1])
def test_one_process_resumes_what_two_hosts_saved(
    done, tmp_path, monkeypatch, capsys, seen, devices
):
    if devices == 1:
        use_devices(monkeypatch, 1, MeshConfig())
    shutil.copytree(done.folder / "cut", tmp_path / "run")
    recipe = recipe_of(done.folder)
    train(recipe, tmp_path / "run")
    assert seen == rows_after(7, recipe, tmp_path / "run")
    axes = "".join(f", mesh.{axis} {size} (now 1)" for axis, size in MESH.items())
    changed = "hosts 2 (now 1)" + (axes if devices == 1 else "")
    assert (
        f"llm: saved with {changed}: resuming with the same state, data and order"
        in capsys.readouterr().out
    )
    went_on = [row for row in history(tmp_path / "run/llm/metrics.jsonl") if row["step"] > 7]
    whole = [row for row in history(done.whole.workdir / "llm/metrics.jsonl") if row["step"] > 7]
    assert len(went_on) == len(seen) == STEPS - 7
    for a, b in zip(went_on, whole, strict=True):
        assert a["targets"] == b["targets"]
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_signal_while_one_host_compiles_stops_all_at_one_step(done, tmp_path, host):
    recipe = tmp_path / "compiling.py"
    recipe.write_text(runs.COMPILING + done.stopped.recipe.read_text())
    job = drive.Job(tmp_path, recipe, *done.stopped.overrides)
    fresh = str(tmp_path / "programs")
    job.start(variables={host: {"INTERRUPTED": "yes"}}, VADAPTER_COMPILE_CACHE=fresh)
    assert job.wait() == [PREEMPTED, PREEMPTED], job.logs()
    said = [line.split()[0] for line in job.log(host).splitlines() if line]
    assert said.index("compiling") < said.index("asked") < said.index("compiled")
    step = steps(job.workdir / "llm/checkpoints")[-1]
    assert step <= 3  # what the first step was made from was signed before it came
    for log in map(job.log, job.hosts):
        assert f"vadapter: llm, step {step}, saved: stopped by SIGTERM" in log


# What a recipe begins with whose processes note the images that each of them opens, and the rows
# of each batch that it trains on.
WATCHED = """
import json, os, sys
from vadapter.train import loop

notes, to_mesh = open(os.environ["NOTES"], "w", buffering=1), loop.to_mesh

def opened(event, arguments):
    if event == "open" and str(arguments[0]).endswith(".png"):
        print(json.dumps(os.path.basename(arguments[0])), file=notes)

def placed(batch, mesh):
    print(json.dumps(batch["id"].tolist()), file=notes)
    return to_mesh(batch, mesh)

sys.addaudithook(opened)
loop.to_mesh = placed
"""


def noted(path):
    """The images that a process opened, and the rows of its batches."""
    notes = [json.loads(line) for line in path.read_text().splitlines()]
    return {n for n in notes if isinstance(n, str)}, [n for n in notes if isinstance(n, list)]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_hosts_resume_where_one_process_stopped_and_each_reads_its_own_images(folder, tmp_path, n):
    recipe = runs.write_recipe(folder, "blind")
    watched = tmp_path / "watched.py"
    watched.write_text(WATCHED + recipe.read_text())
    notes = [tmp_path / f"notes-{name}" for name in ("whole", "begun", *range(n))]
    job = drive.Job(tmp_path / "several", watched, "mesh.fsdp=2", n=n)

    def alone(workdir, where, fault=""):
        more, devices = {"NOTES": str(where)}, n * drive.DEVICES
        return runs.run(watched, workdir, "mesh.fsdp=2", devices=devices, fault=fault, more=more)

    whole = alone(tmp_path / "whole", notes[0])
    assert whole.returncode == 0, whole.stdout
    begun = alone(job.workdir, notes[1], "TERM:decoder:step:3")  # an epoch
    assert begun.returncode == PREEMPTED, begun.stdout
    job.start(variables={i: {"NOTES": str(path)} for i, path in enumerate(notes[2:])})
    assert job.wait() == [0] * n, job.logs()
    assert "decoder: resumed at step 3\n" in job.log(0)

    (_, rows), (_, first), *parts = map(noted, notes)
    assert [len(batch) for batch in rows] == [8] * runs.STEPS
    assert first == rows[:3]
    steps_of_all = zip(*(own for _, own in parts), strict=True)
    assert [list(itertools.chain(*shares)) for shares in steps_of_all] == rows[3:]
    table = map(json.loads, (folder / "shapes/images.jsonl").read_text().splitlines())
    names = [row["image"] for row in table if row["split"] == "train"]
    for images, own in parts:
        assert images == {names[i] for batch in own for i in batch}
    assert sorted(itertools.chain(*(images for images, _ in parts))) == sorted(names)

    a, b = (history(at / "decoder/metrics.jsonl") for at in (tmp_path / "whole", job.workdir))
    losses = [[(row["step"], row["loss"]) for row in rows if "loss" in row] for rows in (a, b)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("whom", [(0,), (0, 1)])
def test_a_signal_to_the_first_host_or_to_all_is_saved_at_one_step(done, tmp_path, whom):
    job = drive.Job(tmp_path, done.stopped.recipe, *done.stopped.overrides)
    job.start(faults=dict.fromkeys(whom, "TERM:llm:step:5"))
    assert job.wait() == [PREEMPTED, PREEMPTED], job.logs()
    for host in (0, 1):
        assert "vadapter: llm, step 7, saved: stopped by SIGTERM" in job.log(host)
    assert steps(job.workdir / "llm/checkpoints")[-1] == 7


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_a_chain_with_cached_images_and_evaluations_is_that_of_one_process(folder, tmp_path, n):
    recipe, overrides = runs.write_recipe(folder), ("mesh.fsdp=2", "stages.llm.accumulate=1")
    one = runs.run(recipe, tmp_path / "one", *overrides, devices=n * drive.DEVICES)
    assert one.returncode == 0, one.stdout
    job = drive.Job(tmp_path / "several", recipe, *overrides, n=n)
    for point in ("decoder:features:0", "vadapter:evaluate:0"):
        assert job.start(faults={n - 1: f"TERM:{point}"}).wait() == [PREEMPTED] * n, job.logs()
        assert "Traceback" not in job.logs()
    assert job.start().wait() == [0] * n, job.logs()
    assert "vadapter: resumed at step 3\n" in job.log(0)
    for stage in runs.CHAIN:
        a, b = (history(at / stage / "metrics.jsonl") for at in (tmp_path / "one", job.workdir))
        assert [row["step"] for row in a] == [row["step"] for row in b]
        losses = [[row["loss"] for row in rows if "loss" in row] for rows in (a, b)]
        np.testing.assert_allclose(*losses, rtol=1e-5)

    where = Path("vadapter/eval/captions/predictions.jsonl")
    whole = (tmp_path / "one" / where).read_text()
    assert (job.workdir / where).read_text() == whole
    (job.workdir / where).unlink()
    evaluate = (*runs.VADAPTER, "eval", str(job.workdir), "--evals=captions")
    assert job.start(command=evaluate).wait() == [0] * n, job.logs()
    assert (job.workdir / where).read_text() == whole

    data = write_benchmarks(tmp_path / "official", folder / "shapes")
    where = Path("vadapter/eval/flickr8k")
    benchmark = ("--benchmarks=flickr8k", f"--data={data}", "--batch=8")
    alone = (*runs.VADAPTER, "eval", str(tmp_path / "one"), *benchmark)
    together = (*runs.VADAPTER, "eval", str(job.workdir), *benchmark)
    assert drive.Job(tmp_path / "alone", recipe, n=1).start(command=alone).wait() == [0]
    assert job.start(command=together).wait() == [0] * n, job.logs()
    assert not said(job.log(n - 1))
    for name in ("predictions.jsonl", "submission.json", "gallery.html"):
        assert (job.workdir / where / name).read_text() == (
            tmp_path / "one" / where / name
        ).read_text()


# --- Before anything is compiled ---------------------------------------------------------------


def test_hosts_with_different_recipes_are_refused_and_the_keys_are_named(folder, recipe, tmp_path):
    job = drive.Job(tmp_path, recipe, *OVERRIDES)
    job.start(own={1: ("seed=7", "stages.llm.optim.lr=0.5")})
    assert job.wait() == [USER_ERROR] * 2, job.logs()
    for host in (0, 1):
        assert "vadapter: the hosts differ in recipe or versions:" in job.log(host)
        assert "host 1: recipe.seed = 7, host 0: 0" in job.log(host)
        assert "host 1: recipe.stages.llm.optim.lr = 0.5, host 0: 0.01" in job.log(host)
    assert not (tmp_path / "run/llm").exists()


def test_hosts_with_different_run_directories_are_refused(folder, recipe, tmp_path):
    job = drive.Job(tmp_path, recipe, *OVERRIDES)
    job.start(workdirs={1: tmp_path / "elsewhere"}, deadline=10)
    assert job.wait() == [USER_ERROR] * 2, job.logs()
    assert "elsewhere is not the same directory on host 1 as on host 0" in job.log(1)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.slow
def test_hosts_with_different_data_under_the_same_name_are_refused(folder, tmp_path):
    for host in ("a", "b"):
        shutil.copytree(folder / "shapes", tmp_path / host)
    table = tmp_path / "b/images.jsonl"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))  # one is missing
    recipe = runs.write_recipe(folder, "text_only")
    job = drive.Job(
        tmp_path, recipe, *OVERRIDES, "data.documents.source.groups=('$HERE/images.jsonl',)"
    )
    job.start(variables={0: {"HERE": str(tmp_path / "a")}, 1: {"HERE": str(tmp_path / "b")}})
    assert job.wait() == [USER_ERROR] * 2, job.logs()
    for host in (0, 1):
        assert "the hosts differ in data or tokenizers" in job.log(host)
        assert "fingerprints.documents" in job.log(host)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"VADAPTER_COORDINATOR": "a:1"},
            "VADAPTER_COORDINATOR is set without VADAPTER_PROCESSES, VADAPTER_PROCESS$",
        ),
        ({"VADAPTER_DISTRIBUTED": "yes"}, "VADAPTER_DISTRIBUTED='yes': must be auto, or not set"),
        ({"VADAPTER_DISTRIBUTED": "auto"}, "JAX detects no cluster here"),
        (
            {"VADAPTER_COORDINATOR": "a", "VADAPTER_PROCESSES": "2", "VADAPTER_PROCESS": "2"},
            "must be host:port, a number of processes, and an index below it",
        ),
        ({"VADAPTER_DISTRIBUTED": "auto", "VADAPTER_DEADLINE": "soon"}, "must be seconds"),
    ],
)
def test_variables_that_make_no_sense_are_refused(monkeypatch, variables, message):
    monkeypatch.setattr(ClusterEnv, "_cluster_types", [])
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        hosts.start()


def test_a_jax_without_cluster_detection_initializes_by_itself(monkeypatch):
    asked = []
    monkeypatch.delattr(ClusterEnv, "auto_detect_unset_distributed_params")
    monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: asked.append(settings))
    monkeypatch.setenv("VADAPTER_DISTRIBUTED", "auto")
    hosts.start()
    assert "coordinator_address" not in asked[0]


def test_a_jax_without_its_private_store_is_refused_with_the_versions_that_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax._src.distributed", types.ModuleType("distributed"))
    with pytest.raises(ConfigError, match=r"has no key-value store .*pip install 'jax>=0\.10,<0\."):
        hosts._client()
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)  # by the program itself
    assert (hosts.index(), hosts.count()) == (0, 1)


def test_the_supported_versions_of_jax_are_those_of_the_package():
    requirements = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    assert hosts.SUPPORTED_JAX in requirements["dependencies"]
    bounds = hosts.SUPPORTED_JAX.removeprefix("jax")
    for extra in ("tpu", "cuda"):
        assert requirements["optional-dependencies"][extra][0].endswith(f"]{bounds}")


def test_only_one_module_uses_private_parts_of_jax_or_process_indices():
    for path in (paths.ROOT / "vadapter").rglob("*.py"):
        text = path.read_text()
        if path.name != "hosts.py":
            assert not re.search(r"jax\._src|multihost_utils|jax\.process_(index|count)", text), (
                path
            )
        assert not re.search(r"^(from|import) jax\._src", text, re.MULTILINE), path


def test_without_the_variables_nothing_is_started():
    hosts.start()
    assert not jax.distributed.is_initialized()
    assert (hosts.count(), hosts.index(), hosts.exchange({"a": 1}, "all")) == (1, 0, [{"a": 1}])


def register_hosts(n, others, limit=5.0, at="127.0.0.1"):
    """Process 0 of n, and others as (index, count); what each of them raised, by index.

    Args:
      at: where process 0 listens; "": everywhere.
    """
    port, raised = drive.free_port(), {}

    def attempt(i, fn, *arguments):
        try:
            fn(*arguments)
            raised[i] = None
        except (HostError, ConfigError) as error:
            raised[i] = error

    threads = [
        threading.Thread(target=attempt, args=(i, check_in, "127.0.0.1", port, told, i, limit))
        for i, told in others
    ]
    for thread in threads:
        thread.start()
    attempt(0, gather, at, port, n, limit)
    for thread in threads:
        thread.join()
    return raised


def test_all_hosts_are_called_and_the_absent_ones_named_to_all():
    assert register_hosts(4, [(3, 4), (1, 4), (2, 4)]) == dict.fromkeys(range(4))
    assert register_hosts(2, [(1, 2)], at="") == dict.fromkeys(range(2))
    missing = register_hosts(4, [(2, 4)], limit=0.5)
    assert {str(e) for e in missing.values()} == {"hosts 1, 3 of 4 did not come within 0.5 s"}


def test_hosts_started_with_different_counts_are_refused():
    other = register_hosts(3, [(1, 2)])
    assert {str(e) for e in other.values()} == {
        "host 1 was started with 2 processes, host 0 with 3"
    }
    assert isinstance(register_hosts(3, [(0, 3)])[0], ConfigError)
    with pytest.raises(
        HostError, match=r"host 0 of 2 did not come within 0\.3 s: nothing listens at 127"
    ):
        check_in("127.0.0.1", drive.free_port(), 2, 1, 0.3)


# --- How they end --------------------------------------------------------------------------------

WORK = """
import argparse, pathlib, sys, time
from support import faults
from vadapter.cli import common, main
from vadapter.errors import DataError, NonFiniteError
from vadapter.distributed import hosts, shutdown
from vadapter.distributed.preemption import signals
faults.install()
def run(args):
    with signals() as stop:
        for i in stop.watch(range(400), "work"):
            if sys.argv[1] == "all":
                raise NonFiniteError("diverged")
            if i == 1:
                pathlib.Path(sys.argv[2]).touch()  # a moment before the fault
            if sys.argv[1] == "one" and i == 2 and hosts.index() == 1:
                raise DataError("no file here")
            time.sleep(0.05)
code, reason = main._attempt(argparse.Namespace(row=common.verb(example="")(run)))
sys.exit(shutdown.end_job(code, reason))
"""
LIMITS = {"deadline": 30, "VADAPTER_WATCHDOG": "600"}  # seconds; the second is lower for a hang


@dataclasses.dataclass
class End:
    """How the hosts of a job ended, and how many seconds after the fault the last of them did."""

    codes: list[int]
    logs: list[str]
    took: float


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Jobs that work in steps, all at once: what happens in them -> how they ended."""
    folder = tmp_path_factory.mktemp("ends")

    def begin(name, faults=None, before="", n=2, **options):
        place = folder / name.replace(" ", "-")
        command = (sys.executable, "-c", before + WORK, name, str(place / "mark"))
        job = drive.Job(place, folder, n=n)
        return job.start(command=command, faults=faults or {}, **{**LIMITS, **options})

    apart = {"n": 3, "only": (0, 2), "deadline": 20}
    cluster = {"before": drive.CLUSTER, "detected": True}
    started = {
        "raise": begin("raise", {1: "RAISE:work:2"}),
        "hang": begin("hang", {1: "HANG:work:2"}, VADAPTER_WATCHDOG="5"),
        "term first": begin("term first", {0: "TERM:work:2"}),
        "term last": begin("term last", {1: "TERM:work:2"}),
        "term both": begin("term both", dict.fromkeys((0, 1), "TERM:work:2")),
        "one": begin("one"),
        "all": begin("all"),
        "nothing": begin("nothing", **cluster),
        "kill first": begin("kill first", {0: "KILL:work:2"}),
        "frozen": begin("frozen", {1: "STOP:work:2"}),
        "away": begin("away", **apart),
        "detected away": begin("detected away", **apart, **cluster),
    }
    done = {}
    for name, job in started.items():
        codes = job.wait(only=(0,) if name == "frozen" else ())
        mark = job.folder / "mark"
        took = job.took(mark) if mark.exists() else 0.0
        done[name] = End(codes, list(map(job.log, job.hosts)), took)
    return done


@pytest.mark.parametrize("name", ["away", "detected away"])
def test_a_host_that_does_not_connect_is_named_by_the_others(ends, name):
    said = "vadapter: host 1 of 3 did not come within 20 s\n"
    assert (ends[name].codes, ends[name].logs) == ([LOST, LOST], [said, said])


def test_an_error_on_one_host_has_its_traceback_there_and_one_line_on_the_others(ends):
    first, second = ends["raise"].logs
    assert ends["raise"].codes == [LOST, LOST]
    assert first.endswith("\nvadapter: host 1 of 2 stopped: RuntimeError: injected at work:2\n")
    assert first.count(STACK) > 1
    told, _, stacks = second.partition("RuntimeError: injected at work:2\n")
    assert told.startswith("Traceback")
    assert stacks.count(STACK) > 1


def test_a_user_error_on_one_host_ends_all_with_its_exit_code(ends):
    assert ends["one"].codes == [USER_ERROR, USER_ERROR]
    first, second = ends["one"].logs
    assert first == "vadapter: host 1 of 2 stopped: no file here\n"
    assert second == "vadapter: no file here\n"


def test_an_error_on_all_hosts_is_reported_by_each(ends):
    assert ends["all"].codes == [NON_FINITE] * 2
    assert ends["all"].logs == ["vadapter: diverged\n"] * 2


def test_a_host_that_hangs_is_found_with_the_stacks_of_all_threads(ends):
    assert ends["hang"].codes == [LOST, LOST]
    for log, where in zip(ends["hang"].logs, ("in exchange", "in fault"), strict=True):
        assert "Timeout (0:00:05)!" in log
        assert log.count(STACK) > 1
        assert where in log


@pytest.mark.parametrize(("name", "lost"), [("kill first", 0), ("frozen", 1)])
def test_when_a_host_is_lost_the_others_end_with_stack_traces(ends, name, lost):
    code, log = ends[name].codes[1 - lost], ends[name].logs[1 - lost]
    assert code in (LOST, ABORTED)
    assert log.count(STACK) > 1
    assert "in run" in log


@pytest.mark.parametrize(
    ("name", "limit"),
    [("raise", 0), ("one", 0), ("hang", 5), ("kill first", HEARTBEAT), ("frozen", HEARTBEAT)],
)
def test_all_hosts_end_within_the_deadline_after_a_fault(ends, name, limit):
    assert 0 < ends[name].took < limit + drive.MARGIN


@pytest.mark.parametrize("whom", ["first", "last", "both"])
def test_between_two_batches_a_signal_to_any_host_stops_all(ends, whom):
    end = ends[f"term {whom}"]
    assert end.codes == [PREEMPTED, PREEMPTED]
    assert all("vadapter: work: stopped by SIGTERM; run" in log for log in end.logs)


def test_an_undisturbed_job_ends_in_success(ends):
    assert (ends["nothing"].codes, ends["nothing"].logs) == ([0, 0], ["", ""])


# --- What they tell each other -----------------------------------------------------------------

TALK = """
import pathlib, sys
import jax, jax.numpy as jnp
from vadapter.errors import ConfigError, HostError
from vadapter.distributed import shutdown
from vadapter.checkpoints.manager import Checkpointer
me, folder = hosts.index(), pathlib.Path(sys.argv[1])
def told(fn, *arguments):
    try:
        print(fn(*arguments))
    except (ConfigError, HostError) as error:
        print(type(error).__name__, error)
told(hosts.exchange, {"host": me}, "values")
told(hosts.of_first, me + 5, "first")
told(hosts.require_same, {"a": {"b": 1}}, "facts")
told(hosts.require_same, {"a": {"b": me}, "c": 2}, "facts")
def make():
    path = folder / "made"
    if not path.exists():
        path.write_text(f"by {me}")
    return path.read_text()
told(hosts.in_turn, make, "file")
def fail():
    raise ConfigError(f"no file for {me}")
told(hosts.in_turn, fail, "file")
told(hosts.exchange, 1, f"place {me}")
checkpointer = Checkpointer(folder / "checkpoints", keep=1)
told(checkpointer.save, 3 + me, {"w": jnp.ones(2)}, {})
if me == 1:
    hosts.report_end(78, "no file")
hosts.exchange("", "one ends")
if me == 0:
    hosts.report_end(1, "follows")
hosts.exchange("", "both end")
told(hosts.first_to_end)
if me == 0:
    told(checkpointer.save, 9, {"w": jnp.ones(2)}, {})
shutdown._exit(0, "done", quiet=True)
"""


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talk")
    return [text.splitlines() for text in drive.run_python(TALK, str(folder), deadline=5)]


def test_hosts_exchange_values_and_take_those_of_the_first(talk):
    for lines in talk:
        assert lines[:3] == ["[{'host': 0}, {'host': 1}]", "5", "None"]


def test_a_difference_is_an_error_on_all_hosts_that_names_it(talk):
    for lines in talk:
        assert lines[3:6] == [
            "ConfigError the hosts differ in facts:",
            "  host 1: a.b = 1, host 0: 0",
            "Start all of them with the same command, program and data.",
        ]


def test_the_first_host_writes_what_the_others_read_and_its_error_is_raised_on_all(talk):
    assert [lines[6] for lines in talk] == ["by 0", "by 0"]
    assert talk[0][7] == "ConfigError no file for 0"
    assert talk[1][7] == "ConfigError host 0: no file for 0"


def test_hosts_that_save_different_steps_or_alone_are_an_error_and_not_a_hang(talk):
    apart = "HostError the hosts do different things, which is a bug in vadapter:"
    for lines in talk:
        assert lines[8:11] == [apart, "  host 0: place 0", "  host 1: place 1"]
        assert lines[11:14] == [apart, "  host 0: saving step 3", "  host 1: saving step 4"]
    assert talk[0][15].startswith("HostError host 1 of 2 did not come within 5 s: saving step 9")


def test_the_host_whose_end_was_reported_first_is_the_cause(talk):
    for lines in talk:
        assert lines[14] == "(78, 'host 1 of 2 stopped: no file')"


# --- Who reads what ------------------------------------------------------------------------------


def test_a_mesh_that_gives_hosts_the_same_rows_is_refused(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int

    class Mesh:
        def __init__(self, **shape):
            self.shape = shape
            owners = np.repeat([Device(0), Device(1)], 4)
            self.devices = owners.reshape(*shape.values())

    use_host_count(monkeypatch, 2)
    require_own_rows(Mesh(data=2, fsdp=2, tensor=2))
    require_own_rows(Mesh(data=1, fsdp=2, tensor=4))
    with pytest.raises(ConfigError, match=r"mesh.tensor must divide the devices of a host"):
        require_own_rows(Mesh(data=1, fsdp=1, tensor=8))
