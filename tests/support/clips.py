"""Clips of plain images, each of which tells its number, in any container."""

import dataclasses
import io
from fractions import Fraction

import av
import numpy as np
import pytest

SIZE = (48, 64)  # H, W


def image(index: int) -> np.ndarray:
    """A plain image that tells its number by its gray level, ten apart."""
    return np.full((*SIZE, 3), 10 * index, np.uint8)


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in frames]


@dataclasses.dataclass(frozen=True)
class Coding:
    container: str
    codec: str
    pixels: str = "yuv420p"
    options: tuple[tuple[str, str], ...] = ()


LOSSLESS = Coding("matroska", "ffv1", "bgr0")
CODINGS = [
    LOSSLESS,
    Coding("avi", "mpeg4"),
    Coding("avi", "mpeg4", options=(("bf", "2"),)),
    Coding("mp4", "mpeg4", options=(("bf", "2"),)),
    Coding("mov", "mjpeg", "yuvj420p"),
    Coding("mp4", "libx264", options=(("bf", "3"),)),
    Coding("avi", "libx264", options=(("bf", "3"),)),
    Coding("webm", "libvpx-vp9", options=(("cpu-used", "8"), ("deadline", "realtime"))),
]
needs = {name for name in ("libx264", "libvpx-vp9") if name not in av.codecs_available}


def clip(images, coding=LOSSLESS, *, stamps=None, rate=10, rotation=0) -> bytes:
    """Encode images, shown at `stamps` (in units of 1/rate seconds), or one after another."""
    if coding.codec in needs:
        pytest.skip(f"this build of PyAV cannot write {coding.codec}")
    buffer = io.BytesIO()
    with av.open(buffer, "w", coding.container) as container:
        stream = container.add_stream(coding.codec, rate=rate, options=dict(coding.options))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = coding.pixels
        stream.bit_rate = 4_000_000
        stream.codec_context.thread_count = 1
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation:
            if not hasattr(stream, "set_display_rotation"):
                pytest.skip("this version of PyAV cannot write a rotation")
            stream.set_display_rotation(rotation)
        for index, pixels in enumerate(images):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index if stamps is None else stamps[index]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
