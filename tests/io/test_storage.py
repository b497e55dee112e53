"""One interface to local paths and buckets."""

import itertools
from pathlib import Path

import pytest
from support import gcs

from vadapter.errors import ConfigError
from vadapter.hub.write import export
from vadapter.io import buckets, storage
from vadapter.io.json_files import rows
from vadapter.io.storage import COMMIT, as_path
from vadapter.train.metric_writer import MetricWriter


@pytest.fixture(scope="module")
def server():
    with gcs.local() as bucket:
        yield bucket


@pytest.fixture
def bucket(server):
    server.objects.clear()
    server.forbidden = ""
    yield server
    server.forbidden = ""


@pytest.mark.parametrize("text", ["runs/x", "/a b/100% #1?", "gs", "C:/x", "a:b//c"])
def test_local_paths_stay_those_of_pathlib(text):
    path = as_path(text)
    assert type(path) is type(Path())
    assert path == Path(text)
    assert not storage.remote(path)


def test_a_bucket_is_recognized_in_every_form_of_its_path(bucket):
    for text in ("gs://bucket/run", Path("gs://bucket/run"), as_path("gs://bucket/run")):
        path = as_path(text)
        assert str(path) == str(storage.absolute(text)) == "gs://bucket/run"
        assert str(path / "llm" / "done.json") == "gs://bucket/run/llm/done.json"
        assert storage.remote(path / "llm")


def test_writes_of_another_process_are_seen_immediately(bucket):
    folder = as_path("gs://bucket/run")
    assert not folder.is_dir()
    bucket.put("run/a", b"1")
    assert [path.name for path in folder.iterdir()] == ["a"]
    bucket.put("run/b", b"2")
    assert [path.name for path in folder.iterdir()] == ["a", "b"]
    assert (folder / "b").read_bytes() == b"2"


@pytest.mark.parametrize(("source", "target"), list(itertools.product(["here", "there"], repeat=2)))
def test_a_copied_folder_is_complete_or_not_there(bucket, tmp_path, source, target):
    place = lambda at, name: as_path(f"gs://bucket/{name}") if at == "there" else tmp_path / name  # noqa: E731
    one, other = place(source, "one"), place(target, "other")
    for name, content in (("meta/metadata", b"{}"), ("state/d/0", b"x" * 1000)):
        storage.write_bytes(one / name, content)
    (one / COMMIT).touch()
    storage.copy_tree(one, other)
    assert storage.committed(other)
    for name in ("meta/metadata", "state/d/0"):
        assert (other / name).read_bytes() == (one / name).read_bytes()


@pytest.mark.parametrize("target", ["here", "there"])
def test_a_copy_that_fails_leaves_nothing_that_looks_complete(bucket, tmp_path, target):
    other = as_path("gs://bucket/other") if target == "there" else tmp_path / "other"
    for name in ("meta/metadata", "state/d/0", COMMIT):
        bucket.put(f"one/{name}", b"x")
    bucket.forbidden = r"one/state/d/0"
    with pytest.raises(OSError, match="Forbidden"):
        storage.copy_tree(as_path("gs://bucket/one"), other)
    bucket.forbidden = ""
    assert not storage.committed(other)
    assert list(tmp_path.iterdir()) == []
    assert not any(name.startswith("other/") for name in bucket.objects)


@pytest.mark.parametrize("target", ["here", "there"])
def test_a_copy_that_is_killed_does_not_look_complete(bucket, tmp_path, monkeypatch, target):
    other = as_path("gs://bucket/other") if target == "there" else tmp_path / "other"
    for name in (COMMIT, "meta/metadata", "state/d/0"):
        bucket.put(f"one/{name}", b"x")
    copy = storage._copy

    def killed(source, to):
        if source.name == "0":
            raise KeyboardInterrupt
        copy(source, to)

    monkeypatch.setattr(storage, "_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        storage.copy_tree(as_path("gs://bucket/one"), other)
    monkeypatch.undo()
    assert not storage.committed(other)
    storage.copy_tree(as_path("gs://bucket/one"), other)
    assert (other / "state/d/0").read_bytes() == b"x"
    assert storage.committed(other)


def test_rows_that_a_bucket_refused_are_written_later(bucket, capsys):
    directory = as_path("gs://bucket/llm")
    with MetricWriter(directory, "llm", 3) as writer:
        writer.write(1, {"loss": 1.0}, loud=True)
        bucket.forbidden = r"POST"
        writer.write(2, {"loss": 2.0}, loud=True)
        assert "cannot write gs://bucket/llm/metrics.jsonl (OSError: Forbidden" in (
            capsys.readouterr().out
        )
        bucket.forbidden = ""
        assert [row["step"] for row in rows(directory / "metrics.jsonl")] == [1]
        writer.flush()
        assert [row["step"] for row in rows(directory / "metrics.jsonl")] == [1, 2]
        writer.write(3, {"loss": 3.0})
    assert [row["step"] for row in rows(directory / "metrics.jsonl")] == [1, 2, 3]
    with MetricWriter(directory, "llm", 3) as writer:
        writer.write(4, {"loss": 4.0})
    found = list(rows(directory / "metrics.jsonl"))
    assert [(row["step"], row["attempt"]) for row in found][-2:] == [(3, 1), (4, 2)]


def test_errors_that_are_not_of_a_bucket_are_raised_unchanged(bucket):
    with pytest.raises(ZeroDivisionError), buckets.bucket_errors():
        1 // 0  # noqa: B018
    with pytest.raises(ConfigError, match=r"gs://: FileNotFoundError: .*nothing"):  # noqa: SIM117
        with buckets.bucket_errors():
            as_path("gs://bucket/nothing").read_bytes()


def test_an_export_is_not_written_to_a_bucket(bucket):
    with pytest.raises(ConfigError, match="folder=gs://bucket/x: must be a local path"):
        export(None, Path("gs://bucket/x"))  # type: ignore[arg-type]
