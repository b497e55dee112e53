"""Public video encoders: small random checkpoints of the original library give the same tokens."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.cases import some_slow
from support.encoders import load, run
from support.original import their_warnings

from vadapter.errors import ConfigError
from vadapter.models.registry import make_module
from vadapter.weights.families.video import FAMILIES

VJEPA2 = {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3, "mlp_ratio": 1.5,
          "patch_size": 6, "crop_size": 24, "frames_per_clip": 8, "pred_hidden_size": 12,
          "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1,
          "num_pooler_layers": 1}  # fmt: skip
VIDEOMAE = {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3,
            "intermediate_size": 50, "patch_size": 6, "image_size": 24, "num_frames": 6,
            "decoder_hidden_size": 12, "decoder_num_attention_heads": 1,
            "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 16}  # fmt: skip
CASES = {
    "vjepa2": ("VJEPA2", VJEPA2),
    "vjepa2, classifier": ("VJEPA2", VJEPA2 | {"num_labels": 3}),
    "vjepa2, whole heads rotate": ("VJEPA2", VJEPA2 | {"num_attention_heads": 6}),
    "vjepa2, heads of 22": ("VJEPA2", VJEPA2 | {"hidden_size": 44, "num_attention_heads": 2}),
    "vjepa2, tubelets of 3": ("VJEPA2", VJEPA2 | {"tubelet_size": 3, "qkv_bias": False}),
    "videomae": ("VideoMAE", VIDEOMAE),
    "videomae, norm": ("VideoMAE", VIDEOMAE | {"use_mean_pooling": False, "num_frames": 7}),
    "videomae, pretraining": ("VideoMAE", VIDEOMAE | {"use_mean_pooling": False}),
    "videomae, tubelets of 3": ("VideoMAE", VIDEOMAE | {"tubelet_size": 3, "qv_bias": False}),
    "videomae, classifier": ("VideoMAE", VIDEOMAE | {"hidden_act": "gelu_new"}),
}  # fmt: skip
CLASSES = {"classifier": "ForVideoClassification", "pretraining": "ForPreTraining"}
FAST = ["vjepa2", "vjepa2, heads of 22", "videomae, pretraining", "videomae, tubelets of 3"]
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder), made once."""

    def build(transformers, case):
        kind, keys = CASES[case]
        config = getattr(transformers, f"{kind}Config")(**keys)
        config._attn_implementation = "eager"
        name = CLASSES.get(case.partition(", ")[2], "Model")
        return getattr(transformers, f"{kind}{name}")(config)

    return original_of(build)


def clip(frames, size=24):
    return np.random.default_rng(0).integers(0, 256, (2, frames, size, size, 3), np.uint8)


def theirs(originals, model, module, pixels):
    """Their tokens of a clip, [B, T, N, D]."""
    torch, _ = originals
    c = module.config
    x = (pixels / 255 - np.array(c.mean)) / np.array(c.std)
    inputs = torch.tensor(x.transpose(0, 1, 4, 2, 3), dtype=torch.float32)
    base = getattr(model, model.base_model_prefix, model)
    options = {"skip_predictor": True} if "vjepa2" in base.config.model_type else {}
    with torch.no_grad(), their_warnings():
        out = base(inputs, **options).last_hidden_state.numpy()
    return out.reshape(len(pixels), -1, module.tokens_per_frame(), c.width)


@pytest.mark.parametrize("case", some_slow(list(CASES), fast=FAST))
def test_tokens_of_a_clip_equal_the_originals(case, pair, originals):
    model, folder = pair(case)
    module, params, _ = load(folder)
    frames = module.config.frames or 4 * module.config.tubelet
    expected = theirs(originals, model, module, clip(frames))
    ours = run(module, params, clip(frames))
    assert ours.shape == expected.shape
    assert ours.shape[1:3] == (module.time_positions(frames), module.tokens_per_frame())
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE


def test_an_image_is_repeated_to_one_tubelet_or_to_a_whole_clip(pair, originals):
    model, folder = pair("vjepa2")
    module, params, _ = load(folder)
    expected = theirs(originals, model, module, clip(1))
    ours = run(module, params, clip(1))
    assert ours.shape[:2] == (2, module.time_positions(1)) == (2, 1)
    assert np.abs(ours - expected).max() < TOLERANCE
    model, folder = pair("videomae, tubelets of 3")
    module, params, _ = load(folder)
    expected = theirs(originals, model, module, np.repeat(clip(1), 6, axis=1))
    ours = run(module, params, clip(1))
    assert ours.shape[:2] == (2, module.time_positions(1)) == (2, 2)
    assert np.abs(ours - expected).max() < TOLERANCE


def test_the_penultimate_layer_is_that_of_the_original(pair, originals):
    model, folder = pair("videomae, pretraining")
    module, params, report = load(folder, tap="penultimate")
    seen = []
    layer = model.videomae.encoder.layer[-1]
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    theirs(originals, model, module, clip(6))
    handle.remove()
    ours = run(module, params, clip(6))
    assert np.abs(ours - seen[0].numpy().reshape(ours.shape)).max() < TOLERANCE
    assert any(".2." in name for name in report.unused)


@pytest.mark.parametrize(("case", "frames", "taken"), [
    ("vjepa2", 5, "a multiple of 2"), ("videomae, tubelets of 3", 3, "6"),
])  # fmt: skip
def test_clips_of_other_frames_are_refused_by_saying_how_many_are_taken(case, frames, taken, pair):
    module, params, _ = load(pair(case)[1])
    with pytest.raises(ConfigError, match=f"has {frames} frames, but the encoder takes {taken};"):
        run(module, params, clip(frames))


def test_names_of_the_first_release_are_read_the_same(pair, tmp_path):
    """Queries and values had biases under names of their own."""
    _, folder = pair("videomae")
    _, params, _ = load(folder)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    old = {"query.bias": "q_bias", "value.bias": "v_bias"}
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        for new, first in old.items():
            if name.endswith(new):
                tensors[name.removesuffix(new) + first] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params, load(tmp_path)[1])


# -- published sizes ---------------------------------------------------------------------------

VITL = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
# name: (model_type, config.json, (T, N) of a clip, parameters of transformers' encoder alone)
PUBLISHED = {
    # defaults of transformers
    "facebook/vjepa2-vitl-fpc64-256": ("vjepa2", VITL, (32, 256), 303_885_312),
    # not confirmed
    "facebook/vjepa2-vitg-fpc64-384": (
        "vjepa2", {"hidden_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 22,
                   "mlp_ratio": 48 / 11, "crop_size": 384}, (32, 576), 1_012_173_952),
    # defaults of transformers
    "MCG-NJU/videomae-base": (
        "videomae", {"use_mean_pooling": False}, (8, 196), 86_227_200),
    # not confirmed
    "MCG-NJU/videomae-large": (
        "videomae", {**VITL, "intermediate_size": 4096, "use_mean_pooling": False},
        (8, 196), 303_885_312 - 24 * 1024),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_encoder_has_its_published_number_of_parameters(name):
    model_type, keys, positions, published = PUBLISHED[name]
    family = FAMILIES[model_type]
    module = make_module("encoder", family.spec(keys))
    size, frames = module.config.image_size, module.config.frames or 64
    pixels = jax.ShapeDtypeStruct((1, frames, size, size, 3), np.uint8)
    tokens, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), pixels)
    assert tokens.shape == (1, *positions, keys.get("hidden_size", 768))
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(variables)["params"])[0]
    for path, leaf in leaves:
        source = family.names({})[0].source("/".join(k.key for k in path), leaf.shape)
        assert source is not None, path
    assert sum(int(np.prod(leaf.shape)) for _, leaf in leaves) == published
