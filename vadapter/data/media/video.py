"""Frames of a clip, uniform in time.

The rule: of a clip that lasts D seconds, frame i of F is the frame whose presentation time is
nearest to (i + 0.5) / F * D, the earlier one of two equally near.

  first and last        the middles of F equal parts: neither the very first frame nor the very last
                        (titles, fades), unless the clip has little else
  fewer frames than F   they repeat, in order: each represents the parts it is nearest to
  variable frame rate   times are the file's own time stamps (in AVI, time slots), never a count
  D                     from the first frame to the end of the last one, as read from the packets:
                        headers may be wrong
  rotation              of the metadata is applied
  transparency          composited over white
  formats               AVI, MP4, MOV, WebM, Matroska, GIF, animated WebP, by content, not by suffix
  truncated, corrupt    BadMedia; corruption that no chosen frame depends on goes unnoticed
  over 25 megapixels    BadMedia, from the header; over 100,000 frames, from the packets: no pixel
                        is decoded

Only what is needed is decoded, once and in order: from the last key frame before a chosen frame to
that frame, skipping frames that no other refers to. For 8 frames of a minute of H.264 this takes
less than half the time of decoding everything with a key frame every 250 frames, and a seventh with
one every 30. If a file marks its key frames wrongly, and in AVI with reordered frames, everything
up to the last chosen frame is decoded. Both ways give the same frames. Only chosen ones become RGB.

Legend: F frames, H height, W width.
"""

import io
import itertools
from collections.abc import Container, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeVar

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer
from PIL import Image

from vadapter.data.media.images import BadMedia, open_media, require_pixels, to_rgb
from vadapter.data.media.timeline import MAX_FRAMES, Timeline, open_stream, read_timeline

T = TypeVar("T")


def decode_clip(data: bytes | Path, frames: int = 8) -> np.ndarray:
    """Decode F frames of a clip, u8[F,H,W,3]; H and W are those of the first, after rotation.

    Raises:
      BadMedia: not a clip, no usable frame, truncated, corrupt, too large or too long.
    """
    try:
        with open_media(data) as file:
            head = file.read(12)
            if head[:4] == b"RIFF" and head[8:] == b"WEBP":
                return _decode_webp(file, frames)
            return _decode_stream(file, frames)
    except av.FFmpegError as error:  # some of its subclasses are also MemoryError
        raise BadMedia(f"cannot be decoded ({error.strerror})") from error
    except (BadMedia, MemoryError):
        raise
    except Exception as error:  # Pillow raises a dozen kinds on corrupt files
        raise BadMedia(f"cannot be decoded ({type(error).__name__}: {error})") from error


def frame_times(duration: Fraction, frames: int) -> list[Fraction]:
    """Return the target times, in seconds from the first frame: the middles of F equal parts."""
    return [duration * (2 * i + 1) / (2 * frames) for i in range(frames)]


def nearest(timed: Iterable[tuple[Fraction, T]], targets: list[Fraction]) -> list[T]:
    """Return for each target time the nearest item, the earlier of two; both are ascending.

    No more items are read than necessary, and one is kept besides those that are returned.
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


def _decode_stream(file: BinaryIO, frames: int) -> np.ndarray:
    timeline = read_timeline(file)
    targets = frame_times(timeline.duration, frames)
    for choose in (_decode_runs, _decode_all):
        with open_stream(file) as (container, stream):
            if (chosen := choose(container, stream, timeline, targets)) is not None:
                return _images(chosen)
    raise BadMedia("no frame could be decoded")


def _decode_all(
    container: InputContainer, stream: av.VideoStream, timeline: Timeline, targets: list[Fraction]
) -> list[av.VideoFrame]:
    """Return the frames nearest to the targets, decoding everything up to the last of them."""
    return nearest(_timed(container.decode(stream), timeline), targets)


def _decode_runs(
    container: InputContainer, stream: av.VideoStream, timeline: Timeline, targets: list[Fraction]
) -> list[av.VideoFrame] | None:
    """Return the same frames, decoding only from key frames to chosen frames.

    The decoder passes on the index of each frame's packet. Returns None if the frames do not match
    the packets exactly (a key frame that is none, a corrupt or a missing frame); `_decode_all` then
    decides.
    """
    context = stream.codec_context
    if not timeline.seekable(reordered=context.has_b_frames):
        return None
    chosen = nearest(timeline.shown, targets)
    context.flags |= Flags.copy_opaque
    packets = (packet for packet in container.demux(stream) if packet.size)
    frames: dict[int, av.VideoFrame] = {}
    position = 0
    try:
        for start, stop in timeline.runs(chosen):
            context.flush_buffers()
            run = itertools.islice(packets, start - position, stop - position)
            needed = range(start, stop) if timeline.avi else chosen  # AVI's frames are counted
            for nth, frame in enumerate(_decoded(context, run, start, needed), start):
                index = frame.opaque
                if not isinstance(index, int):
                    return None
                if nth == start and not (index == start and frame.key_frame):
                    return None
                stamp = timeline.packets[index].stamp
                if index != nth if timeline.avi else frame.pts != stamp:
                    return None
                if index in chosen:
                    if index in frames or frame.is_corrupt:
                        return None
                    frames[index] = frame
            position = stop
    except av.FFmpegError:
        return None
    return [frames[i] for i in chosen] if frames.keys() == set(chosen) else None


def _decoded(
    context: av.VideoCodecContext, packets: Iterable[av.Packet], first: int, needed: Container[int]
) -> Iterator[av.VideoFrame]:
    """Yield the frames of packets numbered from `first`, flushing the decoder at the end.

    Frames that are neither needed nor referred to by others may be missing.
    """
    for index, packet in enumerate(packets, first):
        packet.opaque = index
        context.skip_frame = "DEFAULT" if index in needed else "NONREF"
        yield from context.decode(packet)
    yield from context.decode(None)


def _images(chosen: list[av.VideoFrame]) -> np.ndarray:
    """Return the frames as u8[F,H,W,3]; those chosen twice are converted once."""
    size = chosen[0].width, chosen[0].height
    decoded: dict[int, np.ndarray] = {}
    for frame in chosen:
        if frame.is_corrupt:
            raise BadMedia("has corrupt frames")
        if id(frame) not in decoded:
            decoded[id(frame)] = _pixels(frame, size)
    return np.stack([decoded[id(frame)] for frame in chosen])


def _timed(
    frames: Iterable[av.VideoFrame], timeline: Timeline
) -> Iterator[tuple[Fraction, av.VideoFrame]]:
    """Yield decoded frames, which come in presentation order, with their time in seconds."""
    slots, first = [time for time, _ in timeline.shown], None
    for index, frame in enumerate(frames):
        if timeline.avi:
            yield slots[min(index, len(slots) - 1)], frame
            continue
        if frame.pts is None or frame.time_base is None:
            raise BadMedia("a frame without a time stamp")
        first = frame.pts if first is None else first
        yield (frame.pts - first) * frame.time_base, frame


def _pixels(frame: av.VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """Return a frame as u8[H,W,3], upright, in the (width, height) of the clip's first frame."""
    alpha = any(component.is_alpha for component in frame.format.components)
    layout = "rgba" if alpha else "rgb24"
    pixels = frame.to_ndarray(format=layout, width=size[0], height=size[1])
    if alpha:
        opacity = pixels[..., 3:].astype(np.uint16)
        over = pixels[..., :3] * opacity + 255 * (255 - opacity)
        pixels = ((over + 127) // 255).astype(np.uint8)
    return np.rot90(pixels, round(frame.rotation / 90))  # both counterclockwise


def _decode_webp(file: BinaryIO, frames: int) -> np.ndarray:
    """Decode animated WebP, which FFmpeg cannot read."""
    *times, end = itertools.accumulate(_webp_durations(file), initial=Fraction(0))
    file.seek(0)
    with Image.open(file, formats=("WEBP",)) as image:
        require_pixels(*image.size)
        indices = nearest(zip(times, range(len(times)), strict=True), frame_times(end, frames))
        decoded: dict[int, np.ndarray] = {}
        for index in indices:
            if index not in decoded:
                image.seek(index)
                decoded[index] = np.array(to_rgb(image))
    return np.stack([decoded[index] for index in indices])


def _webp_durations(file: BinaryIO) -> list[Fraction]:
    """Return the seconds of every frame, from the ANMF chunks (WebP container specification)."""
    durations = []
    file.seek(12)
    while len(header := file.read(8)) == 8 and len(durations) <= MAX_FRAMES:
        size = int.from_bytes(header[4:], "little")
        if header[:4] == b"ANMF":
            body = file.read(16)
            milliseconds = int.from_bytes(body[12:15], "little") or 100  # as in browsers
            durations.append(Fraction(milliseconds, 1000))
            size -= len(body)
        file.seek(size + size % 2, io.SEEK_CUR)
    return durations or [Fraction(1)]  # a still image is one frame
