"""Tar shards: every byte back, nothing extracted, nothing hostile indexed, damage named."""

import io
import os
import pickle
import tarfile
import warnings

import pytest
from support.image_files import spoil_header, write_tar
from support.threads import run_in_threads

from vadapter.data.shards import tar
from vadapter.errors import DataError

SUFFIXES = {".jpg", ".txt"}


def content(count: int = 20) -> dict[str, bytes]:
    return {f"{i}.jpg": bytes([i]) * (i * 97) for i in range(count)}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_members_are_read_in_any_order(tmp_path, format):
    files = content()
    if format != tarfile.USTAR_FORMAT:
        files["d/" * 120 + "größe.jpg"] = b"long"
    index = tar.scan(write_tar(tmp_path / "a.tar", files, format=format), SUFFIXES)
    assert list(index.members) == list(files)
    assert not index.skipped
    for name in reversed(files):
        assert index.read(name) == files[name]


def test_a_pickled_index_reads_without_scanning_again(tmp_path):
    path = write_tar(tmp_path / "a.tar", content())
    copied = pickle.loads(pickle.dumps(tar.scan(path, SUFFIXES)))
    spoil_header(path)
    with pytest.raises(DataError, match="not a readable tar file"):
        tar.scan(path, SUFFIXES)
    assert copied.read("7.jpg") == content()["7.jpg"]


def test_threads_read_the_right_bytes_from_one_handle(tmp_path):
    files = content(50)
    index = tar.scan(write_tar(tmp_path / "a.tar", files), SUFFIXES)
    wrong = []

    def read(start):
        for i in range(200):
            name = f"{(start * 7 + i) % 50}.jpg"
            if index.read(name) != files[name]:
                wrong.append(name)

    run_in_threads(read, 8)
    assert not wrong


def test_a_forked_child_reads_the_right_bytes(tmp_path):
    index = tar.scan(write_tar(tmp_path / "a.tar", content()), SUFFIXES)
    index.read("3.jpg")  # the handle is open before the fork
    out, back = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside jax's threads: the child only reads
        child = os.fork()
    if not child:
        os.write(back, index.read("5.jpg"))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(out, 1000) == content()["5.jpg"]
    os.close(out)
    os.close(back)


def test_more_shards_than_open_files_are_readable(tmp_path):
    count = tar._handle.cache_info().maxsize + 20
    indexes = [
        tar.scan(write_tar(tmp_path / f"{i}.tar", {"a.txt": b"%d" % i}), SUFFIXES)
        for i in range(count)
    ]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [index.read("a.txt") for index in indexes] == [b"%d" % i for i in range(count)]
    assert len(os.listdir("/proc/self/fd")) - before <= tar._handle.cache_info().maxsize


def test_hostile_members_are_left_out_with_the_reason_and_nothing_is_written(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "a.tar"
    kinds = {
        "symlink.jpg": tarfile.SYMTYPE,
        "hardlink.jpg": tarfile.LNKTYPE,
        "fifo.jpg": tarfile.FIFOTYPE,
        "device.jpg": tarfile.CHRTYPE,
        "sparse.jpg": tarfile.GNUTYPE_SPARSE,
    }
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in (
            *("../escape.jpg", "a/../../escape.jpg", "/etc/escape.jpg"),
            *("canary.pkl", "big.jpg", "line\nbreak.jpg", "none"),
        ):
            info = tarfile.TarInfo(name)
            info.size = 2000 if name == "big.jpg" else 3
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("good.jpg")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"good"))
    index = tar.scan(path, SUFFIXES, max_bytes=1000)
    assert list(index.members) == ["good.jpg"]
    assert index.read("good.jpg") == b"good"
    assert len(index.skipped) == 12
    assert all("regular" in index.skipped[name] for name in kinds)
    assert "climbs out" in index.skipped["../escape.jpg"]
    assert ".pkl" in index.skipped["canary.pkl"]
    assert "2000 bytes" in index.skipped["big.jpg"]
    assert sorted(tmp_path.rglob("*")) == [folder, path]


def test_names_that_are_not_utf8_are_left_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", {"xyz.jpg": b"1", "good.jpg": b"2"})
    raw = bytearray(path.read_bytes())
    info = tarfile.TarInfo("xyz.jpg")
    info.size = 1
    raw[:3] = b"\xff\xfe\xfd"
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    path.write_bytes(raw)
    index = tar.scan(path, SUFFIXES)
    assert list(index.members) == ["good.jpg"]
    assert len(index.skipped) == 1


def damage(raw: bytes, kind: str) -> bytes:
    match kind:
        case "inside a member":
            return raw[: 512 + 100]
        case "between members":  # a valid archive but for the missing end
            return raw[:1024]
        case "inside a header":
            return raw[: 1024 + 60]
        case "flipped header":
            return raw[:1030] + bytes([raw[1030] ^ 1]) + raw[1031:]
        case "two archives":
            return raw + raw
        case "no archive":
            return b"<html>404</html>" * 100
        case "empty":
            return b""
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    ["inside a member", "between members", "inside a header", "flipped header", "two archives",
     "no archive", "empty"],
)  # fmt: skip
def test_a_corrupt_archive_is_an_error_that_names_it(tmp_path, kind):
    path = write_tar(tmp_path / "a.tar", {f"{i}.jpg": b"x" * 300 for i in range(4)})
    path.write_bytes(damage(path.read_bytes(), kind))
    with pytest.raises(DataError, match=r"a\.tar"):
        tar.scan(path, SUFFIXES)


def test_a_compressed_archive_is_refused_with_the_remedy(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="decompress"):
        tar.scan(tmp_path / "a.tar", SUFFIXES)


def test_chained_long_names_end_in_an_error_not_a_crash(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1
    (tmp_path / "a.tar").write_bytes((info.tobuf(tarfile.GNU_FORMAT) + bytes(512)) * 5000)
    with pytest.raises(DataError, match=r"a\.tar"):
        tar.scan(tmp_path / "a.tar", SUFFIXES)


def test_a_member_that_claims_more_than_the_file_holds_is_an_error(tmp_path):
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"a\.tar"):
        tar.scan(tmp_path / "a.tar", SUFFIXES)


def test_a_name_twice_is_an_error(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.jpg"))
    with pytest.raises(DataError, match="twice"):
        tar.scan(path, SUFFIXES)


def test_a_fifo_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(DataError, match="no such file"):
        tar.scan(tmp_path / "a.tar", SUFFIXES)


@pytest.mark.parametrize("opened", [False, True])
def test_a_shard_that_changes_after_indexing_is_noticed(tmp_path, opened):
    path = write_tar(tmp_path / "a.tar", content())
    index = tar.scan(path, SUFFIXES)
    if opened:
        index.read("3.jpg")
    write_tar(path, content(25))
    with pytest.raises(DataError, match="changed"):
        index.read("3.jpg")


def test_a_missing_shard_is_an_error_that_names_it(tmp_path):
    index = tar.scan(write_tar(tmp_path / "a.tar", content()), SUFFIXES)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(DataError, match=r"a\.tar.*restore"):
        index.read("3.jpg")
