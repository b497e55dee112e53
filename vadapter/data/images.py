"""Images from bytes or files to RGB pixels, safely, and to the size an encoder wants.

Whatever a file claims to be, only JPEG, PNG, WEBP, GIF and BMP decoders are tried, and the number
of pixels is taken from the header and checked before any is decoded. What becomes of the rest:

  EXIF orientation        applied; EXIF that cannot be read is ignored
  grey, 1 bit, palette    the colours they stand for, as RGB
  any transparency        laid over white
  CMYK (JPEG)             converted without a colour profile; embedded profiles are ignored
  16 bits a channel       the upper 8
  animated                the first frame; `vadapter.data.video` reads all of it
  truncated or corrupt    BadMedia, never half an image

Dimension legend: F frames, H height, W width, S side of the square the encoder takes.
"""

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vadapter.errors import ConfigError, DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
CLIP_SUFFIXES = frozenset({".avi", ".mp4", ".webm", ".mkv", ".mov", ".gif"})
MAX_PIXELS = 25_000_000

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_WHOLE = 16  # times its short side: a longer image is resized in part
_PAD_LEVEL = 127  # about zero once an encoder has normalised it
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
    try:
        with open_media(data) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise BadMedia(f"{width}x{height} pixels, more than the {max_pixels} allowed")
            turn = _TURNS.get(_orientation(image))
            rgb = to_rgb(image)
            return np.array(rgb if turn is None else rgb.transpose(turn))
    except (BadMedia, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BadMedia(f"starts with {head(data)!r}: none of {', '.join(FORMATS)}") from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise BadMedia(f"cannot be decoded ({type(error).__name__}: {error})") from error


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
    return image.convert("RGB")


def resize(
    frames: np.ndarray,
    size: int,
    *,
    mode: str = "bicubic",
    fit: str = "crop",
    flip: bool = False,
    short: int = 0,
    floor: bool = False,
) -> np.ndarray:
    """Brings every frame to a square, antialiased.

    The resampling is Pillow's, as the public encoders were trained with, and "crop" is "resize the
    short side, then cut out the centre". Of an image with a side of more than 16 times the other,
    only what stays is computed, so that one of a pixel by thousands costs no more than another;
    there Pillow may sum in another order, which shows by some levels in 255.

    Args:
      frames: u8[F,H,W,3].
      size: S, in pixels.
      mode: "bicubic" or "bilinear".
      fit: "crop" (centre square), "stretch" (all of it, proportions lost) or "pad" (all of it,
        centred on grey).
      flip: mirror left and right.
      short: "crop" brings the short side to this before it cuts; 0 takes S.
      floor: "crop" rounds half the margin down, as `transformers` does, and not half to even, as
        torchvision does: the two are a pixel apart in every fourth image.

    Returns:
      u8[F,S,S,3].

    Raises:
      ConfigError: an unknown `mode` or `fit`, a size below 1, or `short` below the size.
    """
    short = short or size
    if mode not in _RESAMPLE or fit not in ("crop", "stretch", "pad") or not 1 <= size <= short:
        raise ConfigError(
            f"resize cannot do size={size}, mode={mode!r}, fit={fit!r}, short={short}; size is at "
            f"least 1, short at least size, mode one of {', '.join(_RESAMPLE)}, fit one of crop, "
            "stretch, pad"
        )
    height, width = frames.shape[1:3]
    shape, box = (size, size), (0.0, 0.0, float(width), float(height))
    x = y = 0  # where the square starts in the resized image
    if fit == "crop":
        scaled = tuple(short * side // min(width, height) for side in (width, height))
        x, y = ((s - size) // 2 if floor else round((s - size) / 2) for s in scaled)
        if max(scaled) <= _WHOLE * short:
            shape = scaled
        else:
            (x0, x1), (y0, y1) = (
                (start * side / s, (start + size) * side / s)
                for start, side, s in zip((x, y), (width, height), scaled, strict=True)
            )
            box, x, y = (x0, y0, x1, y1), 0, 0
    elif fit == "pad":
        longest = max(width, height)
        shape = max(1, round(width * size / longest)), max(1, round(height * size / longest))
    left, top = max(size - shape[0], 0) // 2, max(size - shape[1], 0) // 2
    out = np.full((len(frames), size, size, 3), _PAD_LEVEL, np.uint8)
    for frame, target in zip(frames, out, strict=True):
        small = Image.fromarray(frame).resize(shape, _RESAMPLE[mode], box=box)
        pixels = np.asarray(small)[y : y + size, x : x + size]
        target[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
    return np.ascontiguousarray(out[:, :, ::-1]) if flip else out
