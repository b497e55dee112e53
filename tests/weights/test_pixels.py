"""A public encoder sees what its own processor makes of an image: recipe, row and tokens."""

import tempfile
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from einops import rearrange
from PIL import Image
from support.original import their_warnings
from support.processors import (
    CLIP,
    DINOV2,
    DINOV3,
    NAFLEX,
    SIGLIP,
    SIGLIP2,
    image,
    write_processor,
)
from support.public_models import read_checkpoint
from support.recipes import draw, tiny_recipe
from support.sources import ListSource

from vadapter.data.example import Example
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import resize
from vadapter.data.open import make_stream
from vadapter.models.registry import make_module
from vadapter.recipe.schema import read
from vadapter.weights.hf_checkpoint import Checkpoint
from vadapter.weights.preprocessor import read_preprocess

BASE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MLP = BASE | {"intermediate_size": 48}
# The processors' settings are the published ones; DINOv2's positions are of 518 pixels.
CASES = {
    "CLIP": ("CLIPVision", MLP | {"image_size": 224, "patch_size": 32}, CLIP),
    "SigLIP": ("SiglipVision", MLP | {"image_size": 224, "patch_size": 32}, SIGLIP),
    "SigLIP 2": ("SiglipVision", MLP | {"image_size": 384, "patch_size": 32}, SIGLIP2),
    "DINOv2": ("Dinov2", BASE | {"image_size": 518, "patch_size": 14, "mlp_ratio": 2}, DINOV2),
}
SHAPES = [(375, 501), (500, 333), (331, 257), (101, 150), (225, 224), (97, 641)]
EQUAL = 1e-3 / 255  # the same level of 255, but for the rounding of normalized pixels
TOLERANCE = 2e-5  # of the largest token, as for equal pixels


@pytest.fixture(scope="module")
def pair(original_of):
    """case -> (the original model, its folder with a preprocessor file), made once."""

    def build(transformers, case):
        kind, keys, _ = CASES[case]
        config = getattr(transformers, f"{kind}Config")(**keys)
        config._attn_implementation = "eager"
        return getattr(transformers, f"{kind}Model")(config)

    make = original_of(build)

    def with_processor(case):
        model, folder = make(case)
        return model, write_processor(folder, CASES[case][2])

    return with_processor


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def ours(pair, shapes, tmp_path):
    """(case, height and width, keys of the encoder) -> (module, Image, frames u8[1,S,S,3])."""

    def make(case, shape, **encoder):
        config = tiny_recipe(shapes)
        with config.unlocked():
            config.components.encoder = {"weights": str(pair(case)[1]), **encoder}
        recipe = read(config)
        module = make_module("encoder", recipe.components["encoder"])
        file = tmp_path / "image.png"
        Image.fromarray(image(*shape)).save(file)
        source = ListSource([Example("image", file, ("a bar",))])
        data = recipe.data["images"]
        items, transform = make_stream("images", data, source, Words(), module.view)  # type: ignore[attr-defined]
        row = transform(items[0])
        assert not row["bad"]
        return module, Image.fromarray(load_media(file, frames=1)[0]), row["frames"]

    return make


def read_processor(config):
    """The view of a preprocessor file."""
    with tempfile.TemporaryDirectory() as folder:
        return read_preprocess(write_processor(Path(folder), config)).view


class Words:
    bos_id, eos_id = 1, 2

    def encode(self, text, *, start=False):
        return [3] * len(text.split())


def theirs(originals, folder, image, **options):
    """Their processor's pixels, f32[1,3,S,S], normalized."""
    _, transformers = originals
    with their_warnings():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return processor(image, return_tensors="pt", **options)["pixel_values"]


def difference(pixels, module, frames):
    """The largest between their pixels and ours, in 0..1."""
    mean, std = np.array(module.config.mean), np.array(module.config.std)
    assert pixels.shape == (1, 3, *frames.shape[1:3])
    return np.abs(pixels[0].numpy().transpose(1, 2, 0) * std + mean - frames[0] / 255).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_a_row_has_the_pixels_of_the_original_processor(case, shape, ours, pair, originals):
    module, image, frames = ours(case, shape)
    pixels = theirs(originals, pair(case)[1], image)
    assert difference(pixels, module, frames) < EQUAL


LARGER = {
    "CLIP": (288, {"size": {"shortest_edge": 288}, "crop_size": {"height": 288, "width": 288}}),
    "SigLIP": (256, {"size": {"height": 256, "width": 256}}),
    "DINOv2": (448, {"size": {"shortest_edge": 512}, "crop_size": {"height": 448, "width": 448}}),
}


@pytest.mark.parametrize("case", LARGER)
def test_another_resolution_cuts_off_the_same_share(case, ours, pair, originals):
    size, options = LARGER[case]
    for shape in SHAPES[:3]:
        module, image, frames = ours(case, shape, image_size=size)
        assert frames.shape == (1, size, size, 3)
        pixels = theirs(originals, pair(case)[1], image, **options)
        assert difference(pixels, module, frames) < EQUAL


@pytest.mark.parametrize("case", ["CLIP", "SigLIP", "DINOv2"])
def test_tokens_of_our_pixels_are_those_of_the_original_model_and_processor(
    case, ours, pair, originals
):
    torch, _ = originals
    model, folder = pair(case)
    for shape in SHAPES[:2]:
        module, image, frames = ours(case, shape)
        size = module.view.size
        shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1, size, size, 3)))
        params, _ = read_checkpoint(Checkpoint.open(folder), nn.unbox(shapes)["params"])
        tokens = np.asarray(jax.jit(module.apply)({"params": params}, frames[None]))[0, 0]
        with torch.no_grad(), their_warnings():
            out = model(theirs(originals, folder, image)).last_hidden_state[0].numpy()
        expected = out[int(module.config.class_token) :]
        assert tokens.shape == expected.shape == (module.tokens_per_frame(), 32)
        assert np.abs(expected).max() > 1
        assert np.abs(tokens - expected).max() < TOLERANCE * np.abs(expected).max()


def test_pixels_of_dinov3_are_within_one_level_of_its_processor(originals):
    """It resizes in floating point; here what is resized are bytes, as Pillow resizes them."""
    _, transformers = originals
    with their_warnings():
        processor = transformers.DINOv3ViTImageProcessor(**DINOV3)
    view, scale = read_processor(DINOV3), np.array(DINOV3["image_std"])
    for shape in SHAPES:
        pixels = processor(Image.fromarray(image(*shape)), return_tensors="pt")["pixel_values"]
        theirs = pixels[0].numpy().transpose(1, 2, 0) * scale + np.array(DINOV3["image_mean"])
        levels = np.abs(theirs * 255 - resize(image(*shape)[None], view)[0])
        assert levels.max() < 1.01
        assert levels.mean() < 0.35


@pytest.mark.parametrize("side", [97, 256, 411])
def test_pixels_of_a_square_image_are_those_of_the_naflex_processor(side, originals):
    _, transformers = originals
    with their_warnings():
        processor = transformers.Siglip2ImageProcessorPil(**NAFLEX)
    out = processor(Image.fromarray(image(side, side)), return_tensors="pt")
    assert out["spatial_shapes"].tolist() == [[16, 16]]
    theirs = rearrange(
        out["pixel_values"][0].numpy(), "(h w) (p q c) -> (h p) (w q) c", h=16, p=16, q=16
    )
    ours = resize(image(side, side)[None], read_processor(NAFLEX))[0] / 255 * 2 - 1
    assert np.abs(ours - theirs).max() < EQUAL * 2
