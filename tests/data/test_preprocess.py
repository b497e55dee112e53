"""Preprocessing as the encoders' own files say it, strictly; and Pillow's resampling."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vadapter.data.images import resize
from vadapter.data.preprocess import Preprocess, read_preprocess
from vadapter.errors import CheckpointError

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


def channels(mean_std) -> dict:
    return {"image_mean": list(mean_std[0]), "image_std": list(mean_std[1])}


STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
SCALE = {"rescale_factor": 0.00392156862745098}
SQUARE = {"height": 224, "width": 224}

CLIP_2021 = {  # openai/clip-vit-base-patch32
    "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "resample": 3, "size": 224,
    **channels(OPENAI),
}  # fmt: skip
CLIP = {
    **STEPS, **SCALE, **channels(OPENAI), "crop_size": SQUARE, "do_center_crop": True,
    "image_processor_type": "CLIPImageProcessor", "resample": 3, "size": {"shortest_edge": 224},
}  # fmt: skip
SIGLIP = {  # google/siglip-base-patch16-224
    **STEPS, **SCALE, **channels(HALF), "image_processor_type": "SiglipImageProcessor",
    "processor_class": "SiglipProcessor", "resample": 3, "size": SQUARE,
}  # fmt: skip
SIGLIP2 = {  # google/siglip2-base-patch16-384
    **SIGLIP, "image_processor_type": "SiglipImageProcessorFast", "resample": 2,
    "size": {"height": 384, "width": 384}, "do_convert_rgb": None, "do_center_crop": None,
    "crop_size": None,
}  # fmt: skip
DINOV2 = {  # facebook/dinov2-base
    **STEPS, **SCALE, **channels(IMAGENET), "image_processor_type": "BitImageProcessor",
    "crop_size": SQUARE, "do_center_crop": True, "resample": 3, "size": {"shortest_edge": 256},
}  # fmt: skip
MOBILENET = {  # google/mobilenet_v2_1.0_224
    **DINOV2, **channels(HALF), "image_processor_type": "MobileNetV2ImageProcessor", "resample": 2,
}  # fmt: skip
COCA = {  # laion/CoCa-ViT-B-32-laion2B-s13B-b90k
    "model_cfg": {"embed_dim": 512, "vision_cfg": {"image_size": 224, "patch_size": 32}},
    "preprocess_cfg": {"mean": list(OPENAI[0]), "std": list(OPENAI[1])},
}  # fmt: skip
SQUASHED = {
    "model_cfg": {"vision_cfg": {"image_size": 256}},
    "preprocess_cfg": {
        "size": 224, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3,
        "interpolation": "bilinear", "resize_mode": "squash", "fill_color": 0,
    },
}  # fmt: skip

READ = {
    "CLIP of 2021": (CLIP_2021, Preprocess(224, 224, "crop", "bicubic", True, *OPENAI)),
    "CLIP": (CLIP, Preprocess(224, 224, "crop", "bicubic", True, *OPENAI)),
    "SigLIP": (SIGLIP, Preprocess(224, 224, "stretch", "bicubic", True, *HALF)),
    "SigLIP 2": (SIGLIP2, Preprocess(384, 384, "stretch", "bilinear", True, *HALF)),
    "DINOv2": (DINOV2, Preprocess(224, 256, "crop", "bicubic", True, *IMAGENET)),
    "MobileNetV2": (MOBILENET, Preprocess(224, 256, "crop", "bilinear", True, *HALF)),
    "CoCa": (COCA, Preprocess(224, 224, "crop", "bicubic", False, *OPENAI)),
    "squashed": (SQUASHED, Preprocess(256, 256, "stretch", "bilinear", False, *HALF)),
}


def write(folder: Path, config: object) -> Path:
    clip = isinstance(config, dict) and "preprocess_cfg" in config
    name = "open_clip_config.json" if clip else "preprocessor_config.json"
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", READ)
def test_the_files_of_published_encoders_are_understood(tmp_path, name):
    config, want = READ[name]
    assert read_preprocess(write(tmp_path, config)) == want


def test_the_file_of_newer_folders_holds_the_processor_in_a_group(tmp_path):
    group = {"image_processor": SIGLIP, "processor_class": "SiglipProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(group))
    assert read_preprocess(tmp_path) == READ["SigLIP"][1]
    assert read_preprocess(write(tmp_path, CLIP)) == READ["CLIP"][1]  # it comes first


def test_without_normalisation_pixels_are_only_scaled(tmp_path):
    got = read_preprocess(write(tmp_path, {**CLIP, "do_normalize": False}))
    assert (got.mean, got.std) == ((0, 0, 0), (1, 1, 1))


def test_another_resolution_keeps_the_share_that_is_cut_off():
    dino = READ["DINOv2"][1].at(448)
    assert (dino.size, dino.short) == (448, 512)
    assert READ["SigLIP"][1].at(288) == Preprocess(288, 288, "stretch", "bicubic", True, *HALF)


REFUSED = {
    "not an object": ([], "not a JSON object"),
    "nothing in it": ({}, "image_processor_type 'None' is unknown; known: BitImageProcessor"),
    "NaFlex": ({**SIGLIP, "image_processor_type": "Siglip2ImageProcessor"}, "did you mean 'Siglip"),
    "language": ({**CLIP, "image_processor_type": "Qwen2VLImageProcessor"}, "unknown"),
    "no resizing": ({**CLIP, "do_resize": False}, "do_resize=False"),
    "no scaling": ({**CLIP, "do_rescale": False}, "do_rescale=False"),
    "padding": ({**CLIP, "do_pad": True}, "do_pad=True"),
    "another scale": ({**CLIP, "rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
    "no square": ({**CLIP, "do_center_crop": False}, "gives no square of fixed size"),
    "a border": ({**DINOV2, "size": {"shortest_edge": 200}}, "or one with a border"),
    "squashed, then cut": ({**CLIP, "size": {"height": 256, "width": 256}}, "gives no square"),
    "an oblong": ({**SIGLIP, "size": {"height": 224, "width": 448}}, "size={'height': 224, 'w"),
    "the long side": ({**CLIP, "size": {"longest_edge": 224}}, "not the side of a square"),
    "a range": ({**CLIP, "size": {"shortest_edge": 224, "longest_edge": 448}}, "not the side"),
    "no size": ({k: v for k, v in SIGLIP.items() if k != "size"}, "size=None"),
    "no pixels": ({**CLIP, "crop_size": 0}, "crop_size=0"),
    "half pixels": ({**CLIP, "crop_size": 224.5}, "crop_size=224.5"),
    "Lanczos": ({**CLIP, "resample": 1}, "resample=1 is not bilinear (2) or bicubic (3)"),
    "no resampling": ({k: v for k, v in CLIP.items() if k != "resample"}, "resample=None"),
    "two channels": ({**CLIP, "image_mean": [0.5, 0.5]}, "image_mean=[0.5, 0.5] is not three"),
    "no spread": ({**CLIP, "image_std": [0.5, 0, 0.5]}, "not three positive numbers"),
    "words": ({**CLIP, "image_mean": "imagenet"}, "image_mean='imagenet'"),
    "open_clip, long side": (
        {**COCA, "preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode='longest'"
    ),
    "open_clip, any": ({**COCA, "preprocess_cfg": {"interpolation": "random"}}, "='random' is not"),
    "open_clip, misspelt": (
        {**COCA, "preprocess_cfg": {"resizemode": "squash"}},
        "preprocess_cfg.resizemode is unknown; did you mean 'resize_mode'?",
    ),
    "open_clip, no model": ({"preprocess_cfg": {}}, "its model_cfg is None"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_exactly_is_refused_by_file_and_key(tmp_path, name):
    config, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        read_preprocess(write(tmp_path, config))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_the_file_or_with_half_of_it_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected one of preprocessor_config\.json, "):
        read_preprocess(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224')
    with pytest.raises(CheckpointError, match=r"Cannot use .*preprocessor_config\.json"):
        read_preprocess(tmp_path)


RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
SHAPES = [(375, 500), (500, 333), (240, 320), (100, 150), (64, 97), (224, 224), (50, 400)]


def picture(height: int, width: int) -> np.ndarray:
    """Like a photo: structure of all sizes, hard edges, saturated areas and noise."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 9, 30, 90):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize((width, height), RESAMPLE["bicubic"]))
    y, x = np.mgrid[:height, :width]
    pixels /= 4
    pixels[np.hypot(x - width / 3, y - height / 2) < min(height, width) / 5] = 255
    pixels[(x // 9 + y // 7) % 11 == 0] = 0
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("mode", RESAMPLE)
@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_stretching_is_pillows_own(shape, size, mode):
    pixels = picture(*shape)
    want = np.asarray(Image.fromarray(pixels).resize((size, size), RESAMPLE[mode]))
    np.testing.assert_array_equal(resize(pixels[None], size, mode=mode, fit="stretch")[0], want)


@pytest.mark.parametrize("name", ["CLIP", "DINOv2", "MobileNetV2", "CoCa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cropping_is_pillows_resize_and_the_centre_of_it(shape, name):
    pixels, how = picture(*shape), READ[name][1]
    got = resize(
        pixels[None], how.size, mode=how.mode, fit=how.fit, short=how.short, floor=how.floor
    )
    height, width = (how.short * side // min(shape) for side in shape)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLE[how.mode]))
    half = (lambda n: n // 2) if how.floor else (lambda n: round(n / 2))
    top, left = half(height - how.size), half(width - how.size)
    np.testing.assert_array_equal(got[0], whole[top : top + how.size, left : left + how.size])
