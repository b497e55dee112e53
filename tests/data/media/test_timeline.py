"""Decoding only what chosen frames depend on gives the frames that decoding everything gives."""

import contextlib
import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
from support.clips import CODINGS, Coding, clip, image, numbers

from vadapter.data.media import timeline, video
from vadapter.data.media.images import BadMedia
from vadapter.data.media.timeline import Packet, Timeline
from vadapter.data.media.video import decode_clip
from vadapter.data.sources.table import ImageFolder

X264 = Coding("mp4", "libx264")
GROUPS = [
    *(dataclasses.replace(coding, options=(*coding.options, ("g", "7"))) for coding in CODINGS),
    dataclasses.replace(X264, options=(("x264-params", "open-gop=1:keyint=9:bframes=3"),)),
    dataclasses.replace(X264, options=(("x264-params", "intra-refresh=1:keyint=9"),)),
]


@pytest.fixture
def everything(monkeypatch):
    """decode_clip, for which everything up to the last chosen frame is decoded."""

    def decode(data, frames=8):
        with monkeypatch.context() as patch:
            patch.setattr(video, "_decode_runs", lambda *args: None)
            return decode_clip(data, frames)

    return decode


@pytest.fixture
def fallbacks(monkeypatch):
    """Grows where the short way was not trusted."""
    seen, shown = [], video._decode_all
    monkeypatch.setattr(video, "_decode_all", lambda *args: (seen.append(1), shown(*args))[1])
    return seen


def moving(count):
    """Noise that moves, so that every frame leans on those before it."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    large = np.kron(noise, np.ones((4, 4, 1), np.uint8))
    return [np.roll(large, (i, 2 * i), (0, 1)) for i in range(count)]


@pytest.mark.parametrize("coding", GROUPS, ids=lambda c: f"{c.container}-{c.codec}-{c.options}")
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_the_shortcut_gives_the_same_pixels(coding, frames, everything, fallbacks):
    data = clip(moving(41), coding)
    short = decode_clip(data, frames)
    reordered = coding.codec == "libx264" or ("bf", "2") in coding.options
    hidden = ("x264-params", "intra-refresh=1:keyint=9") in coding.options
    assert len(fallbacks) == ((coding.container == "avi" and reordered) or (hidden and frames < 8))
    np.testing.assert_array_equal(short, everything(data, frames))


@pytest.mark.parametrize("coding", [CODINGS[1], CODINGS[3], CODINGS[5], CODINGS[7]])
def test_false_key_frames_are_detected(coding, everything, fallbacks, monkeypatch):
    data = clip(moving(41), dataclasses.replace(coding, options=(*coding.options, ("g", "600"))))
    want = everything(data)
    fallbacks.clear()
    read = video.read_timeline

    def lying(*args):
        found = read(*args)
        packets = [packet._replace(key=True) for packet in found.packets]
        return dataclasses.replace(found, packets=packets)

    monkeypatch.setattr(video, "read_timeline", lying)
    np.testing.assert_array_equal(decode_clip(data), want)
    assert fallbacks


def test_corruption_outside_the_chosen_frames_passes_and_any_other_is_bad_media():
    coding = Coding("avi", "mjpeg", "yuvj420p")
    data = clip(moving(16), coding)
    frames = range(data.index(b"movi"), len(data))
    starts = [i for i in frames if data.startswith(b"00dc", i)][:16]
    assert min(b - a for a, b in itertools.pairwise(starts)) > 208
    want = decode_clip(data)
    for index in range(16):
        damaged = bytearray(data)
        damaged[starts[index] + 8 : starts[index] + 200] = bytes(192)
        if index % 2 == 0:  # 1, 3, … 15 are shown
            np.testing.assert_array_equal(decode_clip(bytes(damaged)), want)
            continue
        with contextlib.suppress(BadMedia):
            assert decode_clip(bytes(damaged)).shape == want.shape


def test_a_missing_tail_is_bad_media_if_the_header_promises_more_or_a_frame_is_partial():
    for coding in (CODINGS[1], CODINGS[3]):
        data = clip([image(i) for i in range(20)], coding)
        with pytest.raises(BadMedia):
            decode_clip(data[: len(data) * 2 // 3])


def test_rotation_is_applied_in_the_shortcut_too(fallbacks):
    stored = np.zeros((48, 64, 3), np.uint8)
    stored[:24, :32] = 250
    coding = Coding("mp4", "mpeg4", options=(("g", "3"),))
    got = decode_clip(clip([stored] * 12, coding, rotation=90), 4)
    assert got.shape == (4, 64, 48, 3)
    assert np.abs(got.astype(int) - np.rot90(stored)).mean() < 3
    assert not fallbacks


def test_decoded_runs_start_at_the_last_key_frame_before_them_and_join_where_they_touch():
    # Decoded I0 P3 B1 B2 I6 B4 B5 P9 …: frames 4 and 5 lean on the group before.
    stamps = [0, 3, 1, 2, 6, 4, 5, 9, 7, 8, 12, 10, 11, 15]
    keys = {0, 4, 10}
    packets = [Packet(stamp, i in keys) for i, stamp in enumerate(stamps)]
    line = Timeline(packets, Fraction(1, 2), Fraction(8), avi=False)
    assert [i for _, i in line.shown] == [0, 2, 3, 1, 5, 6, 4, 8, 9, 7, 11, 12, 10, 13]
    assert [float(time) for time, _ in line.shown] == [n / 2 for n in (*range(13), 15)]
    assert line.runs([7]) == [(4, 8)]
    assert line.runs([6]) == [(0, 7)]
    assert line.runs([0, 13]) == [(0, 1), (10, 14)]
    assert line.runs([5, 7]) == [(0, 8)]
    assert line.runs([1, 4]) == [(0, 2), (4, 5)]
    assert line.seekable(reordered=True)
    assert not dataclasses.replace(line, avi=True).seekable(reordered=True)
    for first in (Packet(0, False), Packet(None, True), Packet(20, True)):
        line = Timeline([first, *packets[1:]], Fraction(1), Fraction(8), avi=False)
        assert not line.seekable(reordered=True)


def test_more_frames_than_a_clip_may_have_are_refused(monkeypatch):
    monkeypatch.setattr(timeline, "MAX_FRAMES", 4)
    four = clip([image(i) for i in range(4)])
    assert numbers(decode_clip(four, 4)) == [0, 1, 2, 3]
    with pytest.raises(BadMedia, match="more than 4 frames"):
        decode_clip(clip([image(i) for i in range(5)]))


@pytest.mark.data
def test_real_clips_give_the_frames_of_decoding_everything(data_root, everything, fallbacks):
    source = ImageFolder(data_root / "msvd_clips" / "captions.jsonl")
    assert (source.kind, len(source)) == ("clip", 11)
    short = [decode_clip(source[i].media, 8) for i in range(11)]
    assert len(fallbacks) == 2  # two AVIs with reordered frames
    for index, frames in enumerate(short):
        np.testing.assert_array_equal(frames, everything(source[index].media))


@pytest.mark.data
def test_real_clips_give_their_frames_in_time_order(data_root):
    import av

    source = ImageFolder(data_root / "msvd_clips" / "captions.jsonl")
    for index in (0, 7):  # the stamps FFmpeg guesses for the second run backwards
        frames = decode_clip(source[index].media, 8)
        with av.open(str(source[index].media)) as container:
            count = sum(1 for packet in container.demux(video=0) if packet.size)
            targets = (np.arange(8) + 0.5) / 8 * count
            wanted = np.ceil(targets - 0.5).astype(int)  # the rate of these files is constant
            container.seek(0)
            shown = enumerate(container.decode(video=0))
            picked = [f.to_ndarray(format="rgb24") for i, f in shown if i in wanted]
        np.testing.assert_array_equal(frames, np.stack(picked))
