"""Frames from any media that an example may have: an image, a clip or raw frames.

Legend: F frames, H height, W width, S pixels a side.
"""

from pathlib import Path

import numpy as np

from vadapter.data.example import Features, Media
from vadapter.data.media import images
from vadapter.data.media.images import BadMedia, ImageTransform


def load_media(media: Media | None, *, frames: int) -> np.ndarray:
    """Return the frames of an example's media, u8[F,H,W,3], not to be written to.

    The frames of a clip are uniform in time; those of a still image share its memory.

    Raises:
      BadMedia: the media cannot be used.
    """
    media = _with_pixels(media)
    if isinstance(media, np.ndarray):
        middles = (2 * np.arange(frames) + 1) * len(media) // (2 * frames)
        return media[middles]
    if _is_clip(media, frames):
        from vadapter.data.media.video import decode_clip  # with FFmpeg, which images do without

        return decode_clip(media, frames)
    image = images.decode_image(media)
    return np.broadcast_to(image, (frames, *image.shape))


def load_square(
    media: Media | None, view: ImageTransform, *, frames: int, flip: bool = False
) -> np.ndarray:
    """Return `images.resize` of `load_media`, u8[F,S,S,3], not to be written to.

    An encoded image is decoded as `view.decode` says, and its frames share their memory.
    """
    media = _with_pixels(media)
    if isinstance(media, np.ndarray) or _is_clip(media, frames):
        return images.resize(load_media(media, frames=frames), view, flip=flip)
    square = images.read_square(media, view, flip=flip)
    return np.broadcast_to(square, (frames, *square.shape))


def _with_pixels(media: Media | None) -> bytes | np.ndarray | Path:
    """Return encoded media, or raw frames as u8[F,H,W,3]."""
    if media is None:
        raise BadMedia("there is no image")
    if isinstance(media, Features):
        raise BadMedia(
            "cached features, which have no pixels"
            if media.readable
            else "could not be decoded when its features were computed"
        )
    if isinstance(media, np.ndarray):
        media = media[None] if media.ndim == 3 else media
        if media.dtype != np.uint8 or media.ndim != 4 or media.shape[-1] != 3 or not media.size:
            raise BadMedia(f"raw frames must be u8[F,H,W,3], got {media.dtype}{list(media.shape)}")
    return media


def _is_clip(media: bytes | Path, frames: int) -> bool:
    """Return whether to decode as a clip: by content, since names mislead and bytes have none."""
    start = images.head(media)
    if start[:4] == b"GIF8" or (start[:4] == b"RIFF" and start[8:12] == b"WEBP"):
        return frames > 1
    video = start[:4] in (b"\x1aE\xdf\xa3", b"RIFF") or start[4:8] in (b"ftyp", b"moov", b"mdat")
    return video or (isinstance(media, Path) and media.suffix.lower() in images.CLIP_SUFFIXES)
