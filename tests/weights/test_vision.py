"""Public vision encoders: small random checkpoints of the original library give the same tokens."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from original import their_warnings

from vadapter.models.variants import make_module
from vadapter.weights.families.vision import FAMILIES
from vadapter.weights.names import bicubic
from vadapter.weights.public import Checkpoint

BASE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8}  # fmt: skip
MLP = BASE | {"intermediate_size": 48}
CASES = {
    "clip": ("CLIPVision", MLP),
    "clip, gelu": ("CLIPVision", MLP | {"hidden_act": "gelu"}),
    "siglip": ("SiglipVision", MLP),
    "dinov2": ("Dinov2", BASE | {"mlp_ratio": 2}),
    "dinov2, gated": ("Dinov2", BASE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegisters", BASE | {"mlp_ratio": 2}),
}
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder), made once."""

    def build(transformers, case):
        kind, keys = CASES[case]
        config = getattr(transformers, f"{kind}Config")(**keys)
        config._attn_implementation = "eager"
        return getattr(transformers, f"{kind}Model")(config)

    return original_of(build)


def load(folder, **overrides):
    checkpoint = Checkpoint.open(folder)
    module = make_module("encoder", dict(checkpoint.spec) | overrides)
    size = module.config.image_size
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
    params, report = checkpoint.load(nn.unbox(shapes)["params"])
    return module, params, report


def frames(size=32):
    return np.random.default_rng(0).integers(0, 256, (2, 2, size, size, 3), np.uint8)


def theirs(originals, model, module, pixels, **options):
    """Their tokens of the patches alone, [B, F, N, D]: what comes out, and behind each layer."""
    torch, _ = originals
    c = module.config
    x = (pixels.reshape(-1, *pixels.shape[2:]) / 255 - np.array(c.mean)) / np.array(c.std)
    with torch.no_grad(), their_warnings():
        inputs = torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)
        out = model(inputs, output_hidden_states=True, **options)
    front = int(c.class_token) + c.registers
    shape = (*pixels.shape[:2], -1, c.width)
    return [
        h[:, front:].numpy().reshape(shape) for h in (out.last_hidden_state, *out.hidden_states)
    ]


def run(module, params, pixels):
    return np.asarray(jax.jit(module.apply)({"params": params}, pixels))


@pytest.mark.parametrize("case", CASES)
def test_tokens_equal_the_originals(case, pair, originals):
    model, folder = pair(case)
    module, params, _ = load(folder)
    expected = theirs(originals, model, module, frames())[0]
    ours = run(module, params, frames())
    assert ours.shape == expected.shape == (2, 2, module.tokens_per_frame(), 32)
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_penultimate_layer_is_that_of_the_original(case, pair, originals):
    model, folder = pair(case)
    module, params, report = load(folder, tap="penultimate")
    expected = theirs(originals, model, module, frames())[-2]
    assert np.abs(run(module, params, frames()) - expected).max() < TOLERANCE
    assert params["stack"]["blocks"]["mlp"]["up"]["kernel"].shape[0] == 2, "the last is not loaded"
    assert any(".2." in name for name in report.left_out)


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("case", ["clip", "siglip", "dinov2", "dinov2 with registers"])
def test_another_resolution_resamples_the_positions_as_the_original_does(
    case, size, pair, originals
):
    model, folder = pair(case)
    module, params, _ = load(folder, image_size=size)
    options = {} if case.startswith("dinov2") else {"interpolate_pos_encoding": True}
    expected = theirs(originals, model, module, frames(size), **options)[0]
    assert np.abs(run(module, params, frames(size)) - expected).max() < TOLERANCE


def test_resampling_to_the_same_size_changes_nothing_and_weights_sum_to_one():
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5, dtype=np.float32))
    for old, new in ((14, 16), (16, 7), (3, 24)):
        np.testing.assert_allclose(bicubic(old, new).sum(1), 1, atol=1e-6)


def config(width, mlp, depth, heads, image, patch):
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
            "num_attention_heads": heads, "image_size": image, "patch_size": patch}  # fmt: skip


# name: (model_type, config.json, parameters of transformers' model without pooling head and the
# norm behind CLIP's last layer)
PUBLISHED = {
    "openai/clip-vit-large-patch14": (
        "clip_vision_model", config(1024, 4096, 24, 16, 224, 14), 303_179_776 - 2048),
    "openai/clip-vit-base-patch32": (
        "clip_vision_model", config(768, 3072, 12, 12, 224, 32), 87_456_000 - 1536),
    "google/siglip-base-patch16-224": (
        "siglip_vision_model", config(768, 3072, 12, 12, 224, 16), 92_884_224 - 7_087_104),
    "facebook/dinov2-small": (
        "dinov2", config(384, 0, 12, 6, 518, 14), 22_056_576 - 384),  # without the mask token
    "facebook/dinov2-large": ("dinov2", config(1024, 0, 24, 16, 518, 14), 304_368_640 - 1024),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_encoder_has_its_published_number_of_parameters(name):
    model_type, keys, published = PUBLISHED[name]
    family = FAMILIES[model_type]
    module = make_module("encoder", family.spec(keys))
    size = module.config.image_size
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
    leaves = jax.tree_util.tree_flatten_with_path(nn.unbox(shapes)["params"])[0]
    assert sum(int(np.prod(leaf.shape)) for _, leaf in leaves) == published
    for path, leaf in leaves:
        source = family.tables[0].source("/".join(k.key for k in path), leaf.shape)
        assert source is not None, path
