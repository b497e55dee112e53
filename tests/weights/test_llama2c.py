"""llama2.c's files: a real model says what it said there, generated ones what numpy computes."""

import dataclasses
import json
import os
import pickle
import struct

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.public_models import Counting, read_checkpoint, write_model

from vadapter.data.tokenizers.pretrained import PretrainedTokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.generate import Decode, decode
from vadapter.models.registry import make_module
from vadapter.stages.outline import abstract
from vadapter.weights import llama2c
from vadapter.weights.hf_checkpoint import Checkpoint

KINDS = ("norm_attn", "q", "k", "v", "o", "norm_mlp", "gate", "down", "up")


@dataclasses.dataclass(frozen=True)
class Sizes:
    dim: int = 24
    hidden: int = 20
    layers: int = 3
    heads: int = 4
    kv: int = 2
    vocab: int = 31  # below 0: a head of its own
    seq: int = 16


def generate(sizes=Sizes()):
    """Random tensors by our own short names, in the order of the file."""
    s, rng = sizes, np.random.default_rng(0)
    d, h, k, n = s.dim, s.hidden, s.dim // s.heads * s.kv, abs(s.vocab)
    inside = {"norm_attn": [d], "q": [d, d], "k": [k, d], "v": [k, d], "o": [d, d],
              "norm_mlp": [d], "gate": [h, d], "down": [d, h], "up": [h, d]}  # fmt: skip
    shapes = {"embedding": [n, d], **{kind: [s.layers, *inside[kind]] for kind in KINDS}}
    shapes |= {"norm": [d], "cos": [s.seq, d // s.heads // 2], "sin": [s.seq, d // s.heads // 2]}
    shapes |= {"head": [n, d]} if s.vocab < 0 else {}
    draw = lambda name: rng.standard_normal(shapes[name]) * 0.4 + ("norm" in name)  # noqa: E731
    return {name: draw(name).astype("<f4") for name in shapes}


def write(folder, sizes=Sizes(), tensors=None):
    """A folder with the model and, beside it, a tokenizer that is not to be taken for it."""
    tensors = generate(sizes) if tensors is None else tensors
    head = struct.pack("<7i", *dataclasses.astuple(sizes))
    (folder / "model.bin").write_bytes(head + b"".join(t.tobytes() for t in tensors.values()))
    (folder / "tokenizer.bin").write_bytes(b"pieces")
    return folder


def forward(tensors, sizes, ids):
    """Logits f64[T, V] as run.c computes them: a position at a time, each pair of an even and an
    odd number turned by its angle."""
    t = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    K, group, count = sizes.dim // sizes.heads, sizes.heads // sizes.kv, len(ids)
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * w  # noqa: E731
    angle = np.arange(count)[:, None] / 1e4 ** (np.arange(0, K, 2) / K)

    def turned(x):
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    x = t["embedding"][ids]
    for i in range(sizes.layers):
        w = {kind: t[kind][i] for kind in KINDS}
        h = rms(x, w["norm_attn"])
        q, k, v = ((h @ w[n].T).reshape(count, -1, K) for n in "qkv")
        q, k = turned(q), turned(k)
        y = np.zeros_like(q)
        for a in range(count):
            for head in range(sizes.heads):
                scores = k[: a + 1, head // group] @ q[a, head] / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                y[a, head] = weights / weights.sum() @ v[: a + 1, head // group]
        x = x + y.reshape(count, -1) @ w["o"].T
        h = rms(x, w["norm_mlp"])
        gate = h @ w["gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"].T)) @ w["down"].T
    return rms(x, t["norm"]) @ t.get("head", t["embedding"]).T


def load(folder):
    checkpoint = Checkpoint.open(folder)
    module = make_module("llm", checkpoint.spec)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    return module, params, report


def continued(module, params, ids, count):
    """The ids that cached greedy decoding adds."""
    ids = np.asarray(ids, np.int32)[None]
    batch = {"prompt": np.zeros((1, 0), np.int32), "tokens": ids, "segments": np.ones_like(ids),
             "positions": np.arange(ids.size, dtype=np.int32)[None]}  # fmt: skip
    lm = AdapterModel({"llm": module}, lm="llm")
    return jax.jit(lambda p, b: decode(lm, p, b, Decode(count))["tokens"])({"llm": params}, batch)[
        0
    ]


# -- the real one ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories(data_root):
    """(folder, module, params, golden ids and logits)."""
    folder = data_root / "weights" / "stories260k"
    module, params, report = load(folder)
    assert report.parameters == 260_032
    assert set(report.unused) == {"freqs_cos", "freqs_sin"}
    return folder, module, params, np.load(folder / "golden_greedy.npz")


@pytest.mark.data
def test_logits_of_stories260k_are_its_goldens(stories):
    _, module, params, golden = stories
    logits = jax.jit(module.apply)({"params": params}, golden["tokens"][None, :32])[0]
    assert np.abs(golden["logits_first32"]).max() > 20
    assert np.abs(logits - golden["logits_first32"]).max() < 5e-5


@pytest.mark.data
def test_stories260k_writes_its_golden_story_with_a_cache_and_without(stories):
    folder, module, params, golden = stories
    tokenizer, ids = PretrainedTokenizer.load(folder), golden["tokens"]
    told = continued(module, params, [tokenizer.bos_id], 200)
    np.testing.assert_array_equal(told, ids[1:])
    text = json.loads((folder / "config.json").read_text())["greedy_200_text"]
    assert tokenizer.decode(told) == " " + text
    assert tokenizer.encode(text, start=True) == told.tolist()
    logits = jax.jit(module.apply)({"params": params}, ids[None])[0]
    np.testing.assert_array_equal(logits.argmax(-1)[:200], ids[1:])


# -- generated ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [Sizes(), Sizes(vocab=-31), Sizes(kv=4), Sizes(vocab=-31, kv=1), Sizes(dim=32, heads=2, kv=1)],
    ids=["tied", "untied", "every head its keys", "untied, one key head", "wide heads"],
)
def test_logits_equal_numpys(sizes, tmp_path):
    tensors, ids = generate(sizes), np.random.default_rng(1).integers(0, 31, 12)
    module, params, report = load(write(tmp_path, sizes))
    assert ("head" in params) == (sizes.vocab < 0)
    assert set(report.unused) == {"freqs_cos", "freqs_sin"}
    logits = jax.jit(module.apply)({"params": params}, ids[None])[0]
    expected = forward(tensors, sizes, ids)
    assert np.abs(expected).max() > 3
    np.testing.assert_allclose(logits, expected, atol=2e-5, rtol=0)


def test_a_slice_is_what_the_whole_has_there_and_heads_cost_only_themselves(tmp_path):
    sizes = Sizes()
    files = llama2c.open_files(write(tmp_path, sizes))
    shape, K = (sizes.layers, sizes.dim, sizes.dim), sizes.dim // sizes.heads
    source = llama2c.TABLE.source("stack/blocks/attn/q/kernel", shape)
    assert source is not None
    read = lambda *index: source.read(files, index, K, np.float32)  # noqa: E731
    whole = read(*[slice(0, n) for n in shape])
    theirs = generate(sizes)["q"].reshape(sizes.layers, sizes.heads, K // 2, 2, sizes.dim)
    ours = whole.reshape(sizes.layers, sizes.dim, sizes.heads, 2, K // 2)
    np.testing.assert_array_equal(ours, theirs.transpose(0, 4, 1, 3, 2))
    draw = np.random.default_rng(0)
    for _ in range(100):
        index = [slice(*sorted(draw.integers(0, n + 1, 2).tolist())) for n in shape[1:]]
        np.testing.assert_array_equal(read(slice(1, 3), *index), whole[1:3, index[0], index[1]])
    counted = Counting.of(files)
    source.read(counted, (slice(0, 1), slice(0, 6), slice(K, 3 * K)), K, np.float32)
    assert [size for _, size in counted.reads] == [6 * 2 * K]


def test_every_device_gets_its_shard(tmp_path):
    module, whole, _ = load(write(tmp_path))
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = abstract(boxed, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    params, _ = read_checkpoint(Checkpoint.open(tmp_path), shapes)
    assert not params["stack"]["blocks"]["attn"]["q"]["kernel"].sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def test_a_file_that_changes_after_it_was_opened_is_refused(tmp_path):
    files = llama2c.open_files(write(tmp_path))
    os.truncate(tmp_path / "model.bin", 100)
    with pytest.raises(CheckpointError, match=r"model\.bin: it has changed"):
        files.read("norm.weight")


# -- which file describes the folder -----------------------------------------------------------


LLAMA = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 8,
         }  # fmt: skip


@pytest.mark.parametrize("config", [None, {}, {"config": {"dim": 3}, "model_type": None}])
def test_the_header_suffices(config, tmp_path):
    write(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.model_type, checkpoint.spec["width"]) == ("llama2c", 24)


def test_a_config_that_names_its_model_goes_before(tmp_path):
    write_model(write(tmp_path), LLAMA)
    checkpoint = Checkpoint.open(tmp_path)
    assert (checkpoint.model_type, checkpoint.spec["width"]) == ("llama", 8)
    assert [file.name for file in checkpoint.files.files] == ["model.safetensors"]


def test_a_pickle_of_a_transformers_model_is_refused_with_the_command_to_convert_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"w": [1.0] * 9}))
    with pytest.raises(CheckpointError, match=r"(?s)model\.bin are not loaded.*\n  python -c"):
        Checkpoint.open(tmp_path)


def test_a_folder_that_does_not_say_which_file_is_refused(tmp_path):
    (write(tmp_path) / "model.bin").rename(tmp_path / "stories15M.bin")
    write(tmp_path)
    with pytest.raises(CheckpointError, match=r"2 \.bin files \(model\.bin, stories15M\.bin"):
        Checkpoint.open(tmp_path)
    (tmp_path / "model.bin").unlink()
    (tmp_path / "stories15M.bin").unlink()
    (tmp_path / "folder.bin").mkdir()
    os.mkfifo(tmp_path / "fifo.bin")  # reading it would never end
    with pytest.raises(
        CheckpointError, match=r"of pickled weights \(fifo\.bin\) that has no config"
    ):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama2c"}))
    with pytest.raises(CheckpointError, match=r"holds no \.bin of a llama2\.c model"):
        Checkpoint.open(tmp_path)


# -- hostile files -----------------------------------------------------------------------------

HEADER = dataclasses.astuple(Sizes())


def spoiled(**numbers):
    """The right tensors behind a wrong header."""
    changed = dataclasses.astuple(dataclasses.replace(Sizes(), **numbers))
    return lambda data: struct.pack("<7i", *changed) + data[28:]


HOSTILE = {
    "empty": (lambda data: b"", "it has 0 bytes, fewer than the header"),
    "half a header": (lambda data: data[:27], "it has 27 bytes, fewer than the header"),
    "only a header": (lambda data: data[:28], "it has 28 bytes, but a llama2.c file with"),
    "a byte short": (lambda data: data[:-1], "it is truncated, or in another format"),
    "a number more": (lambda data: data + bytes(4), "it is truncated, or in another format"),
    "no head of its own": (spoiled(vocab=-31), "it is truncated, or in another format"),
    "other sizes": (spoiled(hidden=21), "it is truncated, or in another format"),
    "width 0": (spoiled(dim=0), r"has dim=0, outside 1\.\."),
    "width below 0": (spoiled(dim=-24), r"has dim=-24, outside 1\.\."),
    "no layers": (spoiled(layers=0), r"has n_layers=0, outside 1\.\."),
    "a billion layers": (spoiled(layers=2**30), r"has n_layers=1073741824, outside 1\.\."),
    "no heads": (spoiled(heads=0), r"has n_heads=0, outside 1\.\."),
    "no key heads": (spoiled(kv=0), r"has n_kv_heads=0, outside 1\.\."),
    "no words": (spoiled(vocab=0), r"has vocab_size=0, outside 1\.\."),
    "least of all words": (spoiled(vocab=-(2**31)), r"has vocab_size=2147483648, outside 1\.\."),
    "no positions": (spoiled(seq=0), r"has seq_len=0, outside 1\.\."),
    "heads that do not divide": (spoiled(heads=5), "n_heads=5, .* do not divide"),
    "key heads that do not divide": (spoiled(kv=3), "n_kv_heads=3, which do not divide"),
    "half a pair": (spoiled(heads=8), "n_heads=8, .* do not divide into heads of rotated pairs"),
    "a big-endian header": (
        lambda data: struct.pack(">7i", *HEADER) + data[28:], r"has dim=402653184, outside 1\.\."),
    "a later format": (lambda data: b"24ka" + data, "only the first format .*--version 0"),
    "a pickle": (lambda data: pickle.dumps({"w": [1.0] * 99}), "a pickle, which is never loaded"),
    "a zip, as torch has them": (lambda data: b"PK\3\4" + data, "it is a zip archive, as torch"),
    "a web page": (lambda data: b"<html>" + data, "it is an HTML page"),
    "an LFS pointer": (lambda data: b"version https://git-lfs.github.com", "Git LFS pointer"),
}  # fmt: skip


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_foreign_or_corrupt_file_is_named(fault, tmp_path):
    spoil, message = HOSTILE[fault]
    file = write(tmp_path) / "model.bin"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"Cannot read .*model\.bin: .*{message}"):
        Checkpoint.open(tmp_path)


def test_only_the_header_of_an_endless_file_is_read(tmp_path):
    os.truncate(write(tmp_path) / "model.bin", 2**40)  # takes no room
    with pytest.raises(CheckpointError, match=r"model\.bin: it has 1099511627776 bytes, but a"):
        Checkpoint.open(tmp_path)
