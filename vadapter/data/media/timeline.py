"""The frames of a clip and their times, read from its packets without decoding any.

`media.video` documents which of them are chosen, and how unusual clips are treated.

Safety: only the container formats named below are probed. Playlists and other formats that make
FFmpeg open further files or addresses are not among them.
"""

import bisect
import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
from av.container import InputContainer

from vadapter.data.media import images
from vadapter.data.media.images import BadMedia, require_pixels

CONTAINERS = "avi,mov,matroska,gif"
MAX_FRAMES = 100_000  # about an hour; cut longer recordings into clips first
_COMPLETE = 0.75  # a file shorter than this fraction of its declared length is truncated


class Packet(NamedTuple):
    """One coded frame; packets are in the order of the file, which is the decoding order."""

    stamp: int | None  # presentation time in the stream's units, AVI's time slot; None: not shown
    key: bool  # whether the file says that decoding may start here


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The packets of a clip's video stream, of which at least one is shown.

    AVI has time slots instead of time stamps: the n-th frame shown has the n-th slot. FFmpeg
    guesses stamps, wrongly if H.264 reorders frames.
    """

    packets: Sequence[Packet]
    unit: Fraction  # of stamps, in seconds
    duration: Fraction  # seconds from the first frame to the end of the last one
    avi: bool

    @property
    def shown(self) -> Iterator[tuple[Fraction, int]]:
        """(Seconds since the first frame, index of the packet) in presentation order."""
        stamps = ((p.stamp, i) for i, p in enumerate(self.packets) if p.stamp is not None)
        (first, _), *_ = ordered = sorted(stamps)
        return (((stamp - first) * self.unit, i) for stamp, i in ordered)

    def seekable(self, *, reordered: bool) -> bool:
        """Return whether each packet can be matched to its frame; B-frames are `reordered`."""
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


@contextlib.contextmanager
def open_stream(file: BinaryIO) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """Open a clip from its beginning, in one of `CONTAINERS`, and yield it and the stream to show.

    Raises:
      BadMedia: it has no video, or its frames are too large.
    """
    file.seek(0)
    with av.open(file, mode="r", options={"format_whitelist": CONTAINERS}) as container:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise BadMedia("no video stream")
        context = stream.codec_context
        require_pixels(context.width, context.height)
        context.options = {"max_pixels": str(images.MAX_PIXELS)}  # its size may change later
        context.thread_count = 1  # the pipeline's workers are the parallelism
        yield container, stream


def read_timeline(file: BinaryIO) -> Timeline:
    """Read all packets; raise BadMedia without video or times, or if truncated or too large."""
    packets, stamps, end = [], [], 0
    with open_stream(file) as (container, stream):
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
            if len(stamps) > MAX_FRAMES:
                raise BadMedia(f"more than {MAX_FRAMES} frames; cut it into clips")
        if not stamps or stream.time_base is None:
            raise BadMedia("no frames with a time stamp")
        if container.format.name == "gif":
            file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
            if not file.read().rstrip(b"\0\r\n ").endswith(b";"):  # some writers add padding
                raise BadMedia("truncated: a GIF without its end mark")
        unit, declared = stream.time_base, _declared_seconds(container, stream)
    first, last = min(stamps), max(stamps)
    if end <= last and len(stamps) > 1:  # assume the average duration for the last frame
        end = last + Fraction(last - first, len(stamps) - 1)
    if end * unit < _COMPLETE * declared:
        raise BadMedia(
            f"truncated: declares {float(declared):.1f} s, has {float(end * unit):.1f} s"
        )
    return Timeline(packets, unit, (max(end, last) - first) * unit, avi)


def _declared_seconds(container: InputContainer, stream: av.VideoStream) -> Fraction:
    """Return the length of the video in seconds according to the header, 0 if it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return Fraction(0)
