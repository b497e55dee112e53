"""The supervisor starts a command again where that may help, and only there."""

import signal
import subprocess
import sys

import pytest
from support.launchers import LAUNCH, kill_session, put

SUPERVISE = LAUNCH / "supervise.sh"
# Takes its exit codes from a file, one a start; a line goes on with what it saves (10), throws away
# (-10) or finishes (done.json).
COMMAND = """
import pathlib, sys
run = pathlib.Path(sys.argv[1])
lines = (run / "codes").read_text().split("\\n")
start = len(list(run.glob("start-*")))
(run / f"start-{start}").touch()
code, *saves = lines[min(start, len(lines) - 1)].split()
for name in saves:
    path = run / "stage" / (name if name == "done.json" else f"checkpoints/{name}")
    if name.startswith("-"):
        (path.parent / name[1:]).rmdir()
    elif path.suffix == ".json":
        path.touch()
    else:
        path.mkdir(parents=True)
sys.exit(int(code))
"""


def supervise(run, *codes, tries=3, workdir=None, **options):
    """Its exit code, how often the command was started, and what it said."""
    run.mkdir(exist_ok=True)
    (run / "codes").write_text("\n".join(codes))
    command = [str(SUPERVISE), f"--workdir={workdir or run}", f"--tries={tries}", "--pause=0", "--"]
    command += [sys.executable, "-c", COMMAND, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, **options)
    return done.returncode, len(list(run.glob("start-*"))), done.stderr


@pytest.mark.parametrize("code", [0, 2, 77, 78, 130])
def test_a_finished_run_or_a_user_error_is_not_restarted(tmp_path, code):
    assert supervise(tmp_path / "run", str(code)) == (code, 1, "")


@pytest.mark.parametrize("code", [75, 1, 134, 137, 143])
def test_a_stopped_or_lost_run_is_restarted(tmp_path, code):
    ended, starts, said = supervise(tmp_path / "run", f"{code} 10", "0")
    assert (ended, starts) == (0, 2)
    assert said == f"supervise: exit code {code}: restarting in 0 s\n"


def test_without_a_new_checkpoint_it_gives_up(tmp_path):
    ended, starts, said = supervise(tmp_path / "run", "1")
    assert (ended, starts) == (1, 3)
    assert said.endswith("exit code 1 after 3 starts without a new checkpoint: giving up\n")


def test_progress_resets_the_count(tmp_path):
    codes = ("1", "1", "1 10", "1", "1", "137 20", "1", "1", "75 30", "78")
    ended, starts, _ = supervise(tmp_path / "run", *codes)
    assert (ended, starts) == (78, len(codes))


def test_a_finished_stage_is_progress(tmp_path):
    assert supervise(tmp_path / "run", "1 10", "1", "1 done.json", "1")[:2] == (1, 6)


def test_a_checkpoint_that_was_deleted_and_written_again_is_no_progress(tmp_path):
    codes = ("1 10", *["1 -10", "1 10"] * 5)
    assert supervise(tmp_path / "run", *codes)[:2] == (1, 4)


def test_in_a_bucket_a_complete_checkpoint_is_progress(tmp_path):
    # A stand-in that lists a folder as the bucket.
    gcloud = '[[ "$1 $2" == "storage ls" ]] && ls -d "$BUCKET"/${3#gs://bucket/run/}'
    path = put(tmp_path / "bin", gcloud=gcloud)
    saves = [f"1 {n}" for n in range(9)]  # still without their last file
    whole = ["1 10/commit_success.txt", "1", "1", "1 done.json", "1"]
    for name, codes, starts in (("saves", saves, 3), ("whole", whole, 7)):
        run = tmp_path / name
        env = {"PATH": path, "BUCKET": str(run)}
        assert supervise(run, *codes, workdir="gs://bucket/run", env=env)[:2] == (1, starts)


def test_an_incomplete_checkpoint_is_no_progress(tmp_path):
    codes = [f"1 {n}.orbax-checkpoint-tmp" for n in range(9)]
    assert supervise(tmp_path / "run", *codes)[:2] == (1, 3)


WAITS = """
import signal, sys, time
signal.signal(signal.{name}, lambda *_: sys.exit(75))
print("ready", flush=True)
while True:
    time.sleep(0.01)
"""


@pytest.fixture
def begin(tmp_path):
    """Start a supervisor in a session of its own, which is gone after the test."""
    processes = []

    def start(*command):
        process = subprocess.Popen(
            [str(SUPERVISE), f"--workdir={tmp_path}", "--pause=1000", "--", *command],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        processes.append(process)
        return process

    yield start
    for process in processes:
        kill_session(process)
        process.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_goes_to_the_command_which_is_not_started_again(begin, name):
    process = begin(sys.executable, "-c", WAITS.format(name=name))
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.Signals[name])
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (75, "")
    assert said == f"supervise: stopped by {name}\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_pause_is_cut_short_by_a_signal(begin, name):
    process = begin("bash", "-c", "exit 1")
    assert "restarting in 1000 s" in process.stderr.readline()
    process.send_signal(signal.Signals[name])
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, f"supervise: stopped by {name}\n")
