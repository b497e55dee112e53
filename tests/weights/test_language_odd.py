"""Language models of uncommon shapes, drawn at random, equal the original library's.

Every family has one configuration in the fast tests; `-m slow` draws more.
"""

from typing import Any

import jax
import numpy as np
import pytest
from support import language_models
from support.original import draw, their_warnings

from vadapter.errors import CheckpointError
from vadapter.weights.hf_checkpoint import Checkpoint

V, T, NEW = 97, 40, 20
TOLERANCE = 1e-4  # of logits of about 6


def pick(rng, *values: Any) -> Any:
    return values[rng.integers(len(values))]


def sizes(rng, kv="num_key_value_heads", head_dim=True):
    """Heads that no power of two divides evenly, more or less wide than the model together."""
    heads, size, depth = pick(rng, 3, 4, 6), pick(rng, 10, 12, 16), pick(rng, 2, 3, 5)
    own = {"head_dim": pick(rng, 6, 14, 20)} if head_dim and rng.integers(2) else {}
    return {
        "vocab_size": V, "hidden_size": heads * size, "intermediate_size": pick(rng, 37, 56),
        "num_hidden_layers": depth, "num_attention_heads": heads,
        kv: pick(rng, *(n for n in range(1, heads + 1) if heads % n == 0)),
        "max_position_embeddings": 64, "tie_word_embeddings": bool(rng.integers(2)),
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **own,
    }  # fmt: skip


def flag(rng):
    return bool(rng.integers(2))


def rope(kind, **keys):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **keys}}


def yarn(rng):
    return {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0,
            "beta_fast": pick(rng, 32.0, 4.0), "original_max_position_embeddings": 16}  # fmt: skip


def kinds(rng, depth):
    return [pick(rng, "full_attention", "sliding_attention") for _ in range(depth)]


def phi3(rng):
    keys = sizes(rng, head_dim=False)
    head_dim = keys["hidden_size"] // keys["num_attention_heads"]
    part = pick(rng, *(p for p in (1.0, 0.75, 0.5) if head_dim * p % 2 == 0))
    keys |= {"partial_rotary_factor": part, "sliding_window": pick(rng, None, 5)}
    if rng.integers(3):
        pairs = int(head_dim * part) // 2
        # Texts of up to 40 tokens are short ones or long ones.
        keys |= {"original_max_position_embeddings": (length := pick(rng, 16, 48))}
        stretch = lambda low: [float(x) for x in rng.uniform(low, 3 * low, pairs)]  # noqa: E731
        keys["rope_scaling"] = {"type": pick(rng, "longrope", "su"), "short_factor": stretch(1),
                                "long_factor": stretch(2),
                                "original_max_position_embeddings": length}  # fmt: skip
    return keys


def smollm3(rng):
    keys = sizes(rng) | {"attention_bias": flag(rng), "mlp_bias": flag(rng)}
    keys |= {"no_rope_layer_interval": pick(rng, 2, 3)}
    if flag(rng):
        depth = keys["num_hidden_layers"]
        keys["no_rope_layers"] = [int(i) for i in rng.integers(2, size=depth)]
    if flag(rng):
        keys |= {"use_sliding_window": True, "sliding_window": 5}
    return keys | (rope("yarn", **yarn(rng)) if flag(rng) else {})


def olmo2(rng):
    keys = sizes(rng) | {"attention_bias": flag(rng)}
    return keys | (rope("linear", factor=3.0) if flag(rng) else {"rope_theta": 700.0})


def olmo3(rng):
    keys = sizes(rng) | {"attention_bias": flag(rng), "sliding_window": 5}
    if flag(rng):
        keys["layer_types"] = kinds(rng, keys["num_hidden_layers"])
    if flag(rng):
        scaling = yarn(rng) | {"attention_factor": 1.3}
        keys |= {"rope_scaling": scaling, "rope_theta": pick(rng, 5e5, 9e3)}
    return keys


def granite(rng):
    return sizes(rng) | {
        "attention_bias": flag(rng), "mlp_bias": flag(rng), "embedding_multiplier": 1.7,
        "logits_scaling": 1.9, "residual_multiplier": 0.22, "attention_multiplier": 0.17,
    }  # fmt: skip


def granitemoehybrid(rng):
    keys = granite(rng) | {
        "num_local_experts": 0, "position_embedding_type": pick(rng, None, "rope"),
    }  # fmt: skip
    keys |= {"shared_intermediate_size": keys["intermediate_size"], "mamba_expand": 1,
             "mamba_n_heads": keys["num_attention_heads"]}  # fmt: skip
    return keys | {"layer_types": ["full_attention"] * keys["num_hidden_layers"]}


def ministral(rng):
    keys = sizes(rng) | {"sliding_window": 5}
    keys.setdefault("head_dim", 12)  # which the original does not derive
    if rng.integers(3):
        keys["layer_types"] = kinds(rng, keys["num_hidden_layers"])
    return keys


def ministral3(rng):
    keys = sizes(rng) | {"sliding_window": pick(rng, 7, None)}
    keys.setdefault("head_dim", 12)
    amplitude = pick(
        rng, {"mscale": 1.0, "mscale_all_dim": 1.0}, {}, {"mscale": 1.0, "mscale_all_dim": 0.3}
    )
    return keys | {"rope_parameters": yarn(rng) | {"llama_4_scaling_beta": 0.4, **amplitude}}


def stablelm(rng):
    keys = sizes(rng, head_dim=False)
    head_dim = keys["hidden_size"] // keys["num_attention_heads"]
    return keys | {
        "use_qkv_bias": flag(rng), "use_parallel_residual": flag(rng),
        "partial_rotary_factor": pick(rng, *(p for p in (0.25, 0.5, 1.0) if head_dim * p % 2 == 0)),
    }  # fmt: skip


def qwen3_5_text(rng):
    keys = sizes(rng) | {"attention_bias": flag(rng), "linear_num_key_heads": pick(rng, 1, 2, 3)}
    keys.setdefault("head_dim", 12)
    keys |= {
        "linear_num_value_heads": keys["linear_num_key_heads"] * pick(rng, 1, 2, 3),
        "linear_key_head_dim": pick(rng, 5, 8), "linear_value_head_dim": pick(rng, 4, 7),
        "linear_conv_kernel_dim": pick(rng, 2, 4, 5),
    }  # fmt: skip
    if flag(rng):
        kinds = ["full_attention", *(pick(rng, "linear_attention", "full_attention")
                                     for _ in range(keys["num_hidden_layers"] - 1))]  # fmt: skip
        return keys | {"layer_types": kinds}
    return keys | {"full_attention_interval": 2}


def gemma4_text(rng):
    keys = sizes(rng) | {"attention_bias": flag(rng), "sliding_window": 5}
    keys.setdefault("head_dim", 12)
    heads, depth = keys["num_attention_heads"], keys["num_hidden_layers"]
    every = pick(rng, 2, 3)
    kinds = [("full" if i % every else "sliding") + "_attention" for i in range(depth)]
    return keys | {
        "hidden_size_per_layer_input": 0, "global_head_dim": pick(rng, 10, 18, keys["head_dim"]),
        "attention_k_eq_v": flag(rng), "num_global_key_value_heads": pick(rng, 1, heads, None),
        "layer_types": kinds, "final_logit_softcapping": pick(rng, None, 30.0),
    }  # fmt: skip


FAMILIES = (
    phi3,
    smollm3,
    olmo2,
    olmo3,
    granite,
    ministral,
    ministral3,
    stablelm,
    qwen3_5_text,
    gemma4_text,
    granitemoehybrid,
)
FAST = {"phi3": 5, "smollm3": 1, "olmo2": 1, "olmo3": 1, "granite": 4, "ministral": 9,
        "ministral3": 0, "stablelm": 1, "qwen3_5_text": 0, "gemma4_text": 1,
        "granitemoehybrid": 0}  # fmt: skip


def make(family, seed, originals, folder):
    """A random model of the original library, saved."""
    torch, transformers = originals
    keys = family(np.random.default_rng(seed))
    torch.manual_seed(seed)
    with their_warnings(), torch.no_grad():
        model = language_models.build(transformers, family.__name__, keys).eval()
        for name, p in model.named_parameters():
            p.copy_(draw(name, p))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.copy_(0.7 + 0.5 * torch.rand(1))
        model.save_pretrained(folder)
    return model


def texts(length=T):
    return np.random.default_rng(0).integers(3, V, (3, length))


def compare_logits(torch, model, module, params):
    """Compare the logits of rows with padding."""
    real = np.arange(T)[None, :] < np.array([T, 23, 7])[:, None]
    theirs, rounding = language_models.their_logits(torch, model, texts(), real)
    ours = np.asarray(language_models.logits(module, params, texts(), real))[real]
    assert np.abs(theirs).max() > 1
    assert rounding < 5 * TOLERANCE  # of the original itself
    assert np.abs(ours - theirs).max() < TOLERANCE + rounding


def compare_greedy(torch, model, module, params, length, new):
    """Compare greedy continuations."""
    theirs = language_models.their_greedy(torch, model, texts(length), new)
    ours = language_models.greedy(module, params, texts(length), new)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_logits_equal_the_originals(family, originals, tmp_path):
    model = make(family, FAST[family.__name__], originals, tmp_path)
    module, params, report = language_models.load(tmp_path)
    assert report.unused == ()
    compare_logits(originals[0], model, module, params)


@pytest.mark.parametrize("length", [6, 20])
def test_greedy_tokens_equal_the_originals_in_texts_shorter_and_longer_than_the_original_length(
    length, originals, tmp_path
):
    model = make(phi3, FAST["phi3"], originals, tmp_path)
    module, params, _ = language_models.load(tmp_path)
    assert module.config.rope.scaling == "longrope"
    assert module.config.rope.original_len == 16
    compare_greedy(originals[0], model, module, params, length, 8)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__)
def test_more_logits_and_greedy_tokens_equal_the_originals(family, seed, originals, tmp_path):
    model = make(family, seed, originals, tmp_path)
    module, params, _ = language_models.load(tmp_path)
    compare_logits(originals[0], model, module, params)
    compare_greedy(originals[0], model, module, params, 6, 8)
    compare_greedy(originals[0], model, module, params, 20, NEW)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "phi3", "gemma2"])
def test_a_base_model_saved_alone_reads_the_same(kind, originals, tmp_path):
    transformers = originals[1]
    keys = sizes(np.random.default_rng(0), head_dim=False) | {"tie_word_embeddings": True}
    with their_warnings():
        model = language_models.build(transformers, kind, keys)
        model.save_pretrained(tmp_path / "whole")
        model.base_model.save_pretrained(tmp_path / "base")
    names = Checkpoint.open(tmp_path / "base").files.tensors
    assert "layers.0.input_layernorm.weight" in names
    _, whole, _ = language_models.load(tmp_path / "whole")
    _, base, _ = language_models.load(tmp_path / "base")
    jax.tree.map(np.testing.assert_array_equal, base, whole)


def test_a_base_model_lacks_a_head_of_its_own_and_this_is_said(originals, tmp_path):
    transformers = originals[1]
    keys = sizes(np.random.default_rng(0)) | {"tie_word_embeddings": False}
    with their_warnings():
        language_models.build(transformers, "olmo2", keys).base_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no lm_head\.weight: it is a base or embedding"):
        language_models.load(tmp_path)
