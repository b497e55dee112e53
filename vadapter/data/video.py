"""Frames of a clip, uniform in time.

The rule: of a clip that lasts D seconds, frame i of F is the decoded frame whose presentation time
is nearest to (i + 0.5) / F * D, the earlier one of two equally near. Times are the file's own
time stamps (in AVI, time slots), so a variable frame rate is respected; a clip of fewer frames
repeats them. D runs from the first frame to the end of the last one, as read from the packets:
headers may be wrong.

Every frame is decoded at most once and in order, and only the chosen ones become RGB; a clip's
cost is therefore its length up to the last chosen frame. Rotation in the metadata is applied,
transparency is laid over white.

Safety: only the container formats named below are probed, which leaves out play lists and other
formats that make FFmpeg open further files or addresses.

Dimension legend: F frames, H height, W width.
"""

import dataclasses
import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import av.container
import numpy as np
from PIL import Image

from vadapter.data.images import MAX_PIXELS, BadMedia, open_media, to_rgb

CONTAINERS = "avi,mov,matroska,gif"
MAX_PACKETS = 100_000  # about an hour; longer recordings are to be cut into clips first
_COMPLETE = 0.75  # a file that ends before this share of the length it declares is cut short

T = TypeVar("T")


def decode_clip(data: bytes | Path, frames: int = 8, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes F frames of a clip.

    Args:
      data: an encoded clip (AVI, MP4, MOV, Matroska, WebM, GIF or animated WebP), or its file.
      frames: F.
      max_pixels: the most pixels (height x width) a frame may have.

    Returns:
      u8[F,H,W,3]; H and W are those of the first frame, after rotation.

    Raises:
      BadMedia: not a clip, no usable picture in it, cut short, corrupt, too large or too long.
    """
    try:
        with open_media(data) as file:
            head = file.read(12)
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                return _decode_webp(file, frames, max_pixels)
            return _decode_stream(file, frames, max_pixels)
    except av.FFmpegError as error:  # some of its kinds are MemoryError too
        raise BadMedia(f"cannot be decoded ({error})") from error
    except (BadMedia, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds on damaged files
        raise BadMedia(f"cannot be decoded ({type(error).__name__}: {error})") from error


def frame_times(duration: Fraction, frames: int) -> list[Fraction]:
    """The times to show, in seconds from the first frame: the middles of F equal parts."""
    return [duration * (2 * i + 1) / (2 * frames) for i in range(frames)]


def nearest(timed: Iterable[tuple[Fraction, T]], targets: list[Fraction]) -> list[T]:
    """For each target time the item nearest to it, the earlier of two; both in rising order.

    Reads no further than it has to, and holds no more than what it returns and one item.
    """
    chosen: list[T] = []
    last: tuple[Fraction, T] | None = None
    for time, item in timed:
        while len(chosen) < len(targets) and time >= (target := targets[len(chosen)]):
            keep = last is not None and target - last[0] <= time - target
            chosen.append(last[1] if last is not None and keep else item)
        if len(chosen) == len(targets):
            return chosen
        last = time, item
    if last is None:
        raise BadMedia("no frame could be decoded")
    return chosen + [last[1]] * (len(targets) - len(chosen))


def _open(file: BinaryIO) -> av.container.InputContainer:
    file.seek(0)
    return av.open(file, mode="r", options={"format_whitelist": CONTAINERS})


def _video(container: av.container.InputContainer, max_pixels: int) -> av.VideoStream:
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise BadMedia("no video stream")
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        raise BadMedia(f"{context.width}x{context.height} pixels, more than {max_pixels}")
    context.options = {"max_pixels": str(max_pixels)}  # a stream may change its size on the way
    context.thread_count = 1  # the pipeline's workers are the parallelism
    return stream


@dataclasses.dataclass(frozen=True)
class _Timeline:
    """What the packets say, without decoding any.

    Attributes:
      duration: seconds from the first frame to the end of the last one.
      slots: for AVI, which has time slots instead of time stamps, the slot of each frame in
        seconds since the first. FFmpeg's guess at stamps is wrong where H.264 reorders frames.
    """

    duration: Fraction
    slots: list[Fraction] | None


def _timeline(file: BinaryIO, max_pixels: int) -> _Timeline:
    stamps, end = [], 0
    with _open(file) as container:
        stream = _video(container, max_pixels)
        avi = container.format.name == "avi"
        for packet in container.demux(stream):
            if packet.is_corrupt:  # the file ended inside it
                raise BadMedia("cut short: its last frame is incomplete")
            stamp = packet.dts if avi or packet.pts is None else packet.pts
            if stamp is None or packet.is_discard:
                continue
            stamps.append(stamp)
            end = max(end, stamp + (packet.duration or 0))
            if len(stamps) > MAX_PACKETS:
                raise BadMedia(f"more than {MAX_PACKETS} frames; cut it into clips")
        if not stamps or stream.time_base is None:
            raise BadMedia("no frames with a time stamp")
        if container.format.name == "gif" and not _tail(file).endswith(b";"):
            raise BadMedia("cut short: a GIF without its end mark")
        unit, declared = stream.time_base, _declared(container, stream)
    stamps.sort()
    first, last = stamps[0], stamps[-1]
    if end <= last and len(stamps) > 1:  # the last frame lasts as long as the average one
        end = last + Fraction(last - first, len(stamps) - 1)
    if end * unit < _COMPLETE * declared:
        raise BadMedia(f"cut short: it says {float(declared):.1f} s, has {float(end * unit):.1f} s")
    slots = [(stamp - first) * unit for stamp in stamps] if avi else None
    return _Timeline((max(end, last) - first) * unit, slots)


def _tail(file: BinaryIO) -> bytes:
    """The last bytes of a file, less the padding that some writers add."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    return file.read().rstrip(b"\0\r\n ")


def _declared(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """The length in seconds the header promises for the pictures, 0 where it says nothing."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return Fraction(0)


def _decode_stream(file: BinaryIO, frames: int, max_pixels: int) -> np.ndarray:
    timeline = _timeline(file, max_pixels)
    targets = frame_times(timeline.duration, frames)
    with _open(file) as container:
        stream = _video(container, max_pixels)
        chosen = nearest(_timed(container.decode(stream), timeline.slots), targets)
        size = chosen[0].width, chosen[0].height
        pictures: dict[int, np.ndarray] = {}  # frames chosen twice are converted once
        for frame in chosen:
            if frame.is_corrupt:
                raise BadMedia("holds damaged frames")
            if id(frame) not in pictures:
                pictures[id(frame)] = _pixels(frame, size)
        return np.stack([pictures[id(frame)] for frame in chosen])


def _timed(
    frames: Iterable[av.VideoFrame], slots: list[Fraction] | None
) -> Iterable[tuple[Fraction, av.VideoFrame]]:
    """Frames, which the decoder gives in the order they are shown, with their time in seconds."""
    first = None
    for index, frame in enumerate(frames):
        if slots is not None:
            yield slots[min(index, len(slots) - 1)], frame
            continue
        if frame.pts is None or frame.time_base is None:
            raise BadMedia("a frame without a time stamp")
        first = frame.pts if first is None else first
        yield (frame.pts - first) * frame.time_base, frame


def _pixels(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """One frame as u8[H,W,3], upright, of the (width, height) the clip started with."""
    alpha = any(component.is_alpha for component in frame.format.components)
    layout = "rgba" if alpha else "rgb24"
    pixels = frame.to_ndarray(format=layout, width=size[0], height=size[1])
    if alpha:
        opacity = pixels[..., 3:].astype(np.uint16)
        over = pixels[..., :3] * opacity + 255 * (255 - opacity)
        pixels = ((over + 127) // 255).astype(np.uint8)
    return np.rot90(pixels, round(frame.rotation / 90))  # both count anticlockwise


def _decode_webp(file: BinaryIO, frames: int, max_pixels: int) -> np.ndarray:
    """Animated WebP, which FFmpeg does not read."""
    times, end = [], Fraction(0)
    for duration in _webp_durations(file):
        times.append(end)
        end += duration
    file.seek(0)
    with Image.open(file, formats=("WEBP",)) as image:
        if image.width * image.height > max_pixels:
            raise BadMedia(f"{image.width}x{image.height} pixels, more than {max_pixels}")
        indices = nearest(zip(times, range(len(times)), strict=True), frame_times(end, frames))
        pictures: dict[int, np.ndarray] = {}
        for index in indices:
            if index not in pictures:
                image.seek(index)
                pictures[index] = np.array(to_rgb(image))
    return np.stack([pictures[index] for index in indices])


def _webp_durations(file: BinaryIO) -> list[Fraction]:
    """Seconds of every frame, from the ANMF chunks (WebP container specification)."""
    durations = []
    file.seek(12)
    while len(header := file.read(8)) == 8 and len(durations) <= MAX_PACKETS:
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"ANMF":
            body = file.read(16)
            milliseconds = int.from_bytes(body[12:15], "little") or 100  # as browsers show it
            durations.append(Fraction(milliseconds, 1000))
            size -= len(body)
        file.seek(size + size % 2, io.SEEK_CUR)
    return durations or [Fraction(1)]  # a still image is one frame
