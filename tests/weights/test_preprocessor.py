"""Preprocessing as the encoders' own files say it, strictly; and Pillow's resampling."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image
from support.processors import (
    CLIP,
    CLIP_2021,
    COCA,
    DINOV2,
    DINOV3,
    GEMMA3,
    HALF,
    IMAGENET,
    MOBILENET,
    NAFLEX,
    OPENAI,
    QWEN2_5_VL,
    SIGLIP,
    SIGLIP2,
    SMOLVLM,
    SQUASHED,
    VIDEOMAE,
    VJEPA2,
    image,
    write_processor,
)

from vadapter.data.media.images import ImageTransform, resize
from vadapter.errors import CheckpointError
from vadapter.weights.preprocessor import Preprocess, read_preprocess

READ = {
    "CLIP of 2021": (CLIP_2021, Preprocess(ImageTransform(224, floor=True), *OPENAI)),
    "CLIP": (CLIP, Preprocess(ImageTransform(224, floor=True), *OPENAI)),
    "SigLIP": (SIGLIP, Preprocess(ImageTransform(224, "stretch", floor=True), *HALF)),
    "SigLIP 2": (
        SIGLIP2,
        Preprocess(ImageTransform(384, "stretch", "bilinear", floor=True), *HALF),
    ),
    "DINOv2": (DINOV2, Preprocess(ImageTransform(224, crop_pct=0.875, floor=True), *IMAGENET)),
    "SigLIP 2 NaFlex": (
        NAFLEX,
        Preprocess(ImageTransform(256, "stretch", "bilinear", floor=True), *HALF),
    ),
    "DINOv3": (
        DINOV3,
        Preprocess(ImageTransform(224, "stretch", "bilinear", floor=True), *IMAGENET),
    ),
    "MobileNetV2": (
        MOBILENET,
        Preprocess(ImageTransform(224, "crop", "bilinear", 0.875, True), *HALF),
    ),
    "VideoMAE": (
        VIDEOMAE,
        Preprocess(ImageTransform(224, "crop", "bilinear", floor=True), *IMAGENET),
    ),
    "V-JEPA 2": (
        VJEPA2,
        Preprocess(ImageTransform(256, "crop", "bilinear", 256 / 292, True), *IMAGENET),
    ),
    "V-JEPA 2, whose size follows from the crop": (
        {**VJEPA2, "crop_size": 384, "size": {"shortest_edge": 292}},
        Preprocess(ImageTransform(384, "crop", "bilinear", 384 / 438, True), *IMAGENET),
    ),
    "Gemma 3": (GEMMA3, Preprocess(ImageTransform(896, "stretch", "bilinear", floor=True), *HALF)),
    "SmolVLM": (SMOLVLM, Preprocess(ImageTransform(512, "stretch", "lanczos", floor=True), *HALF)),
    "Qwen2.5-VL": (QWEN2_5_VL, Preprocess(ImageTransform(448, "stretch", floor=True), *OPENAI)),
    "CoCa": (COCA, Preprocess(ImageTransform(224), *OPENAI)),
    "squashed": (SQUASHED, Preprocess(ImageTransform(256, "stretch", "bilinear"), *HALF)),
}


@pytest.mark.parametrize("name", READ)
def test_the_files_of_published_encoders_are_understood(tmp_path, name):
    config, want = READ[name]
    assert read_preprocess(write_processor(tmp_path, config)) == want


def test_the_file_of_newer_folders_holds_the_processor_in_a_group(tmp_path):
    group = {"image_processor": SIGLIP, "processor_class": "SiglipProcessor"}
    (tmp_path / "processor_config.json").write_text(json.dumps(group))
    assert read_preprocess(tmp_path) == READ["SigLIP"][1]
    assert read_preprocess(write_processor(tmp_path, CLIP)) == READ["CLIP"][1]  # it comes first


def test_without_normalization_pixels_are_only_scaled(tmp_path):
    got = read_preprocess(write_processor(tmp_path, {**CLIP, "do_normalize": False}))
    assert (got.mean, got.std) == ((0, 0, 0), (1, 1, 1))


def test_another_resolution_keeps_the_share_that_is_cut_off():
    view = READ["DINOv2"][1].view
    assert (view.size, view.short) == (224, 256)
    assert dataclasses.replace(view, size=448).short == 512


REFUSED = {
    "not an object": ([], "not a JSON object"),
    "nothing in it": ({}, "image_processor_type 'None' is not read; those that are: CLIPIm"),
    "NaFlex": (
        {**SIGLIP, "image_processor_type": "Siglip2ImageProcessor", "max_num_patches": 25.5},
        "max_num_patches=25.5",
    ),
    "language": ({**CLIP, "image_processor_type": "PixtralImageProcessor"}, "not read"),
    "a video's": ({**VJEPA2, "video_processor_type": "VideoProcessor"}, "'VideoProcessor' is not "),
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
    "nearest": ({**CLIP, "resample": 0}, "resample=0 is not bilinear (2), bicubic (3) or lanc"),
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
def test_unsupported_settings_are_refused_by_file_and_key(tmp_path, name):
    config, message = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        read_preprocess(write_processor(tmp_path, config))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_the_file_or_with_a_truncated_one_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected one of preprocessor_config\.json, "):
        read_preprocess(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224')
    with pytest.raises(CheckpointError, match=r"Cannot use .*preprocessor_config\.json"):
        read_preprocess(tmp_path)


RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
            "lanczos": Image.Resampling.LANCZOS}  # fmt: skip
SHAPES = [(375, 500), (500, 333), (240, 320), (100, 150), (64, 97), (224, 224), (50, 400)]


@pytest.mark.parametrize("mode", RESAMPLE)
@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_stretching_is_pillows_own(shape, size, mode):
    pixels = image(*shape)
    want = np.asarray(Image.fromarray(pixels).resize((size, size), RESAMPLE[mode]))
    np.testing.assert_array_equal(
        resize(pixels[None], ImageTransform(size, "stretch", mode))[0], want
    )


@pytest.mark.parametrize("name", ["CLIP", "DINOv2", "MobileNetV2", "V-JEPA 2", "CoCa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_cropping_is_pillows_resize_and_the_center_of_it(shape, name):
    pixels, how = image(*shape), READ[name][1].view
    got = resize(pixels[None], how)
    height, width = (how.short * side // min(shape) for side in shape)
    whole = np.asarray(Image.fromarray(pixels).resize((width, height), RESAMPLE[how.interpolation]))
    half = (lambda n: n // 2) if how.floor else (lambda n: round(n / 2))
    top, left = half(height - how.size), half(width - how.size)
    np.testing.assert_array_equal(got[0], whole[top : top + how.size, left : left + how.size])
