"""Safe decoding of images to RGB pixels, and resizing to the square that an encoder takes.

Only the JPEG, PNG, WEBP, GIF and BMP decoders are tried, whatever a file claims to be:

  EXIF orientation        applied; EXIF that cannot be read is ignored
  gray, 1 bit, palette    converted to RGB
  transparency            composited over white
  CMYK (JPEG)             converted without a color profile; embedded profiles are ignored
  16 bits a channel       the upper 8
  animated                the first frame; `vadapter.data.media.video` reads the others
  over 25 megapixels      BadMedia, from the header: no pixel is decoded
  truncated or corrupt    BadMedia, never half an image

Pixels leave this module as u8. Normalization (mean, std) is the encoder's first operation, on the
accelerator: bytes are a quarter of the traffic of floats, and every checkpoint has its own values.

Legend: F frames, H height, W width, S side of the encoder's square.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from vadapter.data.image_transform import ImageTransform
from vadapter.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
CLIP_SUFFIXES = frozenset({".avi", ".mp4", ".webm", ".mkv", ".mov", ".gif"})
MEDIA_SUFFIXES = IMAGE_SUFFIXES | CLIP_SUFFIXES
MAX_PIXELS = 25_000_000

_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}  # fmt: skip
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_MAX_RATIO = 16  # of an image's sides; of a longer one only the center is resized
_PAD_LEVEL = 127  # about zero after normalization
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
# After turning, the first column or row is the last of what is stored, and sides are exchanged.
_FROM_RIGHT, _FROM_BOTTOM, _EXCHANGED = (2, 3, 6, 7), (3, 4, 7, 8), (5, 6, 7, 8)


class BadMedia(DataError):  # noqa: N818 - a property of one file, which a pipeline may count
    """An image or clip that cannot be used; `reason` says why, without its name."""

    def __init__(self, reason: str):
        super().__init__(f"unusable image or clip: {reason}")
        self.reason = reason

    def __reduce__(self):  # sent between processes
        return BadMedia, (self.reason,)


def decode_image(data: bytes | Path) -> np.ndarray:
    """Decode one image, encoded or in a file, to u8[H,W,3], writable.

    Raises:
      BadMedia: not an image of a supported format, larger than `MAX_PIXELS`, truncated or corrupt.
    """
    return np.array(read_image(data))


def read_image(data: bytes | Path) -> Image.Image:
    """Decode one image like `decode_image`, without copying it out of Pillow."""
    with _opened(data) as image:
        return upright(image)


def read_square(data: bytes | Path, view: ImageTransform, *, flip: bool = False) -> np.ndarray:
    """Return `square` of an image, u8[S,S,3], decoded as `view.decode` says; see `decode_image`."""
    with _opened(data) as image:
        box = _reduce(image, view.reduction(*image.size))
        rgb = upright(image)
    return square(rgb, view, flip=flip, box=box)


def _reduce(image: Image.Image, factor: int) -> Box | None:
    """Have a JPEG decoded at 1/factor of its size by a smaller inverse DCT; others stay whole.

    Returns the part of the upright image that shows something: its last column or row may be wider
    than what is left. None: all of it.
    """
    width, height = image.size
    if factor == 1 or image.draft(None, (width // factor, height // factor)) is None:
        return None
    orientation = _orientation(image)
    shown, stored = (width / factor, height / factor), image.size
    if orientation in _EXCHANGED:
        shown, stored = shown[::-1], stored[::-1]
    left = (stored[0] - shown[0]) * (orientation in _FROM_RIGHT)
    top = (stored[1] - shown[1]) * (orientation in _FROM_BOTTOM)
    return left, top, left + shown[0], top + shown[1]


@contextlib.contextmanager
def _opened(data: bytes | Path) -> Iterator[Image.Image]:
    """Open an image; BadMedia if that fails, or what is done with it inside."""
    try:
        with open_media(data) as file, Image.open(file, formats=FORMATS) as image:
            require_pixels(*image.size)
            yield image
    except (BadMedia, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        formats = ", ".join(FORMATS)
        raise BadMedia(
            f"not an image ({formats}) or a clip; it starts with {head(data)!r}"
        ) from error
    except Exception as error:  # Pillow raises a dozen kinds on corrupt files
        raise BadMedia(f"cannot be decoded ({type(error).__name__}: {error})") from error


def require_pixels(width: int, height: int) -> None:
    """Raise BadMedia if an image or a frame has more than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise BadMedia(f"{width}x{height} pixels, more than the {MAX_PIXELS} allowed")


def upright(image: Image.Image) -> Image.Image:
    """Load an opened image of any mode and return it as RGB, rotated as its EXIF says."""
    orientation = _orientation(image)
    rgb = to_rgb(image)
    return rgb.transpose(_TURNS[orientation]) if orientation in _TURNS else rgb


def _orientation(image: Image.Image) -> int | None:
    """Return how EXIF says that an image is to be turned, a key of `_TURNS`; else None or 1."""
    try:
        return image.getexif().get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # photos with corrupt EXIF are common and otherwise fine
        return None


def open_media(data: bytes | Path) -> BinaryIO:
    """Open encoded media for reading; raise BadMedia if the path is not a regular file."""
    if isinstance(data, bytes):
        return io.BytesIO(data)
    if not data.is_file():  # a FIFO or a device would block or never end
        folder = "is a directory; pass image or clip files"
        raise BadMedia(folder if data.is_dir() else f"{data} is not a regular file")
    return data.open("rb")


def head(data: bytes | Path) -> bytes:
    """Return the first 16 bytes, which identify the format."""
    with open_media(data) as file:
        return file.read(16)


def to_rgb(image: Image.Image) -> Image.Image:
    """Load an image in any mode of the supported formats and convert it to RGB."""
    if image.mode.startswith("I"):
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 0xFFFF)
        image = Image.fromarray((wide >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, over)
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy


def resize(frames: np.ndarray, view: ImageTransform, *, flip: bool = False) -> np.ndarray:
    """Resize every frame of u8[F,H,W,3] to a square, mirrored if `flip`: u8[F,S,S,3].

    Frames that share their memory, like those of a still image, are resized once.
    """
    if len(frames) > 1 and not frames.strides[0]:
        return np.repeat(resize(frames[:1], view, flip=flip), len(frames), axis=0)
    return np.stack([square(Image.fromarray(frame), view, flip=flip) for frame in frames])


def square(
    image: Image.Image, view: ImageTransform, *, flip: bool = False, box: Box | None = None
) -> np.ndarray:
    """Resize an RGB image to a square, antialiased: u8[S,S,3].

    The resampling is Pillow's, with which the public encoders were trained. If one side is more
    than 16 times the other, "crop" computes only the center, so that an image of 1 x 10,000 pixels
    costs no more than another; Pillow may then sum in another order (a few levels in 255). With
    `box`, the part of the image to use instead of all of it, it always does.
    """
    left, top, right, bottom = whole = box or (0.0, 0.0, float(image.width), float(image.height))
    width, height = right - left, bottom - top
    size, short = view.size, view.short
    shape: tuple[int, int] = (size, size)
    x = y = 0  # where the square starts in the resized image
    if view.fit == "crop":
        least = min(width, height)
        scaled = int(short * width // least), int(short * height // least)
        x, y = ((s - size) // 2 if view.floor else round((s - size) / 2) for s in scaled)
        if box is None and max(scaled) <= _MAX_RATIO * short:
            shape = scaled
        else:
            (x0, x1), (y0, y1) = (
                (first + start * side / s, first + (start + size) * side / s)
                for first, start, side, s in zip(
                    (left, top), (x, y), (width, height), scaled, strict=True
                )
            )
            whole, x, y = (x0, y0, x1, y1), 0, 0
    elif view.fit == "pad":
        longest = max(width, height)
        shape = max(1, round(width * size / longest)), max(1, round(height * size / longest))
    small = image.resize(shape, _RESAMPLE[view.interpolation], box=whole)
    pixels = np.asarray(small)[y : y + size, x : x + size]
    if view.fit == "pad":
        left, top = (size - shape[0]) // 2, (size - shape[1]) // 2
        padded = np.full((size, size, 3), _PAD_LEVEL, np.uint8)
        padded[top : top + len(pixels), left : left + pixels.shape[1]] = pixels
        pixels = padded
    return pixels[:, ::-1] if flip else pixels
