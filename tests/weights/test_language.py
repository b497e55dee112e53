"""Public language models: small random checkpoints of the original library give the same logits."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from support import language_models
from support.cases import some_slow
from support.language_models import load
from support.original import their_warnings
from support.public_models import Counting, read_checkpoint, write_model

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import CheckpointError
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.generate import Decode, decode
from vadapter.models.registry import make_module
from vadapter.stages.outline import abstract
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint

V, T = 97, 40
TOLERANCE = 1e-4  # of logits of about 6
BASE = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
GROUPED = BASE | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 16}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8,
         "linear_value_head_dim": 5, "linear_conv_kernel_dim": 3}  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip


def rope(kind, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **keys}}


# Sequences of 40 tokens leave windows of 5, and the 16 positions that stretched ones were made for.
CASES = {
    "llama": ("llama", GROUPED),
    "llama, tied, biases": (
        "llama", GROUPED | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
    ),
    "llama, llama3 positions": (
        "llama", BASE | rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                             original_max_position_embeddings=16)),
    "llama, linear positions": ("llama", BASE | rope("linear", factor=4.0)),
    "llama, yarn positions": (
        "llama", BASE | rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": ("mistral", WIDE | {"sliding_window": 5}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2, windows": (
        "qwen2", GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    ),
    "qwen3": ("qwen3", WIDE),
    "gemma": ("gemma", BASE | {"num_key_value_heads": 1, "head_dim": 16}),
    "gemma2": ("gemma2", WIDE | {"sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3": ("gemma3_text", WIDE | {"sliding_window": 5, "sliding_window_pattern": 2}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False}),
    "neox": ("gpt_neox", BASE),
    "neox, serial": ("gpt_neox", BASE | {"use_parallel_residual": False}),
    "qwen3.5": ("qwen3_5_text", WIDE | DELTA | {"full_attention_interval": 3}),
}  # fmt: skip


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder), made once."""

    def build(transformers, case):
        return language_models.build(transformers, *CASES[case])

    return original_of(build)


def ids(rows=2, length=T):
    return np.random.default_rng(0).integers(3, V, (rows, length))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_originals_with_padding(case, pair, originals):
    torch, _ = originals
    model, folder = pair(case)
    module, params, report = load(folder)
    assert report.unused == ()
    tokens, lengths = ids(3), np.array([T, 23, 7])
    real = np.arange(T)[None, :] < lengths[:, None]
    theirs, rounding = language_models.their_logits(torch, model, tokens, real)
    ours = np.asarray(language_models.logits(module, params, tokens, real))[real]
    assert np.abs(theirs).max() > 3
    # How far a processor's float32 takes the original itself.
    assert rounding < 2 * TOLERANCE
    assert np.abs(ours - theirs).max() < TOLERANCE + rounding


@pytest.mark.parametrize(
    "case", ["llama, yarn positions", "qwen2, windows", "gemma3", "gpt2", "qwen3.5"]
)
def test_cached_greedy_decoding_equals_the_originals(case, pair, originals):
    torch, _ = originals
    model, folder = pair(case)
    module, params, _ = load(folder)
    tokens = ids(2, 6)
    theirs = language_models.their_greedy(torch, model, tokens, 20)
    np.testing.assert_array_equal(language_models.greedy(module, params, tokens, 20), theirs)


@pytest.mark.parametrize("penalty", some_slow([0.0, 1.0, 2.0], fast=[2.0]))
def test_beam_search_equals_the_originals(penalty, pair, originals):
    torch, _ = originals
    model, folder = pair("llama")
    module, params, _ = load(folder)
    tokens, G = ids(8, 6), 12
    for beams, min_new in ((2, 0), (5, 0), (5, 9)):
        with torch.no_grad(), their_warnings():
            out = model.generate(
                torch.tensor(tokens), attention_mask=torch.ones(tokens.shape), num_beams=beams,
                max_new_tokens=G, min_new_tokens=min_new, length_penalty=penalty, do_sample=False,
                early_stopping="never", eos_token_id=[2, 90], output_scores=True,
                return_dict_in_generate=True,
            )  # fmt: skip
        theirs = out.sequences.numpy()[:, 6:]
        batch = {
            "prompt": np.zeros((8, 0), np.int32),
            "tokens": tokens.astype(np.int32),
            "segments": np.ones((8, 6), np.int32),
            "positions": np.tile(np.arange(6, dtype=np.int32), (8, 1)),
        }
        lm, how = AdapterModel({"llm": module}, lm="llm"), Decode(G, min_new, beams, penalty)
        ours = jax.jit(lambda p, b: decode(lm, p, b, how, stop=(2, 90)))({"llm": params}, batch)  # noqa: B023
        for row, other in zip(np.asarray(ours["tokens"]), theirs, strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in (2, 90)), G)
            assert row[:end].tolist() == other[:end].tolist()  # they pad with the end token
        np.testing.assert_allclose(ours["score"], out.sequences_scores.numpy(), atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "gpt2", "neox"])
def test_every_shard_is_read_for_its_own_device_and_no_more(case, pair):
    _, folder = pair(case)
    module, whole, _ = load(folder)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    shapes = abstract(boxed, mesh)
    checkpoint = Checkpoint.open(folder)
    counted = Counting.of(checkpoint.files)
    params, _ = read_checkpoint(dataclasses.replace(checkpoint, files=counted), shapes)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    kernel = params["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "fsdp", "tensor")
    shares = [size / np.prod(counted.tensors[name].shape) for name, size in counted.reads]
    assert min(shares) <= 1 / 4


def test_a_checkpoint_is_loaded_in_the_requested_dtype(pair):
    _, folder = pair("llama")
    checkpoint = Checkpoint.open(folder)
    _, whole, _ = load(folder)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), whole)
    half, _ = read_checkpoint(checkpoint, shapes, jnp.bfloat16)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), half, whole)


# -- what does not fit -------------------------------------------------------------------------


@dataclasses.dataclass
class Folder:
    """A hand-made Llama folder whose config and tensors a test may spoil."""

    path: object

    def write(self, config=None, spoil=lambda tensors: None):
        keys = {"model_type": "llama", "tie_word_embeddings": True, **GROUPED}
        write_model(self.path, keys, spoil=spoil)
        (self.path / "config.json").write_text(json.dumps(keys | (config or {})))
        return self.path


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


FAULTS = {
    "a tensor is missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        r"\(1 tensor\):\n  missing: model\.layers\.1\.mlp\.up_proj\.weight \(for stack/blocks/ml",
    ),
    "a tensor is left over": (
        lambda t: t.update({"model.layers.0.gate": np.zeros(3, np.float32)}),
        r"unexpected: model\.layers\.0\.gate",
    ),
    "a tensor has another shape": (
        lambda t: t.update({"model.norm.weight": np.zeros(31, np.float32)}),
        r"model\.norm\.weight is \[31\], but norm/scale needs \[32\]",
    ),
    "a linear layer is not transposed": (
        lambda t: t.update({"model.layers.0.mlp.up_proj.weight": np.zeros((32, 48), np.float32)}),
        r"up_proj\.weight is \[32, 48\], but stack/blocks/mlp/up/kernel needs \[48, 32\]",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_tensor_that_does_not_fit_is_named(fault, folder):
    spoil, message = FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        load(folder.write(spoil=spoil))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gpt2_whose_names_have_no_prefix_reads_the_same(tied, tmp_path):
    """The first release's names begin with "h.", and a stored head is the embedding again."""
    keys = {"model_type": "gpt2", "tie_word_embeddings": tied, **GPT2}
    _, params, _ = load(write_model(tmp_path / "whole", keys))

    def bare(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors.setdefault("lm_head.weight", tensors["wte.weight"])

    _, same, report = load(write_model(tmp_path / "bare", keys, spoil=bare))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert report.unused == (("lm_head.weight",) if tied else ())


def test_unused_tensors_of_the_table_are_reported(folder):
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"

    def spoil(tensors):
        tensors[frequencies] = np.zeros(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    _, _, report = load(folder.write(spoil=spoil))
    assert set(report.unused) == {frequencies, "lm_head.weight"}
    assert "unused: lm_head.weight, model.layers.0" in str(report)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "lama"},
            r"config\.json: model_type 'lama' is not supported\. Supported are language mod",
        ),
        (
            {"model_type": "qwen3_5_moe_text"},
            r"'qwen3_5_moe_text' is not supported\. Supported are",
        ),
        ({"model_type": "gemma4_text"}, r"hidden_size_per_layer_input=256: only 0 \(no embedd"),
        ({"hidden_act": "swish2"}, r"config\.json: hidden_act='swish2': only silu, "),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            r"='dynamic': only rotary positions of",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"config\.json has no 'factor'"),
    ],
)
def test_a_config_that_is_not_understood_is_an_error(config, message, folder):
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder.write(config))


def test_a_corrupt_or_missing_config_is_an_error(folder):
    path = folder.write()
    (path / "config.json").write_text("<html>")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read .*download it again"):
        Checkpoint.open(path)
    (path / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"\(model\.safetensors\) that has no config\.json: fe"
    ):
        Checkpoint.open(path)


# -- published sizes ---------------------------------------------------------------------------


def llama(vocab, width, mlp, depth, heads, kv, **keys):
    return {"vocab_size": vocab, "hidden_size": width, "intermediate_size": mlp,
            "num_hidden_layers": depth, "num_attention_heads": heads, "num_key_value_heads": kv,
            "max_position_embeddings": 8192, **keys}  # fmt: skip


TIED = {"tie_word_embeddings": True}
# name: (model_type, the keys of its config.json that set shapes, published parameters)
# Above each where sizes were read on 2026-12-01: litgpt: config.py of Lightning-AI/litgpt, which
# names the config.json of each; defaults: those of transformers' configuration, which is that of
# this model; file: a config.json on huggingface.co.
PUBLISHED = {
    # litgpt; defaults
    "Llama-2-7b": ("llama", llama(32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    # litgpt
    "Llama-3.1-8B": ("llama", llama(128_256, 4096, 14_336, 32, 32, 8), 8_030_261_248),
    # litgpt
    "Llama-3.2-1B": (
        "llama", llama(128_256, 2048, 8192, 16, 32, 8, head_dim=64, **TIED), 1_235_814_400),
    # litgpt
    "SmolLM2-135M": ("llama", llama(49_152, 576, 1536, 30, 9, 3, **TIED), 134_515_008),
    # litgpt
    "TinyLlama-1.1B": ("llama", llama(32_000, 2048, 5632, 22, 32, 4), 1_100_048_384),
    # litgpt; defaults
    "Mistral-7B-v0.1": ("mistral", llama(32_000, 4096, 14_336, 32, 32, 8), 7_241_732_096),
    # litgpt, of Qwen2.5-0.5B
    "Qwen2-0.5B": ("qwen2", llama(151_936, 896, 4864, 24, 14, 2, **TIED), 494_032_768),
    # litgpt
    "Qwen2.5-1.5B": ("qwen2", llama(151_936, 1536, 8960, 28, 12, 2, **TIED), 1_543_714_304),
    # litgpt
    "Qwen3-0.6B": (
        "qwen3", llama(151_936, 1024, 3072, 28, 16, 8, head_dim=128, **TIED), 596_049_920),
    # litgpt
    "gemma-2b": ("gemma", llama(256_000, 2048, 16_384, 18, 8, 1, head_dim=256), 2_506_172_416),
    # litgpt; defaults
    "gemma-2-2b": ("gemma2", llama(256_000, 2304, 9216, 26, 8, 4, head_dim=256), 2_614_341_888),
    # litgpt
    "gemma-2-9b": ("gemma2", llama(256_000, 3584, 14_336, 42, 16, 8, head_dim=256), 9_241_705_984),
    # litgpt, of gemma-3-1b-it
    "gemma-3-1b-pt": (
        "gemma3_text", llama(262_144, 1152, 6912, 26, 4, 1, head_dim=256), 999_885_952),
    # defaults
    "gpt2": ("gpt2", {**GPT2, "vocab_size": 50_257, "n_embd": 768, "n_layer": 12, "n_head": 12,
                      "n_positions": 1024}, 124_439_808),
    # litgpt; defaults
    "Phi-3-mini-4k-instruct": (
        "phi3", llama(32_064, 3072, 8192, 32, 32, 32), 3_821_079_552),
    # litgpt
    "Phi-4-mini-instruct": ("phi3", llama(200_064, 3072, 8192, 32, 24, 8, **TIED), 3_836_021_760),
    # defaults
    "SmolLM3-3B": ("smollm3", llama(128_256, 2048, 11_008, 36, 16, 4, **TIED), 3_075_098_624),
    # litgpt; file of OLMo-2-1124-7B-Instruct
    "OLMo-2-1124-7B": ("olmo2", llama(100_352, 4096, 11_008, 32, 32, 32), 7_298_617_344),
    # file of a model trained from it
    "OLMo-2-0425-1B": ("olmo2", llama(100_352, 2048, 8192, 16, 16, 16), 1_484_916_736),
    # not confirmed; defaults but for the vocabulary
    "Olmo-3-1025-7B": ("olmo3", llama(100_278, 4096, 11_008, 32, 32, 32), 7_298_011_136),
    # file of a copy
    "granite-3.2-2b-instruct": (
        "granite", llama(49_155, 2048, 8192, 40, 32, 8, **TIED), 2_533_531_648),
    # files of models trained from it
    "Ministral-8B-Instruct-2410": (
        "ministral", llama(131_072, 4096, 12_288, 36, 32, 8, head_dim=128), 8_019_808_256),
    # not confirmed
    "Ministral-3-3B-Base-2512, text": (
        "ministral3", llama(131_072, 3072, 9216, 26, 32, 8, **TIED), 3_429_006_336),
    # litgpt; defaults
    "stablelm-3b-4e1t": ("stablelm", llama(50_304, 2560, 6912, 32, 32, 32), 2_795_443_200),
    # file of stablelm-2-1_6b-chat
    "stablelm-2-1_6b": (
        "stablelm", llama(100_352, 2048, 5632, 24, 32, 32, use_qkv_bias=True), 1_644_515_328),
    # Its card: 32 layers of width 4096, of which every fourth has 16 heads and 4 of keys, of 256
    # dims, the others 32 and 16 of 128. llama.cpp counts 8.95B parameters in its text.
    "Qwen3.5-9B, text": (
        "qwen3_5_text", llama(248_320, 4096, 12_288, 32, 16, 4, head_dim=256), 8_953_803_264),
    # Its config: every sixth of 60 layers has 4 heads of keys of 512 dims, which are their values,
    # too. Its card: 30.7B parameters.
    "gemma-4-31B, text": (
        "gemma4_text", llama(262_144, 5376, 21_504, 60, 32, 16, head_dim=256,
                             attention_k_eq_v=True, num_global_key_value_heads=4,
                             hidden_size_per_layer_input=0), 30_697_345_340),
    # litgpt
    "pythia-160m": ("gpt_neox", llama(50_304, 768, 3072, 12, 12, 12), 162_322_944),
    # litgpt
    "pythia-1b": ("gpt_neox", llama(50_304, 2048, 8192, 16, 8, 8), 1_011_781_632),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_published_number_of_parameters(name):
    model_type, config, published = PUBLISHED[name]
    family = FAMILIES[model_type]
    spec = family.spec(config)
    module = make_module("llm", spec)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])[0]
    assert sum(int(np.prod(leaf.shape)) for _, leaf in leaves) == published
    for path, leaf in leaves:
        name = "/".join(k.key for k in path)
        assert family.names(spec)[0].source(name, leaf.shape) is not None, path
