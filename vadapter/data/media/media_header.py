"""Facts about an encoded image or clip, read without decoding a pixel."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from PIL import Image

from vadapter.data.example import Features, Media
from vadapter.data.media.images import FORMATS, BadMedia, open_media
from vadapter.data.media.timeline import open_stream, read_timeline


class Probe(NamedTuple):
    """The facts of a header: pixels as stored, before any rotation; 0.0 seconds for images."""

    width: int
    height: int
    frames: int = 1
    seconds: float = 0.0


def probe(media: Media, *, clip: bool) -> Probe:
    """Read the header of an image, or the packets of a clip (if the source is one of clips).

    Raises:
      BadMedia: neither an image nor a clip, or truncated or too large.
    """
    if isinstance(media, Features):
        raise BadMedia("cached features have no header")
    if isinstance(media, np.ndarray):
        frames = media[None] if media.ndim == 3 else media
        return Probe(frames.shape[2], frames.shape[1], len(frames))
    if clip:
        with contextlib.suppress(av.FFmpegError, BadMedia):
            return _clip(media)
    return _image(media)  # in a source of clips a still, or what FFmpeg does not read


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
        with open_stream(file) as (_, stream):
            size = stream.width, stream.height
    frames = sum(packet.stamp is not None for packet in timeline.packets)
    return Probe(*size, frames=frames, seconds=float(timeline.duration))
