"""Public video encoders: small random checkpoints of the original library give the same tokens."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.original import their_warnings
from support.public_models import read_checkpoint
from support.cases import some_slow

from vadapter.errors import ConfigError
from vadapter.models.registry import make_module
from vadapter.weights.families.video import FAMILIES
from vadapter.weights.hf_checkpoint import Checkpoint

VJEPA2 = {"hidden_size": 36, "num_attention_heads": 3, "num_hidden_layers": 3, "mlp_ratio": 1.5,
          "patch_size": 6, "crop_size": 24, "frames_per_clip": 8, "pred_hidden_size": 12,
          "pred_num_attention_heads": 1, "pred_num_hidden_layers": 1, "num_pooler_layers": 1}  # fmt: skip
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


def load(folder, **overrides):
    checkpoint = Checkpoint.open(folder)
    module = make_module("encoder", dict(checkpoint.spec) | overrides)
    size = module.config.image_size
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
    params, report = read_checkpoint(checkpoint, nn.unbox(shapes)["params"])
    return module, params, report


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


def run(module, params, pixels):
    return np.asarray(jax.jit(module.apply)({"params": params}, pixels))


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
