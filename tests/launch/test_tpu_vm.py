"""What launch/tpu_vm.sh runs on TPU VMs, with a `gcloud` that stands in: this machine is the VM."""

import contextlib
import os
import signal

import pytest
from support.launchers import SLICE, TRAIN, VM, launch, put

# Notes what it is asked; copies, runs commands at home, and tells the states of a file in turn.
GCLOUD = """
echo "$4" >>"$HOME/asked"
case $4 in
  describe) sed -n "$(grep -c describe "$HOME/asked")p" "$HOME/states" ;;
  scp)
    for file in "${@:6}"; do
      [[ $file != *: ]] || break
      cp "$file" "$HOME"
    done
    ;;
  ssh)
    command=${*: -1}
    cd "$HOME" && exec bash -c "${command#--command=}"
    ;;
esac
"""
# Trains until it is asked to stop.
VADAPTER = """
echo $$ >"$HOME/child.pid"
trap 'echo saved; echo saved >"$HOME/fifo"; exit 75' TERM
echo "$VADAPTER_DISTRIBUTED, $VADAPTER_DATA: $*"
echo started >"$HOME/fifo"
while :; do /bin/sleep 0.05; done
"""


@pytest.fixture
def vm(tmp_path):
    """A function that runs a verb, and the home folder of the VM."""
    home = tmp_path / "home"
    path = put(tmp_path / "bin", gcloud=GCLOUD, curl="", sleep="")
    put(home / ".local/bin", uv='echo "uv $*" >>"$HOME/asked"')
    put(home / "venv/bin", pip='echo "pip $*" >>"$HOME/asked"', vadapter=VADAPTER)
    os.mkfifo(home / "fifo")

    def do(verb, *options):
        return launch("tpu_vm.sh", verb, *VM, *options, PATH=path, HOME=str(home))

    yield do, home
    for name in ("vadapter.pid", "child.pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((home / name).read_text()), signal.SIGKILL)


def test_create_waits_until_the_slices_are_there_and_installs(vm):
    do, home = vm
    (home / "states").write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
    done = do("create", *SLICE)
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in done.stdout.splitlines()] == [
        "WAITING_FOR_RESOURCES", "PROVISIONING",
    ]  # fmt: skip
    assert (home / "asked").read_text().splitlines() == [
        "create", "describe", "describe", "describe", "scp", "ssh",
        f"uv venv --quiet --clear --seed --python 3.12 {home}/venv",
        "pip install --quiet vadapter[tpu,gs]==0.1",
    ]  # fmt: skip
    assert (home / "supervise.sh").exists()
    assert (home / "common.sh").exists()


def test_create_gives_up_when_the_queue_does(vm):
    do, home = vm
    (home / "states").write_text("WAITING_FOR_RESOURCES\nFAILED\n")
    done = do("create", *SLICE)
    assert done.returncode == 1
    assert done.stderr.startswith("the queued resource is FAILED; see: gcloud compute tpus queued-")
    assert "pip" not in (home / "asked").read_text()


def test_a_run_is_started_once_watched_and_stopped(vm):
    do, home = vm
    (home / "states").write_text("ACTIVE\n")
    assert do("install", "--install=vadapter[tpu,gs]==0.1").returncode == 0
    started = do("run", "--env=VADAPTER_DATA=gs://b/a c", *TRAIN)
    assert (started.returncode, started.stdout) == (0, "")
    assert started.stderr.startswith("logs: vadapter.log in the home folder of every host: ")
    assert (home / "fifo").read_text() == "started\n"
    again = do("run", *TRAIN)
    assert (again.returncode, again.stderr.splitlines()[0]) == (1, "already running")
    said = do("logs").stdout.splitlines()
    assert said[0].startswith("== ")
    assert said[1:] == [f"auto, gs://b/a c: {' '.join(TRAIN[1:])}"]
    assert do("stop").returncode == 0
    assert (home / "fifo").read_text() == "saved\n"
    assert "saved" in do("logs").stdout
