"""Facts about an encoded image or clip, read without decoding a pixel.

Legend: F frames, H height, W width.
"""

from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from vadapter.data.example import Features, Media
from vadapter.data.media.images import FORMATS, BadMedia, open_media
from vadapter.data.media.timeline import open_container, read_timeline, video_stream


class Probe(NamedTuple):
    """The facts of a header.

    Attributes:
      width, height: pixels as stored, before any rotation.
      frames: 1 for an image.
      seconds: 0.0 for an image, and for raw frames.
    """

    width: int
    height: int
    frames: int = 1
    seconds: float = 0.0


def probe(media: Media, *, clip: bool) -> Probe:
    """Read the header of an image, or the packets of a clip.

    Args:
      media: encoded, raw frames u8[F,H,W,3] or u8[H,W,3], or a path.
      clip: whether its source is one of clips.

    Raises:
      BadMedia: neither an image nor a clip, or truncated or too large.
    """
    if isinstance(media, Features):
        raise BadMedia("cached features have no header")
    if isinstance(media, np.ndarray):
        frames = media[None] if media.ndim == 3 else media
        return Probe(frames.shape[2], frames.shape[1], len(frames))
    if not clip:
        return _image(media)
    try:
        return _clip(media)
    except (av.FFmpegError, BadMedia):
        return _image(media)  # a still, or an animation that FFmpeg does not read


def _image(media: bytes | Path) -> Probe:
    try:
        with open_media(media) as file, Image.open(file, formats=FORMATS) as image:
            return Probe(*image.size, frames=getattr(image, "n_frames", 1))
    except (BadMedia, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds on corrupt files
        raise BadMedia(f"unreadable header ({type(error).__name__}: {error})") from error


def _clip(media: bytes | Path) -> Probe:
    with open_media(media) as file:
        timeline = read_timeline(file)
        with open_container(file) as container:
            context = video_stream(container).codec_context
            size = context.width, context.height
    frames = sum(packet.stamp is not None for packet in timeline.packets)
    return Probe(*size, frames=frames, seconds=float(timeline.duration))
