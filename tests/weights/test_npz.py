"""A weights file is never trusted: pickles, bombs, lies and wrong shapes end in a clear error."""

import io
import struct
import zipfile
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from vadapter.errors import CheckpointError
from vadapter.weights.name_mapping import assign
from vadapter.weights.npz import read_npz

MB = 2**20
_TENSORS = {
    "w": np.arange(6, dtype=np.float16).reshape(2, 3),
    "order": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(3, 2)),
    "steps": np.array(7),
    "empty": np.zeros((0, 4), np.float32),
}


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def _zip(path: Path, members: list[tuple[str, bytes]], compression=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_back_what_numpy_wrote(tmp_path, save):
    save(tmp_path / "a.npz", **_TENSORS)
    got = read_npz(tmp_path / "a.npz", max_bytes=MB)
    assert list(got) == list(_TENSORS)
    for name, tensor in _TENSORS.items():
        np.testing.assert_array_equal(got[name], tensor, strict=True)


def test_pickled_objects_are_never_loaded(tmp_path):
    fired = tmp_path / "fired"

    class Trap:
        def __reduce__(self):
            return fired.touch, ()

    np.savez(tmp_path / "a.npz", w=np.array([Trap()], dtype=object))
    with pytest.raises(CheckpointError, match=r"a\.npz.*'w\.npy' holds object"):
        read_npz(tmp_path / "a.npz", max_bytes=MB)
    assert not fired.exists()


@pytest.mark.parametrize(
    "array",
    [np.array(["text"]), np.zeros(2, [("a", "f4")]), np.zeros(2, ml_dtypes.bfloat16)],
    ids=["text", "record", "void"],
)
def test_anything_but_numbers_is_refused(tmp_path, array):
    path = _zip(tmp_path / "a.npz", [("w.npy", _npy(array))])
    with pytest.raises(CheckpointError, match="not numbers"):
        read_npz(path, max_bytes=MB)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", **{f"w{i}": np.zeros(MB) for i in range(3)})
    assert (tmp_path / "a.npz").stat().st_size < MB // 10
    with pytest.raises(CheckpointError, match="bytes decompressed, more than 16777216"):
        read_npz(tmp_path / "a.npz", max_bytes=16 * MB)


def test_a_directory_that_announces_too_little_is_refused(tmp_path):
    path = _zip(tmp_path / "a.npz", [("w.npy", _npy(np.zeros(MB)))])
    data = bytearray(path.read_bytes())
    true = struct.pack("<I", len(_npy(np.zeros(MB))))
    assert data.count(true) == 2  # local header and directory
    path.write_bytes(data.replace(true, struct.pack("<I", 1000)))
    with pytest.raises(CheckpointError, match=r"a\.npz"):
        read_npz(path, max_bytes=MB)


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(-2, -3)", "(5,)"])
def test_a_header_that_announces_another_size_is_refused(tmp_path, shape):
    body = _npy(np.zeros(6, np.float32))
    padded = body.replace(b"(6,), }", f"{shape}, }}".encode())
    header = padded[: -24 - 1].rstrip()[10:]  # keep the announced header length
    length = struct.unpack("<H", body[8:10])[0]
    forged = body[:10] + header.ljust(length - 1) + b"\n" + body[-24:]
    path = _zip(tmp_path / "a.npz", [("w.npy", forged)])
    with pytest.raises(CheckpointError, match="declares"):
        read_npz(path, max_bytes=MB)


def test_corrupt_archives_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, w=np.arange(1000.0))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[4000] ^= 1
    for data in (b"", b"not a zip", whole[:-500], whole[:100], bytes(flipped)):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.npz.*Download it again"):
            read_npz(path, max_bytes=MB)


def test_members_numpy_would_not_write_are_refused(tmp_path):
    array = _npy(np.zeros(3))
    path = tmp_path / "a.npz"
    with pytest.raises(CheckpointError, match="not an array"):
        read_npz(_zip(path, [("run.sh", b"echo")]), max_bytes=MB)
    with pytest.raises(CheckpointError, match="way that numpy does not write"):
        read_npz(_zip(path, [("w.npy", array)], zipfile.ZIP_LZMA), max_bytes=MB)
    with pytest.warns(UserWarning, match="Duplicate name"):
        _zip(path, [("w.npy", array), ("w.npy", array)])
    with pytest.raises(CheckpointError, match=r"\['w'\] more than once"):
        read_npz(path, max_bytes=MB)


def test_a_missing_file_says_where_and_what_to_set(tmp_path):
    with pytest.raises(CheckpointError, match=rf"'w\.npz' in {tmp_path}\..*VADAPTER_DATA"):
        read_npz(tmp_path / "w.npz", max_bytes=MB)
    with pytest.raises(CheckpointError, match="folder does not exist"):
        read_npz(tmp_path / "no" / "w.npz", max_bytes=MB)


_MODEL = {
    "first": {"kernel": jax.ShapeDtypeStruct((2, 3), np.float32)},
    "last": {"bias": jax.ShapeDtypeStruct((4,), np.float32)},
}
_TABLE = {"a.w": "first/kernel", "b.b": "last/bias"}
_FILE = {"a.w": np.ones((2, 3), np.float16), "b.b": np.arange(4, dtype=np.float32)}


def test_assign_fills_the_tree_and_widens_float16():
    params = assign(_MODEL, _FILE, _TABLE)
    assert jax.tree.structure(params) == jax.tree.structure(_MODEL)
    assert {p.dtype for p in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["first"]["kernel"], np.ones((2, 3)))
    np.testing.assert_array_equal(params["last"]["bias"], np.arange(4))


def test_assign_names_all_differences_together():
    tensors = {"a.w": np.ones((3, 2), np.float32), "c": np.ones(1), "d": np.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        assign(_MODEL, tensors, _TABLE)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The weights do not match the model: 0 parameters matched."
    assert lines[1:-1] == [
        "  missing: last/bias (in the file: b.b)",
        "  unexpected: c float64[1]",
        "  unexpected: d float64[2]",
        "  mismatched: first/kernel: model float32[2, 3], file float32[3, 2] (a.w)",
    ]


@pytest.mark.parametrize("dtype", [np.float64, np.int32, ml_dtypes.bfloat16])
def test_assign_casts_nothing_else(dtype):
    with pytest.raises(CheckpointError, match=r"mismatched: last/bias: model float32\[4\]"):
        assign(_MODEL, _FILE | {"b.b": np.zeros(4, dtype)}, _TABLE)


def test_assign_omits_only_the_listed_leaves():
    extra = _FILE | {"ema/decay": np.ones(())}
    assert jax.tree.structure(
        assign(_MODEL, extra, _TABLE, ignore=["ema/decay"])
    ) == jax.tree.structure(_MODEL)
    with pytest.raises(CheckpointError, match="unexpected: ema/decay"):
        assign(_MODEL, extra, _TABLE)
    with pytest.raises(CheckpointError, match=r"missing: last/bias .*not in the name table"):
        assign(_MODEL, _FILE, {"a.w": "first/kernel"})
    with pytest.raises(ValueError, match="several names"):
        assign(_MODEL, _FILE, {"a.w": "last/bias", "b.b": "last/bias"})
