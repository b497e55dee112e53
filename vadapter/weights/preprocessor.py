"""Image preprocessing of a public encoder, from the preprocessor file beside its weights.

Supported are preprocessor_config.json, or processor_config.json of newer folders, of the image
processors in the table below, and the preprocess_cfg of open_clip_config.json.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vadapter.config import nearest
from vadapter.data.image_transform import Fit, ImageTransform, Interpolation
from vadapter.errors import CheckpointError

# open_clip.constants, for a file that leaves them out
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# image processor -> whether it crops the center if its file does not say
PROCESSORS = {
    "CLIPImageProcessor": True,
    "BitImageProcessor": True,
    "MobileNetV2ImageProcessor": True,
    "VideoMAEImageProcessor": True,
    "SiglipImageProcessor": False,
    "Siglip2ImageProcessor": False,
    "DINOv3ViTImageProcessor": False,
    "ViTImageProcessor": False,
}
_GRID = 32  # patches a side of the square that images of any shape become
# Processors of vision-language models, which cut an image into several or keep its shape: from
# their file to that of a processor above, whose square is what the encoder sees of an image that is
# one piece. Those of any shape are stretched to `_GRID` patches a side.
SQUARES: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "LlavaImageProcessor": lambda c: {**c, "image_processor_type": "CLIPImageProcessor"},
    "LlavaOnevisionImageProcessor": lambda c: _stretched(c, c.get("size")),
    "Gemma3ImageProcessor": lambda c: _stretched(c, c.get("size")),
    "Idefics3ImageProcessor": lambda c: _stretched(c, _longest(c)),
    "SmolVLMImageProcessor": lambda c: _stretched(c, _longest(c)),
    "Qwen2VLImageProcessor": lambda c: _stretched(c, _grid(c)),
}
# video processor -> what its file may leave out
VIDEO_PROCESSORS = {
    "VJEPA2VideoProcessor": {
        "crop_size": 256, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD,
    },
    "VideoMAEVideoProcessor": {
        "size": {"shortest_edge": 224}, "crop_size": 224, "image_mean": 0.5, "image_std": 0.5,
    },
}  # fmt: skip
_INTERPOLATIONS: dict[int | str, Interpolation] = {  # numbers are Pillow's
    1: "lanczos", 2: "bilinear", 3: "bicubic", "lanczos": "lanczos", "bilinear": "bilinear",
    "bicubic": "bicubic",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """The transform of an image on the host, and the normalization of its pixels on the device."""

    view: ImageTransform
    mean: tuple[float, ...]  # of the channels: (pixel / 255 - mean) / std
    std: tuple[float, ...]

    def fields(self) -> dict[str, Any]:
        """Return the fields of an encoder's configuration."""
        view = self.view.fields
        return {"image_size": view.pop("size"), **view, "mean": self.mean, "std": self.std}


def read_preprocess(folder: Path) -> Preprocess:
    """Read the preprocessing of the encoder in `folder` from the first of the files above.

    Raises:
      CheckpointError: no such file, a processor that is not in the table, or an unsupported step.
        Names the file and the key.

    Source: the image processors of `transformers`; `open_clip.transform.image_transform`.
    """
    for name, read in PREPROCESSORS.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_bytes())
            if not isinstance(config, dict):
                raise ValueError("it is not a JSON object")
            return read(config)
        except ValueError as error:
            raise CheckpointError(f"Cannot use {path}: {error}.") from error
    raise CheckpointError(
        f"No preprocessing in {folder}: expected one of {', '.join(PREPROCESSORS)} beside the "
        "weights of an encoder. Fetch it from where they come from."
    )


def _processor(config: Mapping[str, Any]) -> Preprocess:
    name = str(config.get("image_processor_type", config.get("feature_extractor_type")))
    kind = name.removesuffix("Fast").removesuffix("Pil")
    kind = kind.replace("FeatureExtractor", "ImageProcessor")
    if kind in SQUARES:
        return _processor(SQUARES[kind](config))
    if kind not in PROCESSORS:
        raise ValueError(f"image_processor_type {name!r} is not read; {_known(PROCESSORS)}")
    if kind == "Siglip2ImageProcessor":
        config = _naflex(config)
    for key, only in (("do_resize", True), ("do_rescale", True), ("do_pad", False)):
        if (config.get(key, only) or False) is not only:
            raise ValueError(f"{key}={config[key]!r} is not supported")
    factor = config.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-5:
        raise ValueError(f"rescale_factor={factor!r} is not 1/255")
    cut = config.get("do_center_crop", PROCESSORS[kind])
    size, square = _size(config, "size", square=not PROCESSORS[kind])
    crop = _size(config, "crop_size", square=True)[0] if cut else size
    if crop > size or (square and crop != size) or not (square or cut):
        raise ValueError(
            f"size={config['size']!r} with crop_size={config.get('crop_size')!r} and "
            f"do_center_crop={cut} gives no square of fixed size, or one with a border"
        )
    normalize = config.get("do_normalize", True)
    fit, interpolation = "stretch" if square else "crop", _interpolation(config, "resample")
    return Preprocess(
        ImageTransform(crop, fit, interpolation, crop_pct=crop / size, floor=True),
        mean=_channels(config, "image_mean") if normalize else (0.0,) * 3,
        std=_channels(config, "image_std", positive=True) if normalize else (1.0,) * 3,
    )


def _known(names: Iterable[str]) -> str:
    return f"those that are: {', '.join(names)}"


def _stretched(config: Mapping[str, Any], size: Any) -> dict[str, Any]:
    """Return the file of a processor that stretches an image to a square, and does no more."""
    changed = {"image_processor_type": "SiglipImageProcessor", "size": size, "do_pad": False}
    return {**config, **changed, "do_center_crop": False}


def _grid(config: Mapping[str, Any]) -> int:
    if type(patch := config.get("patch_size", 14)) is not int:
        raise ValueError(f"patch_size={patch!r} is not a whole number")
    return _GRID * patch


def _longest(config: Mapping[str, Any]) -> Any:
    return _group(config, "max_image_size").get("longest_edge")


def _video(config: Mapping[str, Any]) -> Preprocess:
    """Read a video's file; V-JEPA 2 ignores its `size`, which follows from the crop."""
    name = str(config.get("video_processor_type"))
    if name not in VIDEO_PROCESSORS:
        raise ValueError(f"video_processor_type {name!r} is not read; {_known(VIDEO_PROCESSORS)}")
    config = {"resample": 2, "do_center_crop": True, **VIDEO_PROCESSORS[name], **config}
    config["image_processor_type"] = "VideoMAEImageProcessor"
    if name == "VJEPA2VideoProcessor":
        crop, _ = _size(config, "crop_size", square=True)
        config["size"] = {"shortest_edge": int(crop * 256 / 224)}
    return _processor(config)


def _naflex(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the processor of images of any shape as one of the largest square that it makes."""
    defaults = {"patch_size": 16, "max_num_patches": 256, "resample": 2}
    config = {**defaults, **config}
    for key in defaults:
        if type(config[key]) is not int or config[key] < 1:
            raise ValueError(f"{key}={config[key]!r} is not a whole number above 0")
    return {**config, "size": math.isqrt(config["max_num_patches"]) * config["patch_size"]}


def _open_clip(config: Mapping[str, Any]) -> Preprocess:
    vision = _group(_group(config, "model_cfg"), "vision_cfg")
    defaults = {
        "size": vision.get("image_size", 224), "mode": "RGB", "mean": OPENAI_MEAN,
        "std": OPENAI_STD, "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0,
    }  # fmt: skip
    own = _group(config, "preprocess_cfg")
    for key in own:
        if key not in defaults:
            raise ValueError(f"preprocess_cfg.{key} is unknown{nearest(key, defaults)}")
    cfg = {**defaults, **own}
    if "image_size" in vision:  # the model's own size counts
        cfg["size"] = vision["image_size"]
    fits: dict[str, Fit] = {"shortest": "crop", "squash": "stretch"}
    if cfg["resize_mode"] not in fits or cfg["mode"] != "RGB":
        raise ValueError(
            f"resize_mode={cfg['resize_mode']!r}, mode={cfg['mode']!r} is not supported; only "
            "'shortest' or 'squash', and 'RGB'"
        )
    size, _ = _size(cfg, "size", square=True)
    transform = ImageTransform(size, fits[cfg["resize_mode"]], _interpolation(cfg, "interpolation"))
    return Preprocess(transform, _channels(cfg, "mean"), _channels(cfg, "std", positive=True))


def preprocess_of_timm(config: Mapping[str, Any]) -> Preprocess:
    """Return the preprocessing of timm's `pretrained_cfg`, as for validation.

    Raises:
      ValueError: a step that is not supported; names the key.

    Source: `transforms_imagenet_eval` of timm.
    """
    shape = config.get("input_size")
    if not isinstance(shape, list | tuple) or len(shape) != 3 or shape[0] != 3:
        raise ValueError(f"input_size={shape!r} is not [3, height, width]")
    size, _ = _size({"input_size": [*shape[1:]]}, "input_size", square=True)
    share, mode = config.get("crop_pct") or 0.875, config.get("crop_mode") or "center"
    if mode not in ("center", "squash") or not isinstance(share, int | float):
        raise ValueError(f"crop_mode={mode!r}, crop_pct={share!r} is not supported")
    if mode == "squash" and share != 1:
        raise ValueError(f"crop_mode='squash' is supported with crop_pct=1 alone, not {share!r}")
    fit: Fit = "stretch" if mode == "squash" else "crop"
    view = ImageTransform(size, fit, _interpolation(config, "interpolation"), float(share))
    return Preprocess(view, _channels(config, "mean"), _channels(config, "std", positive=True))


def _group(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(config.get(key), dict):
        raise ValueError(f"its {key} is {config.get(key)!r}, not a group of keys")
    return config[key]


def _size(config: Mapping[str, Any], key: str, *, square: bool) -> tuple[int, bool]:
    """Return pixels, and whether both sides have that size; for a plain number, as `square`."""
    value = config.get(key)
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if v is not None}
        square = set(value) != {"shortest_edge"}
        sides = [value[k] for k in value if k in ("height", "width", "shortest_edge")]
        valid = set(value) in ({"height", "width"}, {"shortest_edge"})
    else:
        sides = value if isinstance(value, list | tuple) else [value]
        valid = len(sides) in (1, 2)
    if not valid or len(set(map(str, sides))) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise ValueError(f"{key}={config.get(key)!r} is not the side of a square in pixels")
    return sides[0], square


def _interpolation(config: Mapping[str, Any], key: str) -> Interpolation:
    value = config.get(key)
    if not isinstance(value, int | str) or value not in _INTERPOLATIONS:
        raise ValueError(f"{key}={value!r} is not bilinear (2), bicubic (3) or lanczos (1)")
    return _INTERPOLATIONS[value]


def _channels(config: Mapping[str, Any], key: str, *, positive: bool = False) -> tuple[float, ...]:
    value = config.get(key)
    values = [value] * 3 if isinstance(value, int | float) else value
    good = lambda x: isinstance(x, int | float) and math.isfinite(x) and (x > 0 or not positive)  # noqa: E731
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(good, values)):
        raise ValueError(f"{key}={value!r} is not three {'positive ' * positive}numbers")
    return tuple(map(float, values))


# Preprocessor files, in order of preference -> their reader.
PREPROCESSORS = {
    "preprocessor_config.json": _processor,
    "processor_config.json": lambda c: _processor(_group(c, "image_processor")),
    "video_preprocessor_config.json": _video,
    "open_clip_config.json": _open_clip,
}
