"""Public vision encoders: small random checkpoints of the original library give the same tokens."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file
from support.encoders import load, run
from support.original import their_warnings
from support.public_models import write_model

from vadapter.errors import CheckpointError
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import FAMILIES, describe
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
    "dinov3": ("DINOv3ViT", MLP | {"num_register_tokens": 4}),
    "dinov3, gated": (
        "DINOv3ViT",
        MLP | {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False,
               "value_bias": False, "num_register_tokens": 1, "rope_theta": 40.0},
    ),
    "dinov3, other biases": (
        "DINOv3ViT",
        MLP | {"use_gated_mlp": True, "key_bias": True, "proj_bias": False, "mlp_bias": False},
    ),
    "aimv2": ("Aimv2Vision", MLP),
    "aimv2, native": ("Aimv2Vision", MLP | {"is_native": True, "qkv_bias": True, "mlp_bias": True,
                                            "use_head": False, "rms_norm_eps": 1e-3}),
    "internvit": ("InternVLVision", MLP | {"attention_bias": True}),
    "internvit, rms": (
        "InternVLVision", MLP | {"norm_type": "rms_norm", "use_qk_norm": True}
    ),
    "internvit, pooled": (
        "InternVLVision", MLP | {"use_mean_pooling": False, "layer_norm_eps": 1e-3}
    ),
    "siglip 2, naflex": ("Siglip2Vision", MLP | {"num_patches": 16}),
}  # fmt: skip
# Patches that do not cover the image, and widths that are no power of two.
ODD = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 33,
       "patch_size": 7}  # fmt: skip
CASES |= {
    f"{name}, a border": (kind, ODD | {k: v for k, v in keys.items() if k not in ODD})
    for name, (kind, keys) in CASES.items()
    if kind != "Siglip2Vision"  # whose processor makes whole patches
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


def frames(size=32):
    return np.random.default_rng(0).integers(0, 256, (2, 2, size, size, 3), np.uint8)


def theirs(originals, model, module, pixels, **options):
    """Their tokens of the patches alone, [B, F, N, D]: what comes out, and behind each layer."""
    torch, _ = originals
    c = module.config
    x = (pixels.reshape(-1, *pixels.shape[2:]) / 255 - np.array(c.mean)) / np.array(c.std)
    x = x.transpose(0, 3, 1, 2)
    if model.config.model_type == "siglip2_vision_model":
        side = c.image_size // c.patch
        x = rearrange(x, "n c (h p) (w q) -> n (h w) (p q c)", p=c.patch, q=c.patch)
        shapes = torch.tensor([[side, side]] * len(x))
        options |= {"pixel_attention_mask": torch.ones(x.shape[:2]), "spatial_shapes": shapes}
    with torch.no_grad(), their_warnings():
        inputs = torch.tensor(x, dtype=torch.float32)
        out = model(inputs, output_hidden_states=True, **options)
    front = int(c.class_token) + c.registers
    shape = (*pixels.shape[:2], -1, c.width)
    return [
        h[:, front:].numpy().reshape(shape) for h in (out.last_hidden_state, *out.hidden_states)
    ]


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


RESAMPLED = ("clip", "siglip", "dinov2", "dinov2 with registers", "dinov3", "aimv2, native",
             "internvit", "siglip 2, naflex")  # fmt: skip


@pytest.mark.parametrize("size", [48, 24, 45])
@pytest.mark.parametrize("case", RESAMPLED)
def test_another_resolution_resamples_the_positions_as_the_original_does(
    case, size, pair, originals
):
    model, folder = pair(case)
    size = size // 8 * 8 if case == "siglip 2, naflex" else size
    module, params, _ = load(folder, image_size=size)
    options = {"interpolate_pos_encoding": True} if case in ("clip", "siglip") else {}
    expected = theirs(originals, model, module, frames(size), **options)[0]
    assert np.abs(run(module, params, frames(size)) - expected).max() < TOLERANCE


def test_resampling_to_the_same_size_changes_nothing_and_weights_sum_to_one():
    np.testing.assert_array_equal(bicubic(5, 5), np.eye(5, dtype=np.float32))
    for old, new in ((14, 16), (16, 7), (3, 24)):
        np.testing.assert_allclose(bicubic(old, new).sum(1), 1, atol=1e-6)


# -- folders of code that is published with the weights -----------------------------------------

# Our name of a case -> (model_type, its keys from those of transformers, its names of tensors).
PUBLISHED_CODE = {
    "aimv2": ("aimv2", {}, {
        "embeddings.patch_embed.": "preprocessor.patchifier.proj.",
        "embeddings.rms_norm.": "preprocessor.patchifier.norm.",
        "embeddings.position_embedding.weight": "preprocessor.pos_embed",
        "encoder.layers": "trunk.blocks", "rms_norm1": "norm_1", "rms_norm2": "norm_2",
        "ffn.gate_proj": "mlp.fc1", "ffn.up_proj": "mlp.fc3", "ffn.down_proj": "mlp.fc2",
        "attention.out_proj": "attn.proj", "attention.": "attn.",
        "rms_norm.": "trunk.post_trunk_norm.",
    }),
    "internvit": ("intern_vit_6b", {
        "attention_bias": "qkv_bias", "use_qk_norm": "qk_normalization",
    }, {
        "embeddings.cls_token": "embeddings.class_embedding",
        "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
        "embeddings.position_embeddings": "embeddings.position_embedding",
        "encoder.layer": "encoder.layers", "layernorm_before": "norm1", "layernorm_after": "norm2",
        "lambda_": "ls", "attention.projection_layer": "attn.proj", "attention.": "attn.",
    }),
}  # fmt: skip
PUBLISHED_CODE["internvit, rms"] = PUBLISHED_CODE["internvit"]


@pytest.mark.parametrize("case", PUBLISHED_CODE)
def test_a_folder_of_its_publishers_code_gives_the_same_tokens(case, pair, tmp_path):
    """The names are those of the modules published with the weights; values are the original's."""
    model, folder = pair(case)
    model_type, keys, names = PUBLISHED_CODE[case]
    config = {keys.get(k, k): v for k, v in model.config.to_dict().items()}
    config |= {"model_type": model_type, "image_size": 32, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.startswith("head."):
            continue
        for old, new in names.items():
            name = name.replace(old, new)
        tensors[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for name in [name for name in tensors if ".attn.q_proj." in name]:
        three = [tensors.pop(name.replace("q_proj", f"{x}_proj")) for x in "qkv"]
        tensors[name.replace("q_proj", "qkv")] = np.concatenate(three)
    save_file(tensors, tmp_path / "model.safetensors")
    module, params, report = load(tmp_path)
    assert not report.unused
    reference = load(folder)
    np.testing.assert_array_equal(run(module, params, frames()), run(*reference[:2], frames()))


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


NAFLEX = {"num_patches": 1024, "patch_size": 16}


@pytest.mark.parametrize(
    ("config", "image_size"),
    [
        ({"model_type": "siglip2", "text_config": {}, "vision_config": NAFLEX}, 512),
        ({"model_type": "siglip2", "vision_config": {}}, 256),
        ({"model_type": "siglip", "vision_config": NAFLEX}, 512),
        ({"model_type": "siglip2_vision_model", **NAFLEX}, 512),
    ],
)
def test_a_siglip2_of_any_shape_is_read_at_the_square_grid_of_its_positions(
    config, image_size, tmp_path
):
    (tmp_path / "config.json").write_text(json.dumps(config))
    spec = describe(tmp_path)[1]
    assert (spec["image_size"], spec["patch"], spec["fit"]) == (image_size, 16, "stretch")


REFUSED = {
    "siglip2_vision_model": ({"num_patches": 250}, "num_patches=250: it is not the square"),
    "dinov3_vit": ({"query_bias": False}, "value_bias=True: only query_bias=False"),
    "internvl_vision": ({"use_qk_norm": True}, "use_qk_norm=True: it is read with norm_type='rms"),
    "intern_vit_6b": ({"norm_type": "layer_norm"}, "qk_normalization=True: it is read with"),
    "aimv2_vision_model": ({"hidden_act": "relu"}, "hidden_act='relu': only silu, "),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_what_is_computed_in_another_way_is_refused_by_key(model_type, tmp_path):
    keys, message = REFUSED[model_type]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **keys}))
    with pytest.raises(CheckpointError, match=message):
        describe(tmp_path)


# -- published sizes ---------------------------------------------------------------------------


def config(width, mlp, depth, heads, image, patch):
    return {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": depth,
            "num_attention_heads": heads, "image_size": image, "patch_size": patch}  # fmt: skip


# name: (model_type, config.json, parameters of transformers' model without pooling head and the
# norm behind CLIP's last layer)
# Above each where its sizes were read, on 2026-12-01: the defaults of transformers' configuration,
# which are those of this model; the architecture of timm or open_clip; a config.json.
PUBLISHED = {
    # open_clip's ViT-L-14
    "openai/clip-vit-large-patch14": (
        "clip_vision_model", config(1024, 4096, 24, 16, 224, 14), 303_179_776 - 2048),
    # defaults; open_clip's ViT-B-32
    "openai/clip-vit-base-patch32": (
        "clip_vision_model", config(768, 3072, 12, 12, 224, 32), 87_456_000 - 1536),
    # defaults
    "google/siglip-base-patch16-224": (
        "siglip_vision_model", config(768, 3072, 12, 12, 224, 16), 92_884_224 - 7_087_104),
    # file of a copy
    "google/siglip-so400m-patch14-384": (
        "siglip_vision_model", config(1152, 4304, 27, 16, 384, 14), 428_225_600 - 15_238_352),
    # timm's vit_small_patch14_dinov2
    "facebook/dinov2-small": (
        "dinov2", config(384, 0, 12, 6, 518, 14), 22_056_576 - 384),  # without the mask token
    # timm's vit_large_patch14_dinov2
    "facebook/dinov2-large": ("dinov2", config(1024, 0, 24, 16, 518, 14), 304_368_640 - 1024),
    # defaults
    "facebook/dinov3-vits16-pretrain-lvd1689m": (
        "dinov3_vit", config(384, 1536, 12, 6, 224, 16) | {"num_register_tokens": 4},
        21_596_544 - 384),
    # timm's vit_7b_patch16_dinov3
    "facebook/dinov3-vit7b16-pretrain-lvd1689m": (
        "dinov3_vit",
        config(4096, 8192, 40, 32, 224, 16)
        | {"num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu",
           "query_bias": False, "value_bias": False},
        6_716_035_072 - 4096),
    # defaults
    "apple/aimv2-large-patch14-224": (
        "aimv2", config(1024, 2816, 24, 8, 224, 14), 309_197_824),
    # defaults; timm's vit_intern300m_patch14_448
    "OpenGVLab/InternViT-300M-448px": (
        "intern_vit_6b",
        config(1024, 4096, 24, 16, 448, 14)
        | {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"},
        304_012_288),
    # defaults
    "google/siglip2-base-patch16-naflex": (
        "siglip2_vision_model", config(768, 3072, 12, 12, 0, 16) | {"image_size": 256},
        92_930_304 - 7_087_104),
    # open_clip's ViT-H-14-worldwide-quickgelu
    "facebook/metaclip-2-worldwide-huge-quickgelu": (
        "metaclip_2_vision_model", config(1280, 5120, 32, 16, 224, 14), 630_766_080 - 2560),
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
        source = family.names({})[0].source("/".join(k.key for k in path), leaf.shape)
        assert source is not None, path
