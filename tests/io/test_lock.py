import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.paths import ROOT

from vadapter.errors import ConfigError
from vadapter.io.lock import lock

HOLD = """
import pathlib, sys, time
from vadapter.errors import ConfigError
from vadapter.io.lock import lock
try:
    with lock(pathlib.Path(sys.argv[1]) / ".lock"):
        print("held", flush=True)
        sys.stdin.readline()
    print("released", flush=True)
except ConfigError as e:
    print("refused:", e, flush=True)
"""


@pytest.fixture
def hold():
    """Start processes that take the lock of a directory and hold it until a line arrives."""
    started = []

    def start(directory):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", HOLD, str(directory)],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_second_process_is_refused_and_the_holder_of_the_lock_is_named(tmp_path, hold):
    first = hold(tmp_path)
    assert first.stdout.readline() == "held\n"
    refused = hold(tmp_path).communicate()[0]
    assert refused.startswith(f"refused: {tmp_path} is in use by another run: process {first.pid} ")
    assert "Stop that run, or choose another directory." in refused
    assert first.communicate("go\n")[0] == "released\n"
    with lock(tmp_path / ".lock"):
        pass


def test_a_killed_holder_leaves_no_stale_lock(tmp_path, hold):
    holder = hold(tmp_path)
    assert holder.stdout.readline() == "held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with lock(tmp_path / ".lock"):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_one_process_cannot_take_the_lock_twice_but_can_take_it_again(tmp_path):
    with lock(tmp_path / ".lock"), pytest.raises(ConfigError, match=f"process {os.getpid()} on "):
        lock(tmp_path / ".lock").__enter__()
    with pytest.raises(KeyError), lock(tmp_path / ".lock"):
        raise KeyError("an error in the run releases the lock and is not changed")
    with lock(tmp_path / "sub" / ".lock"), lock(tmp_path / ".lock"):
        pass


def test_a_missing_directory_may_be_created_by_several_processes(tmp_path):
    def enter(_):
        try:
            held = lock(tmp_path / "a" / "b" / "c" / ".lock")
            held.__enter__()
            return held
        except ConfigError:
            return None

    with ThreadPoolExecutor(8) as pool:
        locks = [held for held in pool.map(enter, range(8)) if held]
    assert len(locks) == 1
    locks[0].__exit__(None, None, None)


def test_unwritable_paths_are_named_before_anything_runs(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*file/run: Not a directory\. Choose"):
        lock(tmp_path / "file" / "run" / ".lock").__enter__()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot write .*: No space left on device"):
        lock(tmp_path / "run" / ".lock").__enter__()
    monkeypatch.undo()
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]  # no probe stays
    with lock(tmp_path / "run" / ".lock"):
        pass


@contextlib.contextmanager
def unprivileged():
    """Act as nobody where the tests run as root, to whom permissions do not apply."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with unprivileged(), pytest.raises(ConfigError, match=r"cannot write .*Permission denied"):
        lock(tmp_path / ".lock").__enter__()
    tmp_path.chmod(0o700)


def test_an_unreadable_note_in_the_lock_file_does_not_matter(tmp_path):
    (tmp_path / ".lock").write_text("{not json, and longer than what will be written here" * 9)
    with lock(tmp_path / ".lock"):
        assert set(json.loads((tmp_path / ".lock").read_text())) == {"host", "pid", "started"}
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ConfigError, match="in use by another run: see "):
            lock(tmp_path / ".lock").__enter__()


def test_the_waiting_lock_lets_one_in_at_a_time(tmp_path):
    inside, most = 0, 0

    def work(_):
        nonlocal inside, most
        with lock(tmp_path / "l", wait=True):
            inside += 1
            most = max(most, inside)
            time.sleep(0.005)
            inside -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(12)))
    assert most == 1
