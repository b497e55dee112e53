"""Images from bytes or files to RGB pixels, safely, and to the size an encoder wants.

Whatever a file claims to be, only JPEG, PNG, WEBP, GIF and BMP decoders are tried. Of these,

  EXIF orientation        applied; EXIF that cannot be read is ignored
  gray, 1 bit, palette    the colors they stand for, as RGB
  any transparency        laid over white
  CMYK (JPEG)             converted without a color profile; embedded profiles are ignored
  16 bits a channel       the upper 8
  animated                the first frame; `vadapter.data.media.video` reads all of it
  over 25 megapixels      BadMedia, by the header alone: no pixel is decoded
  truncated or corrupt    BadMedia, never half an image

Dimension legend: F frames, H height, W width, S side of the square the encoder takes.
"""

import dataclasses
import io
from pathlib import Path
from typing import BinaryIO, Literal, get_args

import numpy as np
from PIL import Image

from vadapter.errors import ConfigError, DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
CLIP_SUFFIXES = frozenset({".avi", ".mp4", ".webm", ".mkv", ".mov", ".gif"})
MAX_PIXELS = 25_000_000

Fit = Literal["crop", "stretch", "pad"]
Interpolation = Literal["bicubic", "bilinear"]

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = 16  # times its short side: a longer image is resized in part
_PAD_LEVEL = 127  # about zero once an encoder has normalized it
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadMedia(DataError):  # noqa: N818 - a property of one file, which a pipeline may count
    """One image or clip that cannot be used; `reason` says why, without its name."""

    def __init__(self, reason: str):
        super().__init__(f"unusable image or clip: {reason}")
        self.reason = reason

    def __reduce__(self):  # crosses process borders
        return BadMedia, (self.reason,)


def decode_image(data: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes one image.

    Args:
      data: the encoded image, or the file that holds it.
      max_pixels: the most pixels (height x width) to decode.

    Returns:
      u8[H,W,3], writable.

    Raises:
      BadMedia: not an image of a supported format, too large, truncated or corrupt.
    """
    return np.array(read_image(data, max_pixels=max_pixels))


def read_image(data: bytes | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """As `decode_image`, in Pillow's memory."""
    try:
        with open_media(data) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadMedia(f"{width}x{height} pixels, more than the {max_pixels} allowed")
            return upright(image)
    except (BadMedia, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadMedia(f"starts with {head(data)!r}: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise BadMedia(f"cannot be decoded ({type(error).__name__}: {error})") from error


def upright(image: Image.Image) -> Image.Image:
    """An opened image of any mode as RGB, turned as its EXIF says; loads the pixels."""
    turn = _TURNS.get(_orientation(image))
    rgb = to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


def pixels_of(image: Image.Image) -> np.ndarray:
    """u8[H,W,3] of an opened image of any mode, turned upright, writable."""
    return np.array(upright(image))


def open_media(data: bytes | Path) -> BinaryIO:
    """Encoded media as a file to read; BadMedia if there is no regular file at the path."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not data.is_file():  # a FIFO or a device would block or never end
        raise BadMedia(f"{data} is not a regular file")
    return data.open("rb")


def head(data: bytes | Path) -> bytes:
    """The first 16 bytes, which tell the format."""
    with open_media(data) as file:
        return file.read(16)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none that can be read."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # photos with damaged EXIF are common and otherwise good
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of the supported formats as RGB; loads the pixels."""
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, over)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """What becomes of an image on the host: a square of pixels.

    Attributes:
      size: S, pixels a side.
      fit: "crop" (short side, then center), "stretch" (all of it, proportions lost) or "pad" (all
        of it, centered on gray).
      interpolation: "bicubic" or "bilinear".
      crop_pct: share of the short side that "crop" leaves, in 0..1, as in timm.
      floor: where the margin is odd, "crop" rounds half of it down, as `transformers` does, and not
        half to even, as torchvision does: the two are a pixel apart in every fourth image.

    Raises:
      ConfigError: an unknown `fit` or `interpolation`, no pixels, or a share that is none.
    """

    size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False

    def __post_init__(self) -> None:
        for key, known in (("fit", get_args(Fit)), ("interpolation", tuple(_RESAMPLE))):
            if getattr(self, key) not in known:
                raise ConfigError(f"{key}={getattr(self, key)!r}: one of {', '.join(known)}")
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"image_size={self.size}, crop_pct={self.crop_pct}: a side has at least 1 pixel, "
                "and crop_pct is the share that stays, above 0 and at most 1"
            )

    @property
    def short(self) -> int:
        """Pixels to which "crop" brings the short side before it cuts; S, or more."""
        return int(self.size / self.crop_pct + 1e-6)


def resize(frames: np.ndarray, view: ImageTransform, *, flip: bool = False) -> np.ndarray:
    """Brings every frame to a square, see `square`.

    Frames that are one and the same in memory, as of a still image, are resized once.

    Args:
      frames: u8[F,H,W,3].
      view: what stays of a frame, and how large.
      flip: mirror left and right.

    Returns:
      u8[F,S,S,3].
    """
    different = frames[:1] if not frames.strides[0] else frames
    out = np.stack([square(Image.fromarray(frame), view, flip=flip) for frame in different])
    return out if len(different) == len(frames) else np.repeat(out, len(frames), axis=0)


def square(image: Image.Image, view: ImageTransform, *, flip: bool = False) -> np.ndarray:
    """Brings an RGB image to a square, antialiased.

    The resampling is Pillow's, as the public encoders were trained with, and "crop" is "resize the
    short side, then cut out the center". Of an image with a side of more than 16 times the other,
    only what stays is computed, so that one of a pixel by thousands costs no more than another;
    there Pillow may sum in another order, which shows by some levels in 255.

    Returns:
      u8[S,S,3].
    """
    width, height = image.size
    size, short = view.size, view.short
    shape, box = (size, size), (0.0, 0.0, float(width), float(height))
    x = y = 0  # where the square starts in the resized image
    if view.fit == "crop":
        scaled = short * width // min(width, height), short * height // min(width, height)
        x, y = ((s - size) // 2 if view.floor else round((s - size) / 2) for s in scaled)
        if max(scaled) <= _WHOLE * short:
            shape = scaled
        else:
            (x0, x1), (y0, y1) = (
                (start * side / s, (start + size) * side / s)
                for start, side, s in zip((x, y), (width, height), scaled, strict=True)
            )
            box, x, y = (x0, y0, x1, y1), 0, 0
    elif view.fit == "pad":
        longest = max(width, height)
        shape = max(1, round(width * size / longest)), max(1, round(height * size / longest))
    small = image.resize(shape, _RESAMPLE[view.interpolation], box=box)
    pixels = np.asarray(small)[y : y + size, x : x + size]
    if view.fit == "pad":
        left, top = (size - shape[0]) // 2, (size - shape[1]) // 2
        padded = np.full((size, size, 3), _PAD_LEVEL, np.uint8)
        padded[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
        pixels = padded
    return pixels[:, ::-1] if flip else pixels
