"""Clips: the frame nearest to each time, by the file's time stamps, whatever the container."""

import contextlib
import io
import os
from collections import Counter
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image
from support.clips import CODINGS, LOSSLESS, SIZE, Coding, clip, image, numbers

from vadapter.data.media import images, timeline, video
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import BadMedia
from vadapter.data.media.video import decode_clip, frame_times, nearest


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.container}-{c.codec}-{c.options}")
def test_frames_are_the_middles_of_equal_parts_in_every_format(coding):
    # 16 frames in 1.6 s: the middle of part i is 0.1 + 0.2 i, exactly where frame 2 i + 1 begins.
    frames = decode_clip(clip([image(i) for i in range(16)], coding), 8)
    assert frames.shape == (8, *SIZE, 3)
    assert frames.dtype == np.uint8
    assert numbers(frames) == [1, 3, 5, 7, 9, 11, 13, 15]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 20])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_the_choice_follows_the_stated_rule_for_any_length(count, frames):
    got = numbers(decode_clip(clip([image(i) for i in range(count)]), frames))
    times = np.arange(count)
    targets = (np.arange(frames) + 0.5) / frames * count
    assert got == [int(np.abs(times - t).argmin()) for t in targets]


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.container}-{c.codec}-{c.options}")
def test_clips_of_one_and_of_five_frames_repeat_them_in_every_format(coding):
    assert numbers(decode_clip(clip([image(5)], coding), 8)) == [5] * 8
    five = decode_clip(clip([image(i) for i in range(5)], coding), 8)
    assert numbers(five) == [0, 1, 2, 2, 3, 3, 4, 4]


def test_a_short_clip_repeats_its_frames_in_order():
    assert numbers(decode_clip(clip([image(5)]), 8)) == [5] * 8
    assert numbers(decode_clip(clip([image(0), image(1)]), 8)) == [0, 0, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "coding", [LOSSLESS, *CODINGS[3:6]], ids=lambda c: f"{c.container}-{c.codec}"
)
def test_a_variable_frame_rate_counts_time_not_frames(coding):
    # Ten frames in the first second, then one each second to the fifth.
    stamps = [*range(10), 10, 20, 30, 40]
    data = clip([image(i) for i in range(14)], coding, stamps=stamps)
    with av.open(io.BytesIO(data)) as container:  # how long the last one lasts, the file says
        packets = [p for p in container.demux(video=0) if p.size]
        end = float(max(p.pts + p.duration for p in packets) * packets[0].time_base) * 10
    assert 40 <= end <= 50
    end += 40 / 13 * (end == 40)  # or else it lasts as long as the average one
    want = [int(np.abs(np.array(stamps) - (i + 0.5) / 4 * end).argmin()) for i in range(4)]
    assert numbers(decode_clip(data, 4)) == want
    assert want[1:3] == [11, 12]  # a count of frames would say 5, 8


def test_a_clip_that_does_not_start_at_zero_is_counted_from_its_first_frame():
    stamps = [i + 30 for i in range(8)]
    assert numbers(decode_clip(clip([image(i) for i in range(8)], stamps=stamps), 8)) == [*range(8)]


def test_a_path_and_its_bytes_give_the_same(tmp_path):
    data = clip([image(i) for i in range(12)])
    (tmp_path / "a.mkv").write_bytes(data)
    np.testing.assert_array_equal(decode_clip(tmp_path / "a.mkv"), decode_clip(data))
    np.testing.assert_array_equal(load_media(tmp_path / "a.mkv", frames=8), decode_clip(data))
    np.testing.assert_array_equal(load_media(data, frames=1), decode_clip(data, 1))


def test_colors_and_orientation_survive():
    corner = np.zeros((*SIZE, 3), np.uint8)
    corner[:24, :32] = 255, 0, 0
    corner[24:, :32] = 0, 0, 255
    np.testing.assert_array_equal(decode_clip(clip([corner] * 3), 1)[0], corner)
    for coding in CODINGS[1:6]:
        got = decode_clip(clip([corner] * 3, coding), 1)[0]
        for y, x in ((10, 10), (40, 10), (10, 50)):
            np.testing.assert_allclose(got[y, x].astype(int), corner[y, x], atol=12)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_in_the_metadata_is_applied(rotation):
    corner = np.zeros((*SIZE, 3), np.uint8)
    corner[:24, :32] = 250
    got = decode_clip(clip([corner] * 2, Coding("mp4", "mpeg4"), rotation=rotation), 2)
    want = np.rot90(corner, rotation // 90)  # anticlockwise, as FFmpeg's display matrix counts
    assert got.shape == (2, *want.shape)
    assert np.abs(got[0].astype(int) - want).mean() < 3


def test_an_upright_phone_video_is_upright():
    """The matrix phones write for a clockwise quarter turn (ISO 14496-12, tkhd)."""
    corner = np.zeros((*SIZE, 3), np.uint8)
    corner[:24, :32] = 250  # top left as stored, top right as shown
    data = clip([corner] * 2, Coding("mp4", "mpeg4"))
    one, unit = (1 << 16).to_bytes(4, "big"), (1 << 30).to_bytes(4, "big")
    none, minus = bytes(4), (-(1 << 16)).to_bytes(4, "big", signed=True)
    identity = one + none * 3 + one + none * 3 + unit
    quarter = none + one + none + minus + none * 2 + SIZE[0].to_bytes(2, "big") + none + bytes(2)
    at = data.index(identity, data.index(b"tkhd"))
    shown = decode_clip(data[:at] + quarter + unit + data[at + 36 :], 1)[0]
    assert shown.shape == (64, 48, 3)
    assert shown[10, 40].min() > 230
    assert shown[10, 10].max() < 20


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_animations_are_clips_with_their_own_times(format):
    durations = [100] * 7 + [900]  # 1.6 s: most of the targets lie in the last frame
    images = [Image.fromarray(image(i)) for i in range(8)]
    buffer = io.BytesIO()
    options = {"lossless": True, "save_all": True, "append_images": images[1:]}
    images[0].save(buffer, format, duration=durations, **options)
    assert numbers(load_media(buffer.getvalue(), frames=8)) == [1, 3, 5, 7, 7, 7, 7, 7]
    assert numbers(load_media(buffer.getvalue(), frames=1)) == [0]  # as an image: the first


@pytest.mark.parametrize("format", ["GIF", "WEBP"])
def test_transparency_in_an_animation_is_laid_over_white(format):
    clear = [Image.new("RGBA", (8, 8), (9, 9, 9, 0)) for _ in range(2)]
    clear[1].putpixel((0, 0), (9, 9, 9, 255))
    buffer = io.BytesIO()
    clear[0].save(buffer, format, save_all=True, append_images=clear[1:], lossless=True)
    assert (decode_clip(buffer.getvalue(), 2)[:, 4, 4] == 255).all()


def test_a_still_image_in_the_place_of_a_clip_repeats():
    for format in ("PNG", "JPEG", "WEBP", "GIF"):
        buffer = io.BytesIO()
        Image.fromarray(image(7)).save(buffer, format)
        assert numbers(load_media(buffer.getvalue(), frames=3)) == [7, 7, 7]


def test_only_what_chosen_frames_depend_on_is_decoded_and_only_they_are_converted(monkeypatch):
    seen = Counter()
    decoded, pixels = video._decoded, video._pixels

    def counted(context, packets, *args):
        for frame in decoded(context, packets, *args):
            seen["decoded"] += 1
            yield frame

    def converted(frame, size):
        seen["converted"] += 1
        return pixels(frame, size)

    monkeypatch.setattr(video, "_decoded", counted)
    monkeypatch.setattr(video, "_pixels", converted)
    # Key frames 0, 12, 24, 36; chosen 5, 15, 25, 35: 6 + 4 + 12 frames are needed.
    got = decode_clip(clip([image(i % 20) for i in range(40)]), 4)
    assert numbers(got) == [5, 15, 5, 15]
    assert seen == {"decoded": 22, "converted": 4}
    seen.clear()
    decode_clip(clip([image(0), image(1)]), 8)
    assert seen == {"decoded": 2, "converted": 2}


def test_nearest_takes_the_earlier_of_two_and_reads_no_further():
    source = iter([(Fraction(t), t) for t in range(10)])
    assert nearest(source, [Fraction(1, 2), Fraction(5, 4), Fraction(3)]) == [0, 1, 3]
    assert next(source)[1] == 4
    assert frame_times(Fraction(4), 2) == [1, 3]


def broken() -> dict[str, bytes]:
    avi = clip([image(i) for i in range(20)], Coding("avi", "mjpeg", "yuvj420p"))
    mp4 = clip([image(i) for i in range(20)], Coding("mp4", "mpeg4"))
    gif = io.BytesIO()
    first, *rest = (Image.fromarray(image(i)) for i in range(6))
    first.save(gif, "GIF", save_all=True, append_images=rest)
    webp = io.BytesIO()
    first.save(webp, "WEBP", save_all=True, append_images=rest)
    return {
        "empty": b"",
        "markup": b"<html>404 Not Found</html>",
        "noise": bytes(np.random.default_rng(0).integers(0, 256, 9000, dtype=np.uint8)),
        "avi header": avi[:300],
        "half an avi": avi[: len(avi) // 2],
        "half an mp4": mp4[: len(mp4) // 2],
        "half a matroska": clip([image(i) for i in range(20)])[:1500],
        "half a gif": gif.getvalue()[: len(gif.getvalue()) // 2],
        "half a webp": webp.getvalue()[: len(webp.getvalue()) // 2],
        "play list": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat script": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "sound only": sound(),
        "a wave file": b"RIFF\x24\0\0\0WAVEfmt \x10" + bytes(60),
    }


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", "matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.rate, frame.pts = 8000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


def test_an_unusable_clip_is_bad_media_with_a_reason():
    for name, data in broken().items():
        with pytest.raises(BadMedia) as caught:
            print(name, decode_clip(data, 8).shape)
        assert caught.value.reason, name


def test_a_clip_of_another_suffix_or_no_clip_at_all_is_bad_media(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"<html>404 Not Found</html>" * 50)
    os.mkfifo(tmp_path / "fifo.mp4")
    for name in ("a.mp4", "fifo.mp4", "missing.mp4"):
        with pytest.raises(BadMedia):
            load_media(tmp_path / name, frames=8)


def test_flipped_bits_never_raise_anything_else():
    random = np.random.default_rng(0)
    noisy = [random.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for _ in range(6)]
    for coding in (*CODINGS[1:4], LOSSLESS):
        data = clip(noisy, coding)
        for _ in range(15):
            flipped = bytearray(data)
            for at in random.integers(0, len(data), 3):
                flipped[at] ^= 1 << random.integers(8)
            with contextlib.suppress(BadMedia):
                assert decode_clip(bytes(flipped), 4).shape[0] == 4


def test_frames_beyond_the_limit_are_refused(monkeypatch):
    data = clip([image(i) for i in range(5)])
    with monkeypatch.context() as patch:
        patch.setattr(images, "MAX_PIXELS", 48 * 64)
        assert decode_clip(data).shape == (8, 48, 64, 3)
        patch.setattr(images, "MAX_PIXELS", 48 * 64 - 1)
        with pytest.raises(BadMedia, match="64x48 pixels"):
            decode_clip(data)
    monkeypatch.setattr(timeline, "MAX_FRAMES", 4)
    with pytest.raises(BadMedia, match="cut it into clips"):
        decode_clip(data)
