"""Results are computed once per key, and again wherever what is kept is not what was written."""

import importlib.metadata
import json
import os
import threading

import pytest

from vadapter.errors import ConfigError
from vadapter.io import results

VALUE = {"shapes": [[2, 3], []], "view": None}


@pytest.fixture
def folder(tmp_path):
    before = results.folder()
    results.keep_in(tmp_path / "cache")
    yield tmp_path / "cache"
    results.keep_in(before)


@pytest.fixture
def versions():
    """Forget the version before and after a test that changes what it follows from."""
    results.version.cache_clear()
    yield
    results.version.cache_clear()


def computed(key="key", value=VALUE) -> bool:
    """Ask for a result; return whether it had to be computed."""
    calls = []
    assert results.kept("kind", key, lambda: calls.append(1) or value) == value
    return bool(calls)


def files(folder):
    return sorted((folder / "results").iterdir())


def test_a_result_is_computed_once_per_key(folder):
    assert [computed(key) for key in ("a", "b", "a", "b", ["a"], ["a"])] == [
        True, True, False, False, True, False,
    ]  # fmt: skip


def test_nothing_is_kept_without_a_folder(folder):
    assert computed()
    results.keep_in(None)
    assert computed()
    assert computed()


def test_whatever_happens_to_a_file_its_result_is_right_and_kept_again(folder):
    assert computed()
    (path,) = files(folder)
    whole = path.read_bytes()
    changes = [whole[:n] for n in range(0, len(whole), 7)]
    changes += [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in range(0, len(whole), 5)]
    changes += [whole + b" ", whole * 2, b"{}"]
    for changed in changes:
        path.write_bytes(changed)
        assert computed()
        assert path.read_bytes() == whole
    assert not computed()


@pytest.mark.parametrize("library", ["jax", "jaxlib", "flax"])
def test_another_version_of_a_library_computes_again(folder, versions, monkeypatch, library):
    assert computed()
    original = importlib.metadata.version
    changed = lambda name: "99.0" if name == library else original(name)  # noqa: E731
    monkeypatch.setattr(importlib.metadata, "version", changed)
    results.version.cache_clear()
    assert computed()


def test_a_change_to_the_package_computes_again(folder, versions, monkeypatch, tmp_path):
    module = tmp_path / "package" / "io" / "results.py"
    module.parent.mkdir(parents=True)
    module.write_text("a = 1\n")
    monkeypatch.setattr(results, "__file__", str(module))
    assert computed()
    assert not computed()
    module.write_text("a = 2\n")
    results.version.cache_clear()
    assert computed()


def test_a_full_disk_keeps_nothing_and_leaves_nothing(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert computed()
        assert computed()
        assert files(folder) == []
    assert computed()
    assert not computed()


def test_writers_at_the_same_time_never_show_a_part_of_a_result(folder):
    contents, seen = [bytes([n]) * (20_000 + n) for n in range(4)], set()

    def write(data):
        for _ in range(30):
            results.write("kind", "key", data)

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen.add(results.read("kind", "key"))
    assert seen <= {None, *contents}
    assert results.read("kind", "key") in contents
    assert len(files(folder)) == 1


def test_the_oldest_results_are_removed(folder, monkeypatch):
    monkeypatch.setattr(results, "MAX_FILES", 3)
    for age, key in enumerate("abcde"):
        before = set(files(folder)) if age else set()
        assert computed(key)
        (new,) = set(files(folder)) - before
        os.utime(new, (age, age))
    assert [results.load("kind", key) is not None for key in "abcde"] == [False] * 2 + [True] * 3


def test_a_folder_that_others_can_write_to_is_refused(tmp_path):
    before = results.folder()
    tmp_path.chmod(0o770)
    try:
        with pytest.raises(ConfigError, match="other users can write to the compilation cache"):
            results.keep_in(tmp_path)
        assert results.folder() is None
    finally:
        results.keep_in(before)


def test_a_folder_that_cannot_be_made_keeps_nothing(tmp_path):
    before = results.folder()
    (tmp_path / "file").write_text("")
    try:
        results.keep_in(tmp_path / "file" / "cache")
        assert results.folder() is None
    finally:
        results.keep_in(before)


def test_what_is_kept_is_json(folder):
    computed()
    (path,) = files(folder)
    assert json.loads(path.read_bytes()[32:]) == VALUE
