"""Jobs on this machine, of several processes or one: real ones, and a command that stands in."""

import signal
import subprocess
import sys

import pytest
from support import hosts as drive
from support import runs
from support.launchers import LAUNCH, kill_session, put, session_members

from vadapter.checkpoints.manager import steps
from vadapter.errors import PREEMPTED, USER_ERROR

STEPS = 8
OVERRIDES = [
    f"--config.{item}" for item in ("mesh.data=2", "mesh.fsdp=2", f"stages.llm.steps={STEPS}")
]
REAL = f'exec {sys.executable} -m vadapter "$@"'
# As told for each process: leaves a child behind, waits for a signal, ends with a code.
FAKE = """
read -r what code <<<"${@:2+VADAPTER_PROCESS:1}"
echo "$VADAPTER_PROCESS of $VADAPTER_PROCESSES: $what"
case $what in
  leave) sleep 1000 & ;;
  wait)
    trap "echo got TERM; exit $code" TERM
    trap "echo got INT; exit $code" INT
    while :; do sleep 0.05; done
    ;;
  follow) while [[ ! -e $RUN/gone ]]; do sleep 0.05; done; sleep 0.5 ;;
  fail) touch "$RUN/gone" ;;
esac
exit "$code"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = runs.prepare(tmp_path_factory.mktemp("local"))
    return runs.write_recipe(folder, "text_only")


@pytest.fixture
def begin(tmp_path):
    """Start a launcher with this `vadapter` in a session of its own, gone after the test."""
    jobs = []

    def start(vadapter, *command):
        env = runs.environment(
            VADAPTER_DEADLINE="30", XLA_FLAGS="--xla_backend_optimization_level=0",
            PATH=put(tmp_path / "bin", vadapter=vadapter), RUN=str(tmp_path),
        )  # fmt: skip
        process = subprocess.Popen(
            command, env=env, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        jobs.append(process)
        return process

    yield start
    for process in jobs:
        kill_session(process)
        process.communicate()


def train(recipe, workdir):
    job = (str(LAUNCH / "local.sh"), "--processes=2", "--devices=2", "--", "train")
    return (*job, f"--config={recipe}", f"--workdir={workdir}", *OVERRIDES)


def fake(tmp_path, *plan):
    job = (
        str(LAUNCH / "local.sh"),
        f"--processes={len(plan)}",
        "--devices=1",
        f"--logs={tmp_path}",
    )
    return (*job, "--", "train", *plan)


def end(process, limit=60):
    """Its exit code and what it said."""
    out, _ = process.communicate(timeout=limit)
    return process.returncode, out


# --- A command that stands in ------------------------------------------------------------------


def test_the_exit_code_is_that_of_the_first_that_failed(begin, tmp_path):
    code, out = end(begin(FAKE, *fake(tmp_path, "follow 1", "fail 137", "follow 134")))
    assert code == 137, out
    assert sorted(out.splitlines()[1:]) == [
        "host 0: 0 of 3: follow", "host 1: 1 of 3: fail", "host 2: 2 of 3: follow",
    ]  # fmt: skip
    assert (tmp_path / "host-1.log").read_text() == "1 of 3: fail\n"


def test_children_of_a_process_end_with_it(begin, tmp_path):
    job = begin(FAKE, *fake(tmp_path, "leave 0", "leave 0"))
    assert end(job)[0] == 0
    assert not session_members(job.pid)


@pytest.mark.parametrize("name", ["INT", "TERM"])
def test_a_signal_goes_to_all_of_them_once(begin, tmp_path, name):
    job = begin(FAKE, *fake(tmp_path, "wait 75", "wait 75"))
    assert job.stdout is not None
    assert job.stdout.readline().startswith(f"logs: {tmp_path}/host-0.log to ")
    assert {job.stdout.readline() for _ in range(2)} == {
        "host 0: 0 of 2: wait\n", "host 1: 1 of 2: wait\n",
    }  # fmt: skip
    job.send_signal(signal.Signals[f"SIG{name}"])
    code, out = end(job)
    assert (code, sorted(out.splitlines())) == (75, [f"host {i}: got {name}" for i in (0, 1)])
    assert not session_members(job.pid)


# --- Training ------------------------------------------------------------------------------------


def test_a_user_error_ends_all_with_its_exit_code(begin, tmp_path):
    code, out = end(begin(REAL, *train(tmp_path / "none.py", tmp_path / "run")))
    assert code == USER_ERROR, out
    assert out.count("none.py") == 2
    assert {line[:8] for line in out.splitlines()[1:]} == {"host 0: ", "host 1: "}


@pytest.mark.slow
def test_after_a_signal_all_have_saved_and_the_same_command_resumes(begin, recipe, tmp_path):
    stopped = begin(REAL, *train(recipe, tmp_path / "run"))
    assert stopped.stdout is not None
    for line in stopped.stdout:
        if "host 0: llm: step 1/" in line:
            break
    stopped.send_signal(signal.SIGTERM)
    code, out = end(stopped, drive.LIMIT)
    assert code == PREEMPTED, out
    assert {f"host {i}: vadapter: llm, step" in out for i in (0, 1)} == {True}
    assert not session_members(stopped.pid)
    at = steps(tmp_path / "run/llm/checkpoints")[-1]
    assert 0 < at < STEPS
    code, out = end(begin(REAL, *train(recipe, tmp_path / "run")), drive.LIMIT)
    assert code == 0, out
    assert f"host 0: llm: resumed at step {at}\n" in out


@pytest.mark.slow
def test_the_supervisor_finishes_a_job_whose_process_was_killed(begin, recipe, tmp_path):
    # The fault comes with the first start alone.
    once = """
[[ $VADAPTER_PROCESS == 0 || -e $RUN/killed ]] || export FAULT=KILL:llm:step:5
[[ $VADAPTER_PROCESS == 0 ]] || touch "$RUN/killed"
"""
    supervise = (str(LAUNCH / "supervise.sh"), f"--workdir={tmp_path / 'run'}", "--pause=0", "--")
    job = begin(
        once + REAL.replace("-m vadapter", "-m support.faults"),
        *supervise,
        *train(recipe, tmp_path / "run"),
    )
    code, out = end(job, drive.LIMIT)
    assert code == 0, out
    assert out.count("supervise: exit code 137: restarting in 0 s") == 1
    assert "host 0: llm: resumed at step" in out
    assert not session_members(job.pid)


def test_a_few_steps_on_one_device_are_a_matter_of_options(begin, recipe, tmp_path):
    few = ("--gpu=none", "--stage=llm", "--batch=2", "--steps=2", "--quick", "--nans")
    command = ("train", f"--config={recipe}", f"--workdir={tmp_path / 'run'}")
    code, out = end(begin(REAL, str(LAUNCH / "one_gpu.sh"), *few, "--", *command), drive.LIMIT)
    assert code == 0, out
    assert "llm: lm, 2 steps of 2, mesh data=1 " in out
