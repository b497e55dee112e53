"""What the packets of a clip say, without decoding any: which frames there are, and when.

Which of them are shown, and what becomes of odd clips, is stated in `data.video`.

Safety: only the container formats named below are probed, which leaves out play lists and other
formats that make FFmpeg open further files or addresses.
"""

import bisect
import dataclasses
import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import av.container

from vadapter.data.media.images import BadMedia

CONTAINERS = "avi,mov,matroska,gif"
MAX_PACKETS = 100_000  # about an hour; longer recordings are to be cut into clips first
_COMPLETE = 0.75  # a file that ends before this share of the length it declares is cut short


class Packet(NamedTuple):
    """One coded frame, in the order of the file, which is that of decoding.

    Attributes:
      stamp: when it is shown, in the stream's units; in AVI its time slot; None: not at all.
      key: the file says that decoding may start here.
    """

    stamp: int | None
    key: bool


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The packets of a clip's video stream.

    Attributes:
      packets: all of them; at least one is shown.
      unit: seconds of a stamp's unit.
      duration: seconds from the first frame to the end of the last one.
      avi: AVI has time slots instead of time stamps: the n-th slot is that of the n-th frame shown.
        FFmpeg's guess at stamps is wrong where H.264 reorders frames.
    """

    packets: Sequence[Packet]
    unit: Fraction
    duration: Fraction
    avi: bool

    @property
    def shown(self) -> Iterator[tuple[Fraction, int]]:
        """Seconds from the first frame, and index of the packet, in the order they are shown."""
        stamps = ((p.stamp, i) for i, p in enumerate(self.packets) if p.stamp is not None)
        (first, _), *_ = ordered = sorted(stamps)
        return (((stamp - first) * self.unit, i) for stamp, i in ordered)

    @property
    def slots(self) -> list[Fraction] | None:
        """Of AVI, the seconds of every frame in the order they are shown."""
        return [time for time, _ in self.shown] if self.avi else None

    def seekable(self, *, reordered: bool) -> bool:
        """Whether it is known which packet holds which frame; `reordered`: some come early."""
        whole = self.packets[0].key and all(p.stamp is not None for p in self.packets)
        return whole and next(self.shown)[1] == 0 and not (self.avi and reordered)

    def runs(self, wanted: Sequence[int]) -> list[tuple[int, int]]:
        """The ranges of packets that the wanted ones depend on.

        Each starts at the last key frame that is neither decoded nor shown after its wanted packet.
        """
        stamps = [p.stamp or 0 for p in self.packets]
        keys = [i for i, p in enumerate(self.packets) if p.key]
        runs: list[tuple[int, int]] = []
        for index in sorted(set(wanted)):
            at = bisect.bisect_right(keys, index) - 1
            while at and stamps[keys[at]] > stamps[index]:
                at -= 1
            start, stop = keys[at], index + 1
            while runs and start <= runs[-1][1]:  # goes on, or starts before, where one ends
                start = min(start, runs.pop()[0])
            runs.append((start, stop))
        return runs

    def agrees(self, index: int, nth: int, stamp: int | None) -> bool:
        """Whether a decoded frame is shown when its packet says.

        Args:
          index: of its packet.
          nth: what the index is where all frames come in the order of their packets.
          stamp: the frame's own.
        """
        return index == nth if self.avi else stamp == self.packets[index].stamp


def open_container(file: BinaryIO) -> av.container.InputContainer:
    """Opens a clip from its beginning, as one of `CONTAINERS`."""
    file.seek(0)
    return av.open(file, mode="r", options={"format_whitelist": CONTAINERS})


def video_stream(container: av.container.InputContainer, max_pixels: int) -> av.VideoStream:
    """The stream to show; BadMedia if there is none or its header says that it is too large."""
    stream = container.streams.best("video")
    if not isinstance(stream, av.VideoStream):
        raise BadMedia("no video stream")
    context = stream.codec_context
    if context.width * context.height > max_pixels:
        raise BadMedia(f"{context.width}x{context.height} pixels, more than {max_pixels}")
    context.options = {"max_pixels": str(max_pixels)}  # a stream may change its size on the way
    context.thread_count = 1  # the pipeline's workers are the parallelism
    return stream


def read_timeline(file: BinaryIO, max_pixels: int) -> Timeline:
    """Reads all packets once.

    Raises:
      BadMedia: no video, no time stamps, cut short, too large or too long.
    """
    packets, stamps, end = [], [], 0
    with open_container(file) as container:
        stream = video_stream(container, max_pixels)
        avi = container.format.name == "avi"
        for packet in container.demux(stream):
            if packet.is_corrupt:  # the file ended inside it
                raise BadMedia("cut short: its last frame is incomplete")
            stamp = packet.dts if avi or packet.pts is None else packet.pts
            stamp = None if packet.is_discard else stamp
            if packet.size:  # all but the last, which asks the decoder for what it holds back
                packets.append(Packet(stamp, packet.is_keyframe))
            if stamp is None:
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
    first, last = min(stamps), max(stamps)
    if end <= last and len(stamps) > 1:  # the last frame lasts as long as the average one
        end = last + Fraction(last - first, len(stamps) - 1)
    if end * unit < _COMPLETE * declared:
        raise BadMedia(f"cut short: it says {float(declared):.1f} s, has {float(end * unit):.1f} s")
    return Timeline(packets, unit, (max(end, last) - first) * unit, avi)


def _tail(file: BinaryIO) -> bytes:
    """The last bytes of a file, less the padding that some writers add."""
    file.seek(max(0, file.seek(0, io.SEEK_END) - 64))
    return file.read().rstrip(b"\0\r\n ")


def _declared(container: av.container.InputContainer, stream: av.VideoStream) -> Fraction:
    """The length in seconds the header promises for the images, 0 where it says nothing."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    if container.duration is not None and len(container.streams) == 1:
        return Fraction(container.duration, av.time_base)
    return Fraction(0)
