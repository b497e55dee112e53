"""Zip archives in place: every byte as it was, and what is unsafe or damaged is named."""

import io
import os
import pickle
import random
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import pytest
from support.threads import run_in_threads

from vadapter.data.shards import zips
from vadapter.errors import DataError

SUFFIXES = {".jpg", ".json"}


def write(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_as_they_were(method, tmp_path):
    random.seed(0)
    files = {f"val/{n}.jpg": random.randbytes(n * 997) for n in range(20)}
    index = zips.scan(write(tmp_path / "a.zip", files, method), SUFFIXES)
    assert list(index.members) == list(files)
    for name, data in reversed(files.items()):
        assert index.shard.read(name) == data


def test_streamed_members_are_read_too(tmp_path):
    """Written to a pipe, a member's sizes stand behind it and not in its header."""

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.data = b""

        def writable(self):
            return True

        def write(self, data):
            self.data += bytes(data)
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:  # type: ignore
        archive.writestr("a.jpg", b"x" * 5000)
    (tmp_path / "a.zip").write_bytes(pipe.data)
    index = zips.scan(tmp_path / "a.zip", SUFFIXES)
    assert index.shard.read("a.jpg") == b"x" * 5000


def test_unsupported_names_types_and_methods_are_reported(tmp_path):
    path = write(
        tmp_path / "a.zip",
        {"../a.jpg": b"1", "/b.jpg": b"2", "c.exe": b"3", "big.jpg": b"4" * 100, "ok.jpg": b"5"},
    )
    with zipfile.ZipFile(path, "a", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("d.jpg", b"6")
        archive.mkdir("folder")
    index = zips.scan(path, SUFFIXES, max_bytes=99)
    assert list(index.members) == ["ok.jpg"]
    assert "climbs" in index.skipped["../a.jpg"]
    assert "climbs" in index.skipped["/b.jpg"]
    assert ".exe" in index.skipped["c.exe"]
    assert "method 12" in index.skipped["d.jpg"]
    assert "100 bytes" in index.skipped["big.jpg"]


def test_encrypted_members_are_left_out(tmp_path):
    path = write(tmp_path / "a.zip", {"a.jpg": b"1"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag, in the directory
    path.write_bytes(data)
    assert zips.scan(path, SUFFIXES).skipped == {"a.jpg": "encrypted"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_byte_is_noticed(method, tmp_path):
    data = random.Random(0).randbytes(4000)
    path = write(tmp_path / "a.zip", {"a.jpg": data}, method)
    torn = bytearray(path.read_bytes())
    torn[2000] ^= 0xFF
    path.write_bytes(torn)
    index = zips.scan(path, SUFFIXES)
    with pytest.raises(DataError, match=r"a\.zip: member 'a\.jpg' is corrupt"):
        index.shard.read("a.jpg")


def test_a_member_that_grows_beyond_its_size_is_not_unpacked(tmp_path):
    path = write(tmp_path / "a.zip", {"a.jpg": b"\0" * (64 << 20)})
    data = bytearray(path.read_bytes())
    size = data.index(b"PK\x01\x02") + 24  # the size of the content, in the directory
    data[size : size + 4] = (10).to_bytes(4, "little")
    path.write_bytes(data)
    index = zips.scan(path, SUFFIXES)
    assert index.members["a.jpg"][2] == 10
    tracemalloc.start()
    with pytest.raises(DataError, match=r"member 'a\.jpg' is corrupt"):
        index.shard.read("a.jpg")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_foreign_and_truncated_archives_are_refused(tmp_path):
    path = write(tmp_path / "a.zip", {"a.jpg": b"1" * 1000})
    whole = path.read_bytes()
    for data in (b"", b"<html>", whole[:50], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.zip: not a readable zip"):
            zips.scan(path, SUFFIXES)
    with pytest.raises(DataError, match="not a readable zip"):
        zips.scan(tmp_path / "none.zip", SUFFIXES)


def test_an_archive_that_changed_is_refused(tmp_path):
    path = write(tmp_path / "a.zip", {"a.jpg": b"1" * 1000})
    index = zips.scan(path, SUFFIXES)
    write(path, {"b.jpg": b"2" * 3000})
    with pytest.raises(DataError, match="changed since it was indexed"):
        index.shard.read("a.jpg")


def test_a_missing_archive_is_named(tmp_path):
    index = zips.scan(write(tmp_path / "a.zip", {"a.jpg": b"1"}), SUFFIXES)
    (tmp_path / "a.zip").unlink()
    with pytest.raises(DataError, match=r"a\.zip: cannot be read"):
        index.shard.read("a.jpg")


def test_threads_and_pickled_copies_read_the_right_bytes(tmp_path):
    files = {f"{i}.jpg": bytes([i]) * (i * 997) for i in range(50)}
    index = pickle.loads(pickle.dumps(zips.scan(write(tmp_path / "a.zip", files), SUFFIXES)))
    wrong = []

    def read(start: int) -> None:
        for i in range(200):
            name = f"{(start * 7 + i) % 50}.jpg"
            if index.shard.read(name) != files[name]:
                wrong.append(name)

    run_in_threads(read, 8)
    assert not wrong


def test_a_forked_child_reads_the_right_bytes(tmp_path):
    index = zips.scan(write(tmp_path / "a.zip", {"a.jpg": b"a" * 99, "b.jpg": b"b" * 99}), SUFFIXES)
    index.shard.read("a.jpg")  # the archive is open before the fork
    out, back = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside jax's threads: the child only reads
        child = os.fork()
    if not child:
        os.write(back, index.shard.read("b.jpg"))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(out, 1000) == b"b" * 99
    os.close(out)
    os.close(back)
