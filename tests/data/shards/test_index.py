"""The index: the same source, refused where it no longer matches, and never the same work twice."""

import dataclasses
import fcntl
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.image_files import contents, image, pairs, read, spoil_header, tars, write_tar
from support.paths import ROOT

from vadapter.cli.main import main
from vadapter.data.shards import index, shard_set
from vadapter.data.sources.tars import CaptionTars
from vadapter.errors import ConfigError, DataError

silent = {"say": lambda text: None}


@pytest.mark.parametrize("form", ["pairs", "tables"])
def test_a_source_is_the_same_with_and_without_an_index(tmp_path, form):
    folder = pairs(tmp_path) if form == "pairs" else tars(tmp_path)
    scanned = read(folder)
    index.build(folder, **silent)
    for path in folder.glob("*.tar"):
        spoil_header(path)  # a scan would fail
    indexed = read(folder)
    assert contents(indexed) == contents(scanned)
    assert (indexed.fingerprint(), indexed.kind) == (scanned.fingerprint(), scanned.kind)
    copied = pickle.loads(pickle.dumps(indexed))
    assert contents(copied) == contents(scanned)


def test_an_index_serves_each_split_of_its_folder(tmp_path):
    shards_ = {"train-0": "0", "val-8": "b", "val-9": "", "val-10": "a"}
    for name, key in shards_.items():
        level = int(name.split("-")[1])
        files = {f"{key}.png": image(level), f"{key}.txt": name.encode()}
        write_tar(tmp_path / f"{name}.tar", files if key else {})
    index.build(tmp_path, **silent)
    val = CaptionTars(tmp_path, shards="val-{8..10}.tar")  # not in the order of their names
    assert contents(val) == [("b", 8, ("val-8",), ()), ("a", 10, ("val-10",), ())]
    assert contents(CaptionTars(tmp_path, "train")) == [("0", 0, ("train-0",), ())]


def test_a_worker_is_sent_no_texts(tmp_path):
    folder = pairs(tmp_path, each=60)
    assert b"shard 1, image 7" in pickle.dumps(read(folder))
    index.build(folder, **silent)
    assert b"shard 1, image 7" not in pickle.dumps(read(folder))


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: touch(f / "00002.tar"), r"does not match .*00002\.tar, which was modified"),
        (
            lambda f: write_tar(f / "00002.tar", {"x.png": bytes(90_000), "x.txt": b"x"}),
            r"tar, which has \d+ b",
        ),
        (lambda f: write_tar(f / "00009.tar", {}), r"has no shard 00009\.tar"),
    ],
)
def test_an_index_that_no_longer_fits_names_the_shard_and_the_command(tmp_path, change, message):
    folder = pairs(tmp_path)
    index.build(folder, **silent)
    change(folder)
    with pytest.raises(DataError, match=message) as caught:
        read(folder)
    assert f"vadapter data index {folder}" in str(caught.value)
    index.build(folder, **silent)
    assert read(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = pairs(tmp_path)
    index.build(folder, **silent)
    (folder / "00001.tar").unlink()
    with pytest.raises(DataError, match=r"no shard 00001\.tar \(1 of 4 are missing\)"):
        CaptionTars(folder, shards="{00000..00003}.tar")


@pytest.mark.parametrize("where", ["header", "data", "end", "other file"])
def test_a_corrupt_index_is_refused(tmp_path, where):
    folder = pairs(tmp_path)
    index.build(folder, **silent)
    path = folder / shard_set.INDEX
    raw = bytearray(path.read_bytes())
    at = {"header": 30, "data": len(raw) - 40}.get(where)
    if at is not None:
        raw[at] ^= 4
    path.write_bytes(
        raw[:-50] if where == "end" else b"<html>" * 9 if where == "other file" else raw
    )
    with pytest.raises(DataError, match=r"index\.vadapter: not a readable index"):
        read(folder)
    index.build(folder, **silent)  # starts over
    assert len(read(folder)) == 12


def test_the_index_may_be_in_another_folder(tmp_path):
    folder, out = pairs(tmp_path / "data"), tmp_path / "made" / "my.index"
    out.parent.mkdir()
    index.build(folder, out, **silent)
    assert sorted(p.name for p in folder.iterdir()) == [f"0000{i}.tar" for i in range(4)]
    assert len(read(folder, index=out)) == 12
    touch(folder / "00000.tar")
    with pytest.raises(DataError, match=rf"data index {folder} --out {out}"):
        read(folder, index=out)


def scanned(monkeypatch, change=lambda name, made: made) -> list[str]:
    """The names of shards that are read from now on; `change` alters what was read."""
    names, scan = [], index.scan

    def record(folder, name):
        names.append(name)
        return change(name, scan(folder, name))

    monkeypatch.setattr(index, "scan", record)
    return names


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_shards_read_by_a_stopped_process_are_not_read_again(tmp_path, monkeypatch, number):
    folder = pairs(tmp_path / "data", count=120, each=60)
    journal = folder / f"{shard_set.INDEX}.part"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "vadapter", "data", "index", str(folder)]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and journal.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.002)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGINT: 130}[number]
    assert not (folder / shard_set.INDEX).exists()
    lines = journal.read_bytes().split(b"\n")[:-1]  # what follows the last line end is torn
    before = {json.loads(line)["name"] for line in lines}
    assert 5 <= len(before) < 120
    names = scanned(monkeypatch)
    index.build(folder, **silent)
    assert set(names) == {f"{i:05d}.tar" for i in range(120)} - before
    interrupted = (folder / shard_set.INDEX).read_bytes()
    assert not journal.exists()
    (folder / shard_set.INDEX).unlink()
    index.build(folder, **silent)
    assert (folder / shard_set.INDEX).read_bytes() == interrupted


@pytest.mark.parametrize("keep", [0, 1, 400, 0.5, 0.9, -1, -2, -300])
def test_a_truncated_journal_loses_only_its_last_line(tmp_path, monkeypatch, keep):
    folder = pairs(tmp_path)
    (folder / "bad.tar").write_bytes(b"not a tar")  # keeps the journal
    with pytest.raises(DataError, match=r"bad\.tar"):
        index.build(folder, **silent)
    (folder / "bad.tar").unlink()
    raw = (folder / "index.vadapter.part").read_bytes()
    assert raw.count(b"\n") == 4
    torn = raw[: int(keep * len(raw)) if isinstance(keep, float) else keep]
    (folder / "index.vadapter.part").write_bytes(torn)
    names = scanned(monkeypatch)
    index.build(folder, **silent)
    complete = torn.count(b"\n") + (torn[-1:] == b"}" and raw[len(torn) : len(torn) + 1] == b"\n")
    assert len(names) == 4 - complete
    assert contents(read(folder))[5] == ("000010002", 22, ("shard 1, image 2",), ())


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    folder = pairs(tmp_path)
    assert "4 shards (4 read now), 36 files, 12 pairs" in index.build(folder, **silent)
    before = (folder / shard_set.INDEX).read_bytes()
    names = scanned(monkeypatch)
    assert "(0 read now)" in index.build(folder, **silent)
    assert (folder / shard_set.INDEX).read_bytes() == before
    write_tar(folder / "00002.tar", {"n.png": image(7), "n.txt": b"new"})
    (folder / "00003.tar").unlink()
    write_tar(folder / "00004.tar", {"m.png": image(8), "m.txt": b"newer"})
    index.build(folder, **silent)
    assert names == ["00002.tar", "00004.tar"]
    assert contents(read(folder))[-2:] == [("n", 7, ("new",), ()), ("m", 8, ("newer",), ())]


def test_unreadable_shards_are_reported_together_after_the_others_are_indexed(
    tmp_path, monkeypatch
):
    folder = pairs(tmp_path)
    for number in (1, 2):
        raw = (folder / f"0000{number}.tar").read_bytes()
        (folder / f"0000{number}.tar").write_bytes(raw[:700])
    with pytest.raises(DataError, match=r"2 problems:\n- .*00001\.tar.*\n- .*00002\.tar"):
        index.build(folder, **silent)
    assert not (folder / shard_set.INDEX).exists()
    for number in (1, 2):
        write_tar(folder / f"0000{number}.tar", {})
    names = scanned(monkeypatch)
    index.build(folder, **silent)
    assert names == ["00001.tar", "00002.tar"]


def test_flipped_bytes_that_leave_size_and_time_are_found_by_verify(tmp_path, capsys):
    folder = pairs(tmp_path)
    assert main(["data", "index", str(folder)]) == 0
    assert main(["data", "index", str(folder), "--verify"]) == 0
    assert "4 shards unchanged" in capsys.readouterr().out
    for number in (0, 3):
        path = folder / f"0000{number}.tar"
        status, raw = path.stat(), bytearray(path.read_bytes())
        raw[530] ^= 1
        path.write_bytes(raw)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert main(["data", "index", str(folder), "--verify"]) == 78
    error = capsys.readouterr().err
    assert "00000.tar: contents changed since indexing" in error
    assert "00003.tar" in error
    assert "00001.tar" not in error


def test_progress_shows_shards_bytes_and_time_left(tmp_path):
    folder, said = pairs(tmp_path), []
    index.build(folder, say=said.append, every=0.0)
    assert [line.split()[-2:] for line in said] == [[f"{i}/4", "shards"] for i in range(1, 5)]
    assert said[2].endswith("/s  0 s left  3/4 shards")
    touch(folder / "00000.tar")
    said.clear()
    index.build(folder, say=said.append, every=0.0)
    assert said[0] == "resuming: 3 of 4 shards already done"


def test_two_processes_do_not_index_one_folder(tmp_path):
    folder = pairs(tmp_path)
    with (folder / f"{shard_set.INDEX}.part").open("ab") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="wait"):
            index.build(folder, **silent)


def test_skipped_members_and_masked_pairs_are_counted(tmp_path):
    folder = pairs(tmp_path)
    files = {"z.png": image(1), "z.txt": b"\xff", "z.pkl": b"x", "z.cls": b"3"}
    write_tar(folder / "00004.tar", files)
    text = index.build(folder, **silent)
    assert "2 files left out, for example z.pkl: files of type .pkl are not read" in text
    assert "1 pair without usable text, to be masked, the first: " in text
    assert "z.txt: not UTF-8" in text


def test_a_folder_without_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no \.tar or \.parquet files"):
        index.build(tmp_path, **silent)
    with pytest.raises(DataError, match="no such folder"):
        index.build(tmp_path / "nowhere", **silent)


def test_nothing_but_the_index_is_written(tmp_path):
    folder = pairs(tmp_path)
    write_tar(folder / "00004.tar", {"e.png": image(1), "e.txt": b"x", "canary.pkl": b"cos\nx"})
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    index.build(folder, **silent)
    contents(read(folder))
    after = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert after.pop(folder / shard_set.INDEX)
    assert after == before


def test_a_shard_that_changes_while_it_is_read_is_not_indexed(tmp_path, monkeypatch):
    folder = pairs(tmp_path)

    def older(name, made):
        return dataclasses.replace(made, mtime_ns=made.mtime_ns - (name == "00002.tar"))

    scanned(monkeypatch, older)
    with pytest.raises(DataError, match=r"00002\.tar: changed while it was read"):
        index.build(folder, **silent)
