"""BLIP-2's Q-Former: small random checkpoints of the original library give the same queries."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file
from support import encoders
from support.original import draw, imported, their_warnings
from support.public_models import read_checkpoint
from support.qformer_files import SMALL, D, write_blip2

from vadapter.errors import CheckpointError
from vadapter.models.adapters.qformer import QFormerConfig
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import Checkpoint, MismatchError, complete, describe

TOLERANCE = 1e-4


# -- without the original library --------------------------------------------------------------


def visual(width=D, tokens=5, frames=1, rows=1):
    shape = (rows, frames, tokens, width)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def load(folder, x, **keys):
    """Our module of a folder, its parameters, and the report."""
    module = make_module("qformer", complete({"weights": str(folder), **keys}, "weights"))
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    return module, *read_checkpoint(Checkpoint.open(folder), shapes)


def run(module, params, x):
    return encoders.run(module, params, x)


# Of transformers' Blip2QFormerModel (5.24, float32), for the checkpoint that `write_blip2` writes.
GOLDEN = np.array([
    [-0.44471288, 1.3025198, -1.244893, -0.07083002, -1.1679405, 2.0255404, 0.4832936, -1.1725616],
    [-0.61527264, 1.3407413, -1.305303, 0.4580954, -1.2268054, 1.8407118, 0.5696383, -1.3053279],
    [-0.78203696, 1.4557638, -1.3751016, 0.8551583, -1.195377, 1.540928, 0.6664822, -1.3802426],
])  # fmt: skip


def test_the_queries_of_a_checkpoint_are_the_golden_ones_of_the_original(tmp_path):
    x = visual()
    module, params, report = load(write_blip2(tmp_path), x)
    np.testing.assert_allclose(run(module, params, x)[0], GOLDEN, atol=2e-5)
    text_branch = [name for name in report.unused if name.startswith("qformer.")]
    assert len(text_branch) == 4 * 6
    assert set(report.unused) - set(text_branch) == {
        "language_projection.weight", "vision_model.embeddings.class_embedding",
    }  # fmt: skip


def test_every_faulty_tensor_is_named(tmp_path):
    def spoil(tensors):
        del tensors["qformer.encoder.layer.3.output_query.dense.bias"]
        tensors["qformer.encoder.layer.1.crossattention.extra"] = np.zeros(2, np.float32)
        tensors["query_tokens"] = np.zeros((1, 4, 8), np.float32)

    with pytest.raises(MismatchError) as error:
        load(write_blip2(tmp_path, spoil), visual())
    for line in (
        "missing: qformer.encoder.layer.3.output_query.dense.bias (for groups/layer_1/mlp/down/b",
        "unexpected: qformer.encoder.layer.1.crossattention.extra",
        "shape mismatch: query_tokens is [1, 4, 8], but queries needs [1, 3, 8]",
    ):
        assert line in str(error.value)
    assert error.value.paths == ("groups/layer_1/mlp/down/bias", "queries")


def test_another_width_of_the_encoder_does_not_fit_keys_values_and_the_visual_norm(tmp_path):
    with pytest.raises(MismatchError, match=r"crossattention\.attention\.key\.weight is") as error:
        load(write_blip2(tmp_path), visual(width=D + 1))
    assert set(error.value.paths) == {
        "groups/layer_0/cross/k/kernel", "groups/layer_0/cross/v/kernel",
        "norm_visual/scale", "norm_visual/bias",
    }  # fmt: skip


def test_without_the_visual_norm_its_tensors_stay_unused_and_fewer_layers_leave_the_last_out(
    tmp_path,
):
    _, params, report = load(write_blip2(tmp_path), visual(), norm_visual=False, depth=2)
    assert "norm_visual" not in params
    assert {"vision_model.post_layernorm.weight", "qformer.encoder.layer.2.attention.output.dense."
            "bias"} <= set(report.unused)  # fmt: skip


def test_the_defaults_are_those_of_the_published_models(tmp_path):
    """Published files say what differs from the library's defaults: at most the text branch."""
    published = {"model_type": "blip-2", "qformer_config": {"model_type": "blip_2_qformer"}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert make_module("qformer", describe(tmp_path)[1]).config == QFormerConfig()


def test_cross_attention_in_other_layers_is_refused(tmp_path):
    config = {"model_type": "blip_2_qformer", "cross_attention_frequency": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cross_attention_frequency=3: only 2 is read"):
        describe(tmp_path)


# -- beside the original library ---------------------------------------------------------------

TEXT = {"model_type": "opt", "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1,
        "ffn_dim": 16, "num_attention_heads": 2, "word_embed_proj_dim": 16}  # fmt: skip
VISION = {"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
WIDE = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4,
        "intermediate_size": 48}  # fmt: skip
# case: class, encoder width, queries, visual tokens, further keys of the Q-Former
CASES = {
    "to write": ("Blip2ForConditionalGeneration", 20, 5, 7, {}),
    "one query, one token": ("Blip2ForConditionalGeneration", 48, 1, 1, {"hidden_act": "relu"}),
    "to retrieve": ("Blip2ForImageTextRetrieval", 32, 7, 17, {"use_qformer_text_input": True}),
}


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder), made once."""

    def build(transformers, case):
        name, width, queries, _, keys = CASES[case]
        config = transformers.Blip2Config(
            qformer_config=WIDE | keys, text_config=TEXT, num_query_tokens=queries,
            vision_config=VISION | {"hidden_size": width},
        )  # fmt: skip
        return getattr(transformers, name)(config)

    return original_of(build)


def theirs(model, x):
    """Their queries after the last layer, for visual tokens [B,F,N,D]."""
    torch = imported("torch")
    with torch.no_grad(), their_warnings():
        tokens = torch.tensor(x.reshape(len(x), -1, x.shape[-1]))
        queries = model.query_tokens.expand(len(x), -1, -1)
        seen = model.vision_model.post_layernorm(tokens)
        out = model.qformer(query_embeds=queries, encoder_hidden_states=seen, query_length=None)
    return out.last_hidden_state.numpy()


@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_queries_equal_the_originals(case, frames, pair):
    model, folder = pair(case)
    _, width, queries, tokens, _ = CASES[case]
    x = visual(width, tokens, frames, rows=2)
    module, params, _ = load(folder, x)
    expected, found = theirs(model, x), run(module, params, x)
    assert found.shape == expected.shape == (2, queries, 32)
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < TOLERANCE


def test_a_checkpoint_of_several_files_is_the_same(pair, tmp_path):
    model, _ = pair("to write")
    with their_warnings():
        model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    x = visual(20, 7)
    module, params, _ = load(tmp_path, x)
    assert np.abs(run(module, params, x) - theirs(model, x)).max() < TOLERANCE


def test_a_q_former_saved_alone_has_everything_but_queries_and_visual_norm(pair, tmp_path):
    model, _ = pair("to retrieve")
    with their_warnings():
        model.qformer.save_pretrained(tmp_path)
    x = visual(32, 9)
    module = make_module("qformer", complete({"weights": str(tmp_path), "queries": 7}, "weights"))
    shapes = nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(MismatchError, match="no tensor of blip_2_qformer") as error:
        checkpoint.match(shapes)
    assert set(error.value.paths) == {"queries", "norm_visual/scale", "norm_visual/bias"}
    rest = dataclasses.replace(checkpoint, fresh=frozenset(error.value.paths))
    own = {"queries": model.query_tokens.detach().numpy(),
           "norm_visual/scale": model.vision_model.post_layernorm.weight.detach().numpy(),
           "norm_visual/bias": model.vision_model.post_layernorm.bias.detach().numpy()}  # fmt: skip
    params = traverse_util.unflatten_dict(dict(rest.leaves(shapes)) | own, sep="/")
    assert np.abs(run(module, params, x) - theirs(model, x)).max() < TOLERANCE


def test_the_golden_queries_are_the_originals(originals, tmp_path):
    torch, transformers = originals
    tensors = load_file(write_blip2(tmp_path) / "model.safetensors")
    config = transformers.Blip2QFormerConfig(
        **SMALL, encoder_hidden_size=D, use_qformer_text_input=True
    )
    own = {k.removeprefix("qformer."): torch.tensor(v) for k, v in tensors.items()}
    with torch.no_grad(), their_warnings():
        model = transformers.Blip2QFormerModel(config).eval()
        model.load_state_dict({k: own[k] for k in model.state_dict()})
        scale, bias = (own[f"vision_model.post_layernorm.{x}"] for x in ("weight", "bias"))
        seen = torch.nn.functional.layer_norm(torch.tensor(visual()[:, 0]), (D,), scale, bias, 1e-5)
        out = model(query_embeds=own["query_tokens"], encoder_hidden_states=seen)
    found = out.last_hidden_state[0].numpy()
    assert np.abs(found - GOLDEN).max() < 2e-6, np.array2string(found, separator=", ")


@pytest.mark.parametrize("width", [768, 1024, 1408])
def test_the_published_size_has_the_parameters_of_the_originals(width, originals):
    torch, transformers = originals
    with torch.device("meta"), their_warnings():
        config = transformers.Blip2QFormerConfig(encoder_hidden_size=width)
        count = sum(p.numel() for p in transformers.Blip2QFormerModel(config).parameters())
    module = make_module("qformer", {"size": "qformer_blip2"})
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, 1, width)))
    ours = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert ours == count + 32 * 768 + 2 * width  # queries, and the norm of the visual tokens


@pytest.mark.slow
def test_queries_of_the_published_size_equal_the_originals(originals, tmp_path):
    torch, transformers = originals
    torch.manual_seed(0)
    config = transformers.Blip2Config(
        vision_config={"num_hidden_layers": 1, "intermediate_size": 64}, text_config=TEXT
    )
    with torch.no_grad(), their_warnings():
        model = transformers.Blip2ForConditionalGeneration(config).eval()
        for name, p in model.named_parameters():
            p.copy_(draw(name, p) * (0.1 if p.ndim > 1 else 1))
        model.save_pretrained(tmp_path)
    x = visual(1408, 257, rows=2)
    module, params, report = load(tmp_path, x)
    expected, found = theirs(model, x), run(module, params, x)
    assert report.parameters == 105_165_056
    assert found.shape == expected.shape == (2, 32, 768)
    assert np.abs(expected).max() > 1
    assert np.abs(found - expected).max() < TOLERANCE
