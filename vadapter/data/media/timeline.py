"""The frames of a clip and their times, read from its packets without decoding any.

`media.video` documents which of them are chosen, and how unusual clips are treated.

Safety: only the container formats named below are probed. Playlists and other formats that make
FFmpeg open further files or addresses are not among them.
"""

import bisect
import dataclasses
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import av.container

from vadapter.data.media.images import MAX_PIXELS, BadMedia

CONTAINERS = "avi,mov,matroska,gif"
MAX_FRAMES = 100_000  # about an hour; cut longer recordings into clips first
_COMPLETE = 0.75  # a file shorter than this fraction of its declared length is truncated


class Packet(NamedTuple):
    """One coded frame; packets are in the order of the file, which is the decoding order.

    Attributes:
      stamp: the presentation time in the stream's units, in AVI the time slot; None: not shown.
      key: whether the file says that decoding may start here.
    """

    stamp: int | None
    key: bool


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The packets of a clip's video stream.

    Attributes:
      packets: all packets; at least one is shown.
      unit: the unit of stamps, in seconds.
      duration: seconds from the first frame to the end of the last one.
      avi: AVI has time slots instead of time stamps: the n-th frame shown has the n-th slot.
        FFmpeg guesses stamps, wrongly if H.264 reorders frames.
    """

    packets: Sequence[Packet]
    unit: Fraction
    duration: Fraction
    avi: bool

    @property
    def shown(self) -> Iterator[tuple[Fraction, int]]:
        """(Seconds since the first frame, index of the packet) in presentation order."""
        stamps = ((p.stamp, i) for i, p in enumerate(self.packets) if p.stamp is not None)
        (first, _), *_ = ordered = sorted(stamps)
        return (((stamp - first) * self.unit, i) for stamp, i in ordered)

    @property
    def slots(self) -> list[Fraction] | None:
        """For AVI, the time in seconds of every frame in presentation order; else None."""
        return [time for time, _ in self.shown] if self.avi else None

    def seekable(self, *, reordered: bool) -> bool:
        """Return whether each packet can be matched to its frame.

        Args:
          reordered: the codec stores some frames before others that are shown earlier.
        """
        complete = self.packets[0].key and all(p.stamp is not None for p in self.packets)
        return complete and next(self.shown)[1] == 0 and not (self.avi and reordered)

    def runs(self, chosen: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges of packets that the chosen packets depend on.

        Each starts at the last key frame that is neither decoded nor shown after a chosen packet.
        """
        stamps = [p.stamp or 0 for p in self.packets]
        keys = [i for i, p in enumerate(self.packets) if p.key]
        runs: list[tuple[int, int]] = []
        for index in sorted(set(chosen)):
            key = bisect.bisect_right(keys, index) - 1
            while key and stamps[keys[key]] > stamps[index]:
                key -= 1
            start, stop = keys[key], index + 1
            while runs and start <= runs[-1][1]:  # overlaps or touches the run before
                start = min(start, runs.pop()[0])
            runs.append((start, stop))
        return runs

    def agrees(self, index: int, nth: int, stamp: int | None) -> bool:
        """Return whether a decoded frame has the time of its packet.

        Args:
          index: of its packet.
          nth: what the index is if all frames come in the order of their packets.
          stamp: of the frame.
        """
        return index == nth if self.avi else stamp == self.packets[index].stamp


def open_container(file: BinaryIO) -> av.container.InputContainer:
    """Open a clip from its beginning as one of `CONTAINERS`."""
    file.seek(0)
    return av.open(file, mode="r", options={"format_whitelist": CONTAINERS})


def video_stream(
    container: av.container.InputContainer, max_pixels: int = MAX_PIXELS
) -> av.VideoStream:
    """Return the stream to show; raise BadMedia if there is none or its frames are too large."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise BadMedia("no video stream")
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        raise BadMedia(f"{context.width}x{context.height} pixels, more than {max_pixels}")
    context.options = {"max_pixels": str(max_pixels)}  # a stream may change its size later
    context.thread_count = 1  # the pipeline's workers are the parallelism
    return stream


def read_timeline(
    file: BinaryIO, max_pixels: int = MAX_PIXELS, max_frames: int = MAX_FRAMES
) -> Timeline:
    """Read all packets once.

    Raises:
      BadMedia: no video, no time stamps, truncated, too large or too long.
    """
    packets, stamps, end = [], [], 0
    with open_container(file) as container:
        stream = video_stream(container, max_pixels)
        avi = container.format.name == "avi"
        for packet in container.demux(stream):
            if packet.is_corrupt:  # the file ended inside it
                raise BadMedia("truncated: its last frame is incomplete")
            stamp = packet.dts if avi or packet.pts is None else packet.pts
            stamp = None if packet.is_discard else stamp
            if packet.size:  # the last, empty one only flushes the decoder
                packets.append(Packet(stamp, packet.is_keyframe))
            if stamp is None:
                continue
            stamps.append(stamp)
            end = max(end, stamp + (packet.duration or 0))
            if len(stamps) > max_frames:
                raise BadMedia(f"more than {max_frames} frames; cut it into clips")
        if not stamps or stream.time_base is None:
            raise BadMedia("no frames with a time stamp")
        if container.format.name == "gif" and not _tail(file).endswith(b";"):
            raise BadMedia("truncated: a GIF without its end mark")
        unit, declared = stream.time_base, _declared(container, stream)
    first, last = min(stamps), max(stamps)
    if end <= last and len(stamps) > 1:  # assume the average duration for the last frame
        end = last + Fraction(last - first, len(stamps) - 1)
    if end * unit < _COMPLETE * declared:
        raise BadMedia(
            f"truncated: declares {float(declared):.1f} s, has {float(end * unit):.1f} s"
        )
    return Timeline(packets, unit, (max(end, last) - first) * unit, avi)


def _tail(file: BinaryIO) -> bytes:
    """Return the last bytes of a file without the padding that some writers add."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    return file.read().rstrip(b"\0\r\n ")


def _declared(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """Return the length of the video in seconds according to the header, 0 if it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return Fraction(0)
