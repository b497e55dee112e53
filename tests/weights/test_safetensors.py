"""A safetensors checkpoint is read by slices, and a hostile or broken one is refused by name."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pickle
import re
import shlex
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from support.paths import TESTS

from vadapter.errors import CheckpointError
from vadapter.weights.files import stamp
from vadapter.weights.safetensors import TensorFiles

MB = 2**20
_INDEX = "model.safetensors.index.json"
_A, _B = "a.safetensors", "b.safetensors"


def _entry(dtype: str, shape: list, start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file as its header says, or as it should never be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _sharded(folder: Path, shards: dict[str, list[str]], weight_map: object) -> Path:
    """A folder of shards with scalars of these names, and an index, right or wrong."""
    for file, names in shards.items():
        arrays = {name: np.array(i, np.float32) for i, name in enumerate(names)}
        safetensors.numpy.save_file(arrays, folder / file)
    (folder / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def _refused(path: Path, match: str) -> str:
    """Open what must be refused, in a moment (a second on a machine at rest); the message."""
    started = time.thread_time()  # whatever threads other tests have left behind
    with pytest.raises(CheckpointError, match=match) as caught:
        TensorFiles.open(path)
    assert time.thread_time() - started < 5
    return str(caught.value)


_ARRAYS = {
    "bool": np.array([[True, False, True]]),
    "i8": np.arange(-3, 3, dtype=np.int8),
    "u16": np.arange(6, dtype=np.uint16).reshape(2, 3),
    "i64": np.arange(6).reshape(1, 2, 3),
    "f16": np.linspace(0, 1, 8, dtype=np.float16).reshape(2, 2, 2),
    "f32": np.linspace(0, 1, 210, dtype=np.float32).reshape(7, 5, 3, 2),
    "f64": np.linspace(0, 1, 7),
    "bf16": np.linspace(0, 1, 30).astype(ml_dtypes.bfloat16).reshape(5, 6),
    "e4m3": np.linspace(0, 1, 6).astype(ml_dtypes.float8_e4m3fn).reshape(3, 2),
    "e5m2": np.linspace(0, 1, 6).astype(ml_dtypes.float8_e5m2).reshape(3, 2),
    "scalar": np.array(7, np.int32),
    "empty": np.zeros((3, 0, 2), np.float32),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> TensorFiles:
    safetensors.numpy.save_file(_ARRAYS, tmp_path / "model.safetensors", {"format": "pt"})
    return TensorFiles.open(tmp_path)


def test_lists_and_reads_what_safetensors_wrote(checkpoint):
    assert checkpoint.tensors.keys() == _ARRAYS.keys()
    for name, array in _ARRAYS.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.dtype) == (array.shape, array.dtype)
        assert info.file == checkpoint.path / "model.safetensors"
        np.testing.assert_array_equal(checkpoint.read(name), array, strict=True)


@pytest.mark.parametrize("block", [1, 16, 100, MB], ids="block{}".format)
def test_a_slice_is_what_numpy_would_slice(checkpoint, block):
    checkpoint = dataclasses.replace(checkpoint, block=block)
    dice = np.random.default_rng(0)
    for name, array in _ARRAYS.items():
        for _ in range(20):
            axes = dice.integers(array.ndim + 1)
            picks = dice.integers(-9, 9, (axes, 2))
            index = tuple(slice(*p) if p[0] > -5 else slice(None) for p in picks.tolist())
            got = checkpoint.read(name, index)
            np.testing.assert_array_equal(got, array[index], strict=True)
            assert got.flags.writeable
            assert got.flags.owndata


@pytest.mark.parametrize("size", [1, 30, MB], ids="size{}".format)
def test_blocks_are_the_rows_of_a_slice_in_order_and_no_larger_than_asked(checkpoint, size):
    dice = np.random.default_rng(1)
    for name, array in _ARRAYS.items():
        for _ in range(10 * bool(array.ndim)):
            picks = np.sort(dice.integers(0, 9, (dice.integers(array.ndim + 1), 2)), axis=1)
            index = tuple(slice(*pick) for pick in picks.tolist())
            blocks = [block.copy() for block in checkpoint.blocks(name, index, size)]
            got = np.concatenate([array[index][:0], *blocks])
            np.testing.assert_array_equal(got, array[index], strict=True)
            assert all(len(block) == 1 or block.nbytes <= size for block in blocks)


def test_a_block_with_a_number_that_is_none_is_refused_by_the_name_of_its_tensor(tmp_path):
    tensor = np.ones((64, 8), np.float32)
    tensor[50, 3] = np.nan
    safetensors.numpy.save_file({"w": tensor}, tmp_path / "model.safetensors")
    blocks = TensorFiles.open(tmp_path).blocks("w", (), 256)
    with pytest.raises(CheckpointError, match="'w' holds numbers that are infinite or no numbers"):
        list(blocks)


@pytest.mark.parametrize("index", [(slice(0, 6, 2),), (slice(None, None, -1),), (slice(1),) * 2])
def test_other_indices_than_slices_of_step_one_are_errors_of_the_caller(checkpoint, index):
    with pytest.raises(ValueError, match="one slice of step 1 for each axis"):
        checkpoint.read("i8", index)


def test_a_missing_name_is_reported(checkpoint):
    with pytest.raises(CheckpointError, match=r"holds no tensor 'f23'\. Use"):
        checkpoint.read("f23")


def test_a_slice_of_a_tensor_larger_than_memory_costs_only_the_slice(tmp_path):
    rows, width = 2**22, 2**16  # 256 GiB of bytes, none of them on the disk
    path = tmp_path / "model.safetensors"
    _raw(path, {"w": _entry("U8", [rows, width], 0, rows * width)})
    start = path.stat().st_size
    os.truncate(path, start + rows * width)
    with path.open("r+b") as f:
        f.seek(start + (rows - 1) * width + 3)
        f.write(b"\x05")
    files = TensorFiles.open(path)
    started = time.thread_time()
    last = files.read("w", (slice(rows - 1, rows),))
    assert (last.shape, last[0, 3], last.sum()) == ((1, width), 5, 5)
    column = files.read("w", (slice(rows - 300, None), slice(3, 4)))
    assert (column.shape, column[-1, 0], column.sum()) == ((300, 1), 5, 5)
    assert time.thread_time() - started < 5


# Linux tells a process of its own peak. ru_maxrss would start from that of the parent.
_GROWTH = """
import pathlib, re, sys
from vadapter.weights.safetensors import TensorFiles
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
files = TensorFiles.open(pathlib.Path(sys.argv[1]))
before = peak()
for name, info in files.tensors.items():
    rows, columns = info.shape
    assert files.read(name, (slice(rows // 4, rows // 2),)).shape == (rows // 4, columns)
    assert files.read(name, (slice(None), slice(columns // 16))).shape == (rows, columns // 16)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_does_not_grow_with_what_was_read(tmp_path):
    path, size = tmp_path / "model.safetensors", 52 * MB
    _raw(path, {f"w{i}": _entry("F32", [3328, 4096], i * size, (i + 1) * size) for i in range(4)})
    with path.open("ab") as f:
        for i in range(4):
            f.write(bytes([i]) * size)
    done = subprocess.run(
        [sys.executable, "-c", _GROWTH, str(path)], capture_output=True, text=True, check=True
    )
    # At most a slice of 13 MB, or one of 3 MB and a block of rows of 16 MB; the file has 208 MB.
    assert int(done.stdout) * 1024 < 40 * MB


def test_shards_are_joined_by_the_index(tmp_path):
    shards = {"model-1-of-2.safetensors": ["a", "b"], "model-2-of-2.safetensors": ["c"]}
    weight_map = {name: file for file, names in shards.items() for name in names}
    _sharded(tmp_path, shards, weight_map)
    _raw(tmp_path / "consolidated.safetensors", b"not looked at")
    files = TensorFiles.open(tmp_path)
    assert {name: info.file.name for name, info in files.tensors.items()} == weight_map
    assert [files.read(name) for name in "abc"] == [0, 1, 0]


def test_one_file_is_found_by_path_under_any_name_or_through_links(tmp_path):
    blob, folder = tmp_path / "blobs" / "0a1b", tmp_path / "snapshot"
    blob.parent.mkdir()
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones(2)}, blob)
    (folder / "open_clip_model.safetensors").symlink_to("../blobs/0a1b")  # as in the hub's cache
    for path in (blob, folder, folder / "open_clip_model.safetensors"):
        np.testing.assert_array_equal(TensorFiles.open(path).read("w"), np.ones(2), strict=True)


def test_model_safetensors_is_taken_from_among_others(tmp_path):
    for name in ("adapter.safetensors", "model.safetensors"):
        safetensors.numpy.save_file({name: np.ones(1)}, tmp_path / name)
    assert list(TensorFiles.open(tmp_path).tensors) == ["model.safetensors"]


def test_digest_is_the_sha256_of_the_files_in_order(tmp_path):
    _sharded(tmp_path, {_B: ["z"], _A: ["x", "y"]}, {"z": _B, "x": _A, "y": _A})
    whole = (tmp_path / _A).read_bytes() + (tmp_path / _B).read_bytes()
    assert TensorFiles.open(tmp_path).digest() == hashlib.sha256(whole).hexdigest()


_GOOD = _entry("F32", [2], 0, 8)
_SAME = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_MANY = [f'"{i}":{json.dumps(_entry("U8", [1], i, i + 1))}' for i in range(20_000)]


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        pytest.param({"a": _GOOD}, b"1234", "truncated or corrupt", id="truncated"),
        pytest.param({"a": _GOOD}, b"1" * 9, "truncated or corrupt", id="trailing"),
        pytest.param(
            {"a": _GOOD, "b": _entry("F32", [2], 4, 12)}, b"1" * 12, "tensor `b`", id="overlap"
        ),
        pytest.param(
            {"a": _GOOD, "b": _entry("F32", [2], 12, 20)}, b"1" * 20, "tensor `b`", id="hole"
        ),
        pytest.param({"a": _GOOD, "b": _GOOD}, b"1" * 8, "invalid offset", id="shared bytes"),
        pytest.param(
            {"a": _entry("F32", [0], 8, 4), "b": _GOOD}, b"1" * 8, "tensor `a`", id="backwards"
        ),
        pytest.param(
            {"a": _entry("F32", [2**40, 2**40], 0, 8)}, b"1" * 8, "overflow", id="huge shape"
        ),
        pytest.param(
            {"a": _entry("F32", [10**12], 0, 8)}, b"1" * 8, "truncated or corrupt", id="too large"
        ),
        pytest.param(
            {"a": _entry("F32", [2**62, 0], 0, 0)}, b"", "'a' has an invalid", id="huge and empty"
        ),
        pytest.param(
            {"a": _entry("F32", [1] * 65, 0, 4)}, b"1234", "'a' has an invalid", id="65 axes"
        ),
        pytest.param({"a": _entry("F32", [-2], 0, 8)}, b"1" * 8, "corrupt", id="negative"),
        pytest.param({"a": _entry("F32", [2.0], 0, 8)}, b"1" * 8, "corrupt", id="fraction"),
        pytest.param({"a": _entry("F4", [4], 0, 2)}, b"12", "'a' has dtype", id="sub-byte dtype"),
        pytest.param({"a": _entry("OBJ", [4], 0, 2)}, b"12", "unknown variant", id="other dtype"),
        pytest.param(
            b'{"a":' + _SAME + b',"a":' + _SAME + b"}",
            b"1234",
            "names 'a' more than once",
            id="twice",
        ),
        pytest.param(
            b'{"a":{"dtype":"I8","shape":[9],"data_offsets":[7,16]},"a":' + _SAME + b"}",
            b"1234",
            "names 'a' more than once",
            id="twice, one a lie",
        ),
        pytest.param(
            f"{{{','.join([*_MANY, _MANY[7]])}}}".encode(),
            b"1" * 20_000,
            "names '7' more than once",
            id="twice among many",
        ),
        pytest.param(b'{"a":', b"", "corrupt", id="no JSON"),
        pytest.param(b"[" * 100_000, b"", "corrupt", id="nested"),
        pytest.param(b'{"\xff":' + _SAME + b"}", b"1234", "corrupt", id="not UTF-8"),
        pytest.param(b"[]", b"", "corrupt", id="a list"),
        pytest.param(b"", b"", "corrupt", id="no header"),
        pytest.param({}, b"", "holds no tensors", id="no tensors"),
        pytest.param(
            {"x" * MB: _entry("F4", [4], 0, 2)}, b"12", "tensor 'xxx", id="a name of a megabyte"
        ),
        pytest.param(
            {"\x1b[2J": _entry("F32", [1], 4, 8)}, b"1" * 8, r"`\?\[2J`", id="control characters"
        ),
        pytest.param(b" " * 5 * MB, b"", "declares a header of 5242880 bytes", id="large header"),
    ],
)
def test_a_file_that_is_not_what_its_header_says_is_refused(tmp_path, header, data, match):
    path = _raw(tmp_path / "model.safetensors", header, data)
    for opened in (path, tmp_path):
        message = _refused(opened, match)
        assert message.startswith(f"Cannot read the weights {path}: ")
        assert message.endswith("Download it again, or set another path.")
        assert message.isprintable()
        assert len(message) < len(str(path)) + 500


@pytest.mark.parametrize("length", [40, 100 * MB, 2**63, 2**64 - 1])
def test_an_absurd_header_length_is_refused(tmp_path, length):
    path = _raw(tmp_path / "model.safetensors", b"{}", length=length)
    _refused(path, f"model.safetensors: it declares a header of {length} bytes, but the file has")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "it has 0 bytes"),
        (b"abc", "it has 3 bytes"),
        (b"not a safetensors file", "declares a header of"),
        (b"\n<!DOCTYPE html><html>log in", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run `git lfs pull`"),
        (b"PK\x03\x04" + bytes(4) + b"\xff" * 20, "it is a zip archive"),
        (pickle.dumps({"w": [1.0] * 9}), "it is a pickle, which is never loaded"),
    ],
    ids=["empty", "tiny", "text", "html", "lfs", "zip", "pickle"],
)
def test_another_kind_of_file_is_named(tmp_path, data, match):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    _refused(path, rf"model\.safetensors: .*{match}")


_SHARDS = {_A: ["x", "y"], _B: ["z"]}
_MAP = {"x": _A, "y": _A, "z": _B}


@pytest.mark.parametrize(
    ("shards", "weight_map", "blamed", "match"),
    [
        ({_A: ["x", "y"]}, _MAP, _INDEX, r"1 of its 2 shards .*\['b\.safetensors'\].*not complete"),
        (_SHARDS, _MAP | {"w": _B}, _B, "lacks tensor 'w'"),
        (_SHARDS, {"x": _A, "z": _B}, _A, "holds tensor 'y'"),
        ({_A: ["x", "y"], _B: ["y", "z"]}, _MAP, _B, "holds tensor 'y'"),
        (_SHARDS, _MAP | {"y": _B}, _A, "holds tensor 'y'"),
        (_SHARDS, _MAP | {"w": "../w.safetensors"}, _INDEX, r"names '\.\./w\.safetensors'"),
        (_SHARDS, _MAP | {"w": "/etc/w.safetensors"}, _INDEX, "not the name of a shard"),
        (_SHARDS, _MAP | {"w": "..\\w.safetensors"}, _INDEX, "not the name of a shard"),
        (_SHARDS, _MAP | {"w": "pytorch_model.bin"}, _INDEX, "not the name of a shard"),
        (_SHARDS, _MAP | {"w": "..", "v": ""}, _INDEX, "not the name of a shard"),
        (_SHARDS, _MAP | {"w": 3}, _INDEX, "names 3, which is not"),
        (_SHARDS, _MAP | {"w": [_A]}, _INDEX, "not the name of a shard"),
        (_SHARDS, _MAP | {"w": "\0.safetensors"}, _INDEX, "1 of its 3 shards"),
        (_SHARDS, _MAP | {"w": "x" * 5000 + ".safetensors"}, _INDEX, "Errno|shards are not"),
        (_SHARDS, {}, _INDEX, "no weight_map"),
        (_SHARDS, [_A], _INDEX, "no weight_map"),
        (
            _SHARDS | {"model.safetensors": ["x"]},
            _MAP,
            _INDEX,
            "model.safetensors is in its",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(
    tmp_path, shards, weight_map, blamed, match
):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    safetensors.numpy.save_file({"w": np.ones(1)}, tmp_path / "w.safetensors")  # "../w" is there
    message = _refused(_sharded(folder, shards, weight_map), match)
    assert message.startswith(f"Cannot read the weights {folder / blamed}: ")
    assert len(message) < len(str(folder)) + 500


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Expecting value"),
        ("[1]", "not a JSON object"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x' more than once"),
        ("[" * 200_000, "recursion"),
        ("<html>", "HTML page"),
        ("9" * 5000, "digits"),
        (" " * 17 * MB, "more than 16777216"),
    ],
    ids=["empty", "list", "twice", "nested", "html", "digits", "large"],
)
def test_an_index_that_is_no_index_is_refused(tmp_path, text, match):
    _sharded(tmp_path, _SHARDS, _MAP)
    (tmp_path / _INDEX).write_text(text)
    assert str(tmp_path / _INDEX) in _refused(tmp_path, match)


def test_a_folder_that_does_not_say_which_file_is_refused(tmp_path):
    _refused(tmp_path / "no", r"'no' in .*VADAPTER_DATA")
    _refused(tmp_path, "holds neither model.safetensors nor model.safetensors.index.json")
    os.mkfifo(tmp_path / "model.safetensors")  # reading it would never end
    _refused(tmp_path, "holds neither")
    for name in ("model-1-of-2.safetensors", "model-2-of-2.safetensors"):
        safetensors.numpy.save_file({name: np.ones(1)}, tmp_path / name)
    _refused(tmp_path, rf"2 \.safetensors files \(model-1-of-2.*no {_INDEX}.*or name one")


def test_a_boolean_that_is_neither_0_nor_1_is_refused(tmp_path):
    path = _raw(tmp_path / "a.safetensors", {"b": _entry("BOOL", [3], 0, 3)}, b"\1\0\2")
    files = TensorFiles.open(path)
    np.testing.assert_array_equal(files.read("b", (slice(2),)), [True, False])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor 'b' of booleans"):
        files.read("b")


def test_a_file_that_changes_after_it_was_opened_is_refused(checkpoint):
    path = checkpoint.path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    for use in (lambda: checkpoint.read("f32"), checkpoint.digest):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: it has changed"):
            use()
    with path.open("rb") as f:  # cut in the moment between the check and the reading
        cut = dataclasses.replace(checkpoint, files={path: stamp(f)})
    last = max(cut.tensors, key=lambda name: cut.tensors[name].start)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it ends within a tensor"):
        cut.read(last)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoint.read("f32")


class _Trap:
    def __init__(self, fired: Path):
        self.fired = fired

    def __reduce__(self):
        return Path.touch, (self.fired,)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[str]]:
    """The paths that Python opens meanwhile, by whatever means."""
    seen, watching = [], True

    def hook(event: str, args: tuple) -> None:  # stays for good
        if watching and event == "open":
            seen.append(str(args[0]))

    sys.addaudithook(hook)
    yield seen
    watching = False


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", ""),
        ("pytorch_model-00001-of-00002.bin", ""),
        ("model.pt", ""),
        ("last.ckpt", ""),
        ("flax_model.msgpack", ", from_flax=True"),
        ("tf_model.h5", ", from_tf=True"),
    ],
)
def test_pickles_are_refused_unopened_with_the_command_to_convert_them(
    tmp_path, opened, name, told
):
    folder, fired = tmp_path / "a model's folder", tmp_path / "fired"
    folder.mkdir()
    trap = folder / name
    trap.write_bytes(pickle.dumps(_Trap(fired)))
    opened.clear()
    for path in (folder, trap):
        message = _refused(path, re.escape(f"{trap} are not loaded"))
        command = shlex.split(message.splitlines()[1])
        assert command[:2] == ["python", "-c"]
        assert command[3:] == [str(folder), f"{folder}-safetensors"]
        compile(command[2], "command", "exec")
        assert f"from_pretrained(a{told}).save_pretrained(b, safe_serialization=True" in command[2]
    assert str(trap) not in opened
    assert not fired.exists()
    pickle.loads(trap.read_bytes())  # the trap is one, and opening it would have been seen
    assert str(trap) in opened
    assert fired.exists()


def test_of_several_foreign_files_the_command_reads_those_of_torch(tmp_path):
    for name in ("flax_model.msgpack", "pytorch_model.bin", "tf_model.h5"):
        (tmp_path / name).touch()
    assert "from_pretrained(a)." in _refused(tmp_path, r"pytorch_model\.bin are not loaded")


def test_pickles_beside_safetensors_are_left_alone(checkpoint):
    (checkpoint.path / "training_args.bin").write_bytes(b"\x80")
    assert TensorFiles.open(checkpoint.path).tensors == checkpoint.tensors


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))),
    reason="the command needs torch and transformers",
)
def test_the_command_converts_every_tensor(tmp_path):
    folder = tmp_path / "a model"
    build = (
        "import sys, torch, transformers as t\n"
        "m = t.LlamaForCausalLM(t.LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8,\n"
        "    num_hidden_layers=1, num_attention_heads=2, architectures=['LlamaForCausalLM']))\n"
        "m.config.save_pretrained(sys.argv[1])\n"
        "torch.save(m.state_dict(), sys.argv[1] + '/pytorch_model.bin')\n"
        "print(*m.state_dict())\n"
    )
    start = "from support import original\noriginal.declare_operators()\n"
    (tmp_path / "sitecustomize.py").write_text(start)
    path = f"{tmp_path}{os.pathsep}{TESTS}"
    run = {"capture_output": True, "text": True, "check": True,
           "env": {**os.environ, "PYTHONPATH": path}}  # fmt: skip
    names = subprocess.run([sys.executable, "-c", build, str(folder)], **run).stdout.split()
    command = shlex.split(_refused(folder, "are not loaded").splitlines()[1])
    subprocess.run([sys.executable, *command[1:]], **run)
    files = TensorFiles.open(Path(f"{folder}-safetensors"))
    assert sorted(files.tensors) == sorted(names)
    assert "lm_head.weight" in files.tensors
