"""Headers tell size, frames and seconds without a pixel being decoded."""

import io

import numpy as np
import pytest
from PIL import Image
from support.clips import CODINGS, SIZE, Coding, clip, image
from support.patches import forbid_decoding

from vadapter.data.media.images import BadMedia
from vadapter.data.media.media_header import probe


def encoded(format: str, count: int = 1) -> bytes:
    first, *rest = (Image.fromarray(image(i)) for i in range(count))
    buffer = io.BytesIO()
    more = {"save_all": True, "append_images": rest, "duration": 250} if rest else {}
    first.save(buffer, format, **more)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_size_of_an_image_is_read_without_decoding(format, monkeypatch):
    data = encoded(format)
    forbid_decoding(monkeypatch)
    assert probe(data, clip=False) == (SIZE[1], SIZE[0], 1, 0.0)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.container}-{c.codec}-{c.options}")
def test_frames_and_seconds_of_a_clip_are_read_without_decoding(coding, monkeypatch):
    data = clip([image(i) for i in range(12)], coding)
    forbid_decoding(monkeypatch)
    found = probe(data, clip=True)
    assert found[:3] == (SIZE[1], SIZE[0], 12)
    assert found.seconds == pytest.approx(1.2, abs=0.03)


def test_headers_of_animations_stills_and_raw_frames_are_read_too():
    assert probe(encoded("GIF", 4), clip=True) == (64, 48, 4, 1.0)
    assert probe(encoded("WEBP", 4), clip=True)[:3] == (64, 48, 4)
    assert probe(encoded("PNG"), clip=True)[:3] == (64, 48, 1)
    assert probe(np.zeros((3, 5, 7, 3), np.uint8), clip=True)[:3] == (7, 5, 3)
    assert probe(np.zeros((5, 7, 3), np.uint8), clip=False)[:3] == (7, 5, 1)


def test_media_without_a_header_are_bad_media(tmp_path):
    torn = clip([image(i) for i in range(20)], Coding("mp4", "mpeg4"))
    for media in (b"", b"<html>", torn[:1000], tmp_path / "missing.mp4"):
        for is_clip in (False, True):
            with pytest.raises(BadMedia):
                probe(media, clip=is_clip)
