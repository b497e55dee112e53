"""The lock of a run directory in a bucket: one holder, known to live, or taken over."""

import json
import os
import threading

import pytest
from support import gcs

from vadapter.errors import ConfigError
from vadapter.io import gcs_lock as module
from vadapter.io import storage
from vadapter.io.lock import lock


@pytest.fixture(scope="module")
def bucket():
    with gcs.local() as bucket:
        yield bucket


@pytest.fixture
def path(bucket, monkeypatch):
    """Of a lock, with a clock that runs fast."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.5), ("_POLL", 0.05)):
        monkeypatch.setattr(module, name, seconds)
    bucket.objects.clear()
    return storage.as_path("gs://bucket/run/.lock")


def elsewhere(**who):
    """What a process of another machine has written."""
    return json.dumps({"pid": 7, "host": "far", "started": "then", "machine": "x", **who}).encode()


def test_a_second_run_is_refused_and_the_running_one_is_named(path, bucket):
    with lock(path):
        assert json.loads(bucket.objects["run/.lock"])["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=rf"in use by another run: process {os.getpid()} on"):
            lock(path).__enter__()
    assert "run/.lock" not in bucket.objects
    with lock(path):
        pass


def test_the_lock_of_a_holder_that_no_longer_writes_it_is_taken_over(path, bucket, capsys):
    bucket.put("run/.lock", elsewhere())
    with lock(path):
        assert json.loads(bucket.objects["run/.lock"])["pid"] == os.getpid()
    assert "process 7 on far, started then; waiting up to" in capsys.readouterr().err


def test_the_lock_of_an_ended_process_of_this_machine_is_taken_immediately(
    path, bucket, monkeypatch
):
    monkeypatch.setattr(module, "_POLL", None)  # to wait would be an error
    ended = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(ended, 0)
    bucket.put("run/.lock", elsewhere(pid=ended, machine=module.machine()))
    with lock(path):
        assert json.loads(bucket.objects["run/.lock"])["pid"] == os.getpid()


def test_a_waiting_process_gets_the_lock_once_it_is_released(path):
    got = threading.Event()

    def second():
        with lock(path, wait=True):
            got.set()

    with lock(path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not got.wait(0.3)
    thread.join(20)
    assert got.is_set()


def test_a_run_whose_lock_was_taken_over_ends_and_leaves_it_to_the_other(
    path, bucket, monkeypatch, capsys
):
    ended = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set() or exit(code))
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with lock(path):
        bucket.put("run/.lock", elsewhere())
        assert ended.wait(20)
    assert bucket.objects["run/.lock"] == elsewhere()
    assert "was taken over by process 7 on far" in capsys.readouterr().err
