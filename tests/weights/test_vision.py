"""Public vision encoders: small random checkpoints of the original library give the same tokens."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.original import their_warnings
from support.public_models import read_checkpoint, write_model

from vadapter.errors import CheckpointError
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, Checkpoint, describe
from vadapter.weights.name_mapping import bicubic

BASE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 8}  # fmt: skip
MLP = BASE | {"intermediate_size": 48}
CASES = {
    "clip": ("CLIPVision", MLP),
    "clip, gelu": ("CLIPVision", MLP | {"hidden_act": "gelu"}),
    "metaclip 2": ("MetaClip2Vision", MLP),
    "siglip": ("SiglipVision", MLP),
    "dinov2": ("Dinov2", BASE | {"mlp_ratio": 2}),
    "dinov2, gated": ("Dinov2", BASE | {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2 with registers": ("Dinov2WithRegisters", BASE | {"mlp_ratio": 2}),
}
# Patches that do not cover the image, and widths that are no power of two.
ODD = {"hidden_size": 42, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 33,
       "patch_size": 7}  # fmt: skip
CASES |= {
    f"{name}, a border": (kind, ODD | {k: v for k, v in keys.items() if k not in ODD})
    for name, (kind, keys) in CASES.items()
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
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
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
    pixels = frames(module.config.image_size)
    expected = theirs(originals, model, module, pixels)[0]
    ours = run(module, params, pixels)
    shape = (2, 2, module.tokens_per_frame(), module.config.width)
    assert ours.shape == expected.shape == shape
    assert np.abs(expected).max() > 1
    assert np.abs(ours - expected).max() < TOLERANCE


@pytest.mark.parametrize("case", CASES)
def test_the_penultimate_layer_is_that_of_the_original(case, pair, originals):
    model, folder = pair(case)
    module, params, report = load(folder, tap="penultimate")
    pixels = frames(module.config.image_size)
    expected = theirs(originals, model, module, pixels)[-2]
    assert np.abs(run(module, params, pixels) - expected).max() < TOLERANCE
    last = model.config.num_hidden_layers - 1
    kernel = params["stack"]["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.shape[0] == last, "the last is not loaded"
    assert any(f".{last}." in name for name in report.unused)


@pytest.mark.parametrize("size", [48, 24, 45])
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


# -- SigLIP 2 ----------------------------------------------------------------------------------

# As google/siglip2-base-patch16-224 has it, but for the sizes.
SIGLIP2 = {
    "architectures": ["SiglipModel"],
    "initializer_factor": 1.0,
    "model_type": "siglip",
    "text_config": {
        "attention_dropout": 0.0, "bos_token_id": 49406, "eos_token_id": 49407,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 24, "intermediate_size": 32,
        "layer_norm_eps": 1e-06, "max_position_embeddings": 64, "model_type": "siglip_text_model",
        "num_attention_heads": 2, "num_hidden_layers": 1, "pad_token_id": 1, "projection_size": 32,
        "vocab_size": 256,
    },
    "torch_dtype": "float32",
    "transformers_version": "4.49.0.dev0",
    "vision_config": {
        "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model", "num_channels": 3, **MLP,
    },
}  # fmt: skip


def test_siglip2_of_fixed_resolution_is_a_siglip_of_two_towers(tmp_path):
    rest = {"logit_scale": np.zeros(1), "logit_bias": np.zeros(1)}
    rest |= {"text_model.embeddings.token_embedding.weight": np.zeros((256, 24)),
             "text_model.head.weight": np.zeros((32, 24)),
             "vision_model.head.probe": np.zeros((1, 1, 32)),
             "vision_model.head.attention.in_proj_weight": np.zeros((96, 32))}  # fmt: skip
    write_model(tmp_path, SIGLIP2["vision_config"], "vision_model.", **rest)
    (tmp_path / "config.json").write_text(json.dumps(SIGLIP2))
    module, params, report = load(tmp_path)
    assert set(report.unused) == set(rest)
    c = module.config
    assert (c.width, c.depth, c.class_token, c.final_norm) == (32, 3, False, True)
    assert run(module, params, frames()).shape == (2, 2, 16, 32)


def test_a_siglip2_config_without_the_sizes_means_those_of_the_base_model(tmp_path):
    """Published files leave out what the library has by default."""
    config = {"model_type": "siglip", "text_config": {}, "vision_config": {"image_size": 384}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = describe(tmp_path)[1]
    assert [spec[k] for k in ("image_size", "patch", "width", "depth", "heads", "mlp_dim")] == [
        384, 16, 768, 12, 12, 3072,
    ]  # fmt: skip


NAFLEX = {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "siglip2", "text_config": {}, "vision_config": NAFLEX},
        {"model_type": "siglip2", "vision_config": {}},
        {"model_type": "siglip", "vision_config": NAFLEX},
        NAFLEX,
    ],
)
def test_a_siglip2_of_any_shape_is_refused_by_naming_those_of_fixed_resolution(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"NaFlex.*google/siglip2-base-patch16-224"):
        describe(tmp_path)


# -- published sizes ---------------------------------------------------------------------------


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
    "google/siglip-so400m-patch14-384": (
        "siglip_vision_model", config(1152, 4304, 27, 16, 384, 14), 428_225_600 - 15_238_352),
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
