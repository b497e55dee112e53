"""Preprocessor files of published encoders, and images like photos."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

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
DINOV3 = {  # facebook/dinov3-vits16-pretrain-lvd1689m
    **STEPS, **SCALE, **channels(IMAGENET), "image_processor_type": "DINOv3ViTImageProcessorFast",
    "crop_size": None, "do_center_crop": None, "resample": 2, "size": SQUARE,
}  # fmt: skip
NAFLEX = {  # google/siglip2-base-patch16-naflex
    **STEPS, **SCALE, **channels(HALF), "image_processor_type": "Siglip2ImageProcessor",
    "max_num_patches": 256, "patch_size": 16, "resample": 2,
}  # fmt: skip
MOBILENET = {  # google/mobilenet_v2_1.0_224
    **DINOV2, **channels(HALF), "image_processor_type": "MobileNetV2ImageProcessor", "resample": 2,
}  # fmt: skip
VIDEOMAE = {  # MCG-NJU/videomae-base
    **STEPS, **SCALE, **channels(IMAGENET), "image_processor_type": "VideoMAEImageProcessor",
    "crop_size": SQUARE, "do_center_crop": True, "resample": 2, "size": {"shortest_edge": 224},
}  # fmt: skip
VJEPA2 = {  # facebook/vjepa2-vitl-fpc64-256, in video_preprocessor_config.json
    **STEPS, **SCALE, **channels(IMAGENET), "video_processor_type": "VJEPA2VideoProcessor",
    "crop_size": {"height": 256, "width": 256}, "do_center_crop": True, "resample": 2,
    "size": {"shortest_edge": 292}, "return_metadata": False,
}  # fmt: skip
GEMMA3 = {  # google/gemma-3-4b-it
    **STEPS, **SCALE, **channels(HALF), "image_processor_type": "Gemma3ImageProcessor",
    "do_pan_and_scan": None, "resample": 2, "size": {"height": 896, "width": 896},
}  # fmt: skip
SMOLVLM = {  # HuggingFaceTB/SmolVLM-256M-Instruct
    **STEPS, **SCALE, **channels(HALF), "image_processor_type": "Idefics3ImageProcessor",
    "do_image_splitting": True, "do_pad": True, "max_image_size": {"longest_edge": 512},
    "resample": 1, "size": {"longest_edge": 2048},
}  # fmt: skip
QWEN2_5_VL = {  # Qwen/Qwen2.5-VL-7B-Instruct
    **channels(OPENAI), "image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136,
    "max_pixels": 12845056, "merge_size": 2, "patch_size": 14, "temporal_patch_size": 2,
    "resample": 3,
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


def write_processor(folder: Path, config: object) -> Path:
    clip = isinstance(config, dict) and "preprocess_cfg" in config
    name = "open_clip_config.json" if clip else "preprocessor_config.json"
    if isinstance(config, dict) and "video_processor_type" in config:
        name = "video_preprocessor_config.json"
    (folder / name).write_text(json.dumps(config))
    return folder


def image(height: int, width: int) -> np.ndarray:
    """Like a photo: structure of all sizes, hard edges, saturated areas and noise."""
    rng = np.random.default_rng(0)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 9, 30, 90):
        noise = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        pixels += np.asarray(
            Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        )
    y, x = np.mgrid[:height, :width]
    pixels /= 4
    pixels[np.hypot(x - width / 3, y - height / 2) < min(height, width) / 5] = 255
    pixels[(x // 9 + y // 7) % 11 == 0] = 0
    return np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
