"""Images: every mode becomes the right RGB, hostile files end in BadMedia, resizing is Pillow's."""

import contextlib
import io
import math
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.patches import forbid_decoding

from vadapter.data.media import images
from vadapter.data.media.frames import load_media, load_square
from vadapter.data.media.images import BadMedia, ImageTransform, decode_image, resize
from vadapter.errors import ConfigError, DataError


def encode(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(height: int = 40, width: int = 60) -> np.ndarray:
    """Smooth and without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 2 % 256], -1).astype(np.uint8)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises pixels it hardly has: 70 bytes, whatever the size."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_pixels(format):
    pixels = photo()
    got = decode_image(encode(Image.fromarray(pixels), format, lossless=True))
    np.testing.assert_array_equal(got, pixels)
    assert got.dtype == np.uint8
    assert got.flags.writeable


@pytest.mark.parametrize(("options", "within"), [({}, 3), ({"progressive": True}, 3)])
def test_jpeg_gives_nearly_the_pixels(options, within):
    got = decode_image(encode(Image.fromarray(photo()), "JPEG", quality=95, **options))
    assert np.abs(got.astype(int) - photo()).mean() < within


def test_a_path_and_its_bytes_give_the_same(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.fromarray(photo())))
    np.testing.assert_array_equal(decode_image(path), decode_image(path.read_bytes()))


def gray(mode: str) -> Image.Image:
    return Image.new(mode, (4, 3), 1 if mode == "1" else 200)


def test_gray_and_one_bit_repeat_in_every_channel():
    assert (decode_image(encode(gray("L"))) == 200).all()
    assert (decode_image(encode(gray("1"))) == 255).all()


def test_sixteen_bits_keep_the_upper_eight():
    wide = np.array([[0x0000, 0x00FF, 0x0100, 0x80FF, 0xFFFF]], np.uint16)
    got = decode_image(encode(Image.fromarray(wide)))
    np.testing.assert_array_equal(got[0, :, 0], [0, 0, 1, 128, 255])
    np.testing.assert_array_equal(got[..., 0], got[..., 2])


def test_transparency_is_laid_over_white():
    for mode, color in (("RGBA", (10, 20, 30, 0)), ("LA", (10, 0))):
        assert (decode_image(encode(Image.new(mode, (3, 3), color))) == 255).all()
    half = decode_image(encode(Image.new("RGBA", (3, 3), (0, 100, 200, 128))))
    np.testing.assert_allclose(half[0, 0], [127, 177, 227], atol=1)


def test_palettes_with_and_without_a_transparent_color():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(decode_image(encode(image)), [[[10, 20, 30], [200, 100, 50]]])
    keyed = encode(image, transparency=0)
    np.testing.assert_array_equal(decode_image(keyed), [[[255] * 3, [200, 100, 50]]])


def test_a_transparent_color_of_rgb_is_laid_over_white():
    data = encode(Image.new("RGB", (2, 2), (9, 8, 7)), transparency=(9, 8, 7))
    assert (decode_image(data) == 255).all()


def test_cmyk_jpeg_becomes_rgb():
    red = decode_image(encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95))
    np.testing.assert_allclose(red[8, 8], [255, 0, 0], atol=8)


def test_a_color_profile_changes_nothing():
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    plain, profiled = (
        encode(Image.fromarray(photo())),
        encode(Image.fromarray(photo()), icc_profile=profile),
    )
    np.testing.assert_array_equal(decode_image(plain), decode_image(profiled))


def exif(orientation: int) -> bytes:
    table = Image.Exif()
    table[0x0112] = orientation
    return table.tobytes()


# The pixels a camera stores for an upright image, by orientation (EXIF 2.3, tag 0x0112).
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_exif_orientation_is_undone(orientation, format):
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](photo())))
    data = encode(stored, format, exif=exif(orientation), lossless=True)
    np.testing.assert_array_equal(decode_image(data), photo())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_of_a_camera_is_turned_upright(orientation):
    stored = Image.fromarray(
        np.ascontiguousarray(STORED[orientation](photo()[..., :1].repeat(3, 2)))
    )
    data = encode(stored, "JPEG", quality=95, exif=exif(orientation))
    got = decode_image(data).astype(int)
    assert np.abs(got - photo()[..., :1]).max() < 12


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "junk", [b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"]
)
def test_invalid_exif_is_ignored(junk):
    data = encode(Image.fromarray(photo()), "JPEG", exif=junk)
    assert decode_image(data).shape == (40, 60, 3)
    unknown = encode(Image.fromarray(photo()), "PNG", exif=exif(77))
    np.testing.assert_array_equal(decode_image(unknown), photo())


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (8, 8), (level,) * 3) for level in (0, 120, 240)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert (decode_image(data) < 4).all()


@pytest.mark.parametrize(
    "size", [(9000, 9000), (20000, 20000), (2**31 - 1, 2**31 - 1), (25001, 1000)]
)
def test_a_bomb_is_refused_by_its_header(size, monkeypatch):
    forbid_decoding(monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadMedia):
            decode_image(png_header(*size))


def test_the_limit_is_on_the_product_of_the_sides(monkeypatch):
    data = encode(Image.new("L", (100, 50)))
    monkeypatch.setattr(images, "MAX_PIXELS", 5000)
    assert decode_image(data).shape == (50, 100, 3)
    monkeypatch.setattr(images, "MAX_PIXELS", 4999)
    with pytest.raises(BadMedia, match="100x50 pixels, more than the 4999 allowed"):
        decode_image(data)


def jpeg() -> bytes:
    return encode(Image.fromarray(photo(64, 64)), "JPEG")


HOSTILE = {
    "empty": b"",
    "one byte": b"\xff",
    "markup": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "noise": bytes(np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)),
    "half a jpeg": jpeg()[: len(jpeg()) // 2],
    "jpeg header only": jpeg()[:30],
    "jpeg without its end": jpeg()[:-200],
    "png that lacks pixels": png_header(100, 100),
    "png of size zero": png_header(0, 10),
    "half a png": encode(Image.fromarray(photo()))[:120],
    "half a webp": encode(Image.fromarray(photo()), "WEBP")[:200],
    "half a gif": encode(Image.fromarray(photo()), "GIF")[:1200],
    "tiff": encode(Image.fromarray(photo()), "TIFF"),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "pickle": pickle.dumps({"a": 1}),
    "text chunk bomb": (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100 << 20)))
        + chunk(b"IDAT", zlib.compress(bytes(4)))
        + chunk(b"IEND", b"")
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("frames", [1, 8])
def test_an_unusable_image_is_bad_media_with_a_reason(name, frames):
    with pytest.raises(BadMedia) as caught:
        load_media(HOSTILE[name], frames=frames)
    assert caught.value.reason
    assert isinstance(caught.value, DataError)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert (copied.reason, str(copied)) == (caught.value.reason, str(caught.value))


def test_markup_in_the_place_of_an_image_shows_its_beginning():
    with pytest.raises(BadMedia, match="DOCTYPE"):
        decode_image(HOSTILE["markup"])


def test_flipped_bits_never_raise_anything_else():
    random = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = encode(Image.fromarray(photo()), format)
        for _ in range(60):
            flipped = bytearray(data)
            for at in random.integers(0, len(data), 3):
                flipped[at] ^= 1 << random.integers(8)
            with contextlib.suppress(BadMedia):
                assert decode_image(bytes(flipped)).ndim == 3


@pytest.mark.parametrize("frames", [1, 8])
def test_irregular_files_are_refused_without_blocking_or_reading(tmp_path, frames):
    os.mkfifo(tmp_path / "fifo.jpg")
    for name, words in (("fifo.jpg", "regular file"), ("missing.jpg", "regular file"),
                        (".", "is a directory; pass image or clip files")):  # fmt: skip
        with pytest.raises(BadMedia, match=words):
            load_media(tmp_path / name, frames=frames)


def pillow_resize_then_crop(
    pixels: np.ndarray, size: int, mode: str, short: int = 0, half=round
) -> np.ndarray:
    height, width = pixels.shape[:2]
    scale, short = (short or size) / min(height, width), short or size
    shape = max(short, int(width * scale + 1e-9)), max(short, int(height * scale + 1e-9))
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    whole = np.asarray(Image.fromarray(pixels).resize(shape, resample))
    top, left = half((shape[1] - size) / 2), half((shape[0] - size) / 2)
    return whole[top : top + size, left : left + size]


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (32, 32), (33, 90), (7, 5), (200, 333)])
def test_crop_is_the_short_side_resized_and_the_center_cut_out(mode, shape):
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize(shape[::-1], Image.Resampling.BICUBIC))
    got = resize(pixels[None], ImageTransform(32, interpolation=mode))[0]
    want = pillow_resize_then_crop(pixels, 32, mode)
    np.testing.assert_array_equal(got, want)
    shifted = pillow_resize_then_crop(np.roll(pixels, 1, (0, 1)), 32, mode)
    assert np.abs(shifted.astype(int) - want).max() > 4  # half a pixel off would show


@pytest.mark.parametrize("shape", [(500, 333), (331, 500), (100, 150), (150, 103), (90, 800)])
def test_the_short_side_may_be_longer_than_the_cut_and_its_margin_rounded_down(shape):
    pixels = photo(*shape)
    for short in (32, 37):
        got = resize(pixels[None], ImageTransform(32, crop_pct=32 / short, floor=True))[0]
        want = pillow_resize_then_crop(pixels, 32, "bicubic", short, math.floor)
        np.testing.assert_array_equal(got, want)


def test_of_a_very_long_image_only_the_middle_is_computed_and_is_nearly_the_same():
    pixels = photo(20, 700)
    got = resize(pixels[None], ImageTransform(32))[0]
    want = pillow_resize_then_crop(pixels, 32, "bicubic")
    assert np.abs(got.astype(int) - want).max() <= 16


def test_an_image_of_the_right_size_passes_unchanged():
    frames = np.stack([photo(32, 32), photo(32, 32)[::-1]])
    for fit in ("crop", "stretch", "pad"):
        np.testing.assert_array_equal(resize(frames, ImageTransform(32, fit)), frames)


def test_shrinking_is_antialiased():
    checks = np.kron([[0, 255] * 32, [255, 0] * 32] * 32, np.ones((1, 1))).astype(np.uint8)
    out = resize(np.repeat(checks[None, ..., None], 3, -1), ImageTransform(8))
    assert (np.abs(out.astype(int) - 127) < 10).all()


def test_stretch_shows_all_and_pad_keeps_the_proportions():
    wide = np.zeros((1, 10, 40, 3), np.uint8)
    wide[:, :, :10], wide[:, :, 30:] = 255, 255
    stretched, padded = (resize(wide, ImageTransform(20, fit))[0] for fit in ("stretch", "pad"))
    assert (stretched[10, [0, -1]] > 250).all()
    assert (padded[[0, 6, 13, -1]] == 127).all()
    assert (padded[10, [0, -1]] > 250).all()
    assert (padded[10, 10] < 5).all()


def test_flip_mirrors_left_and_right():
    np.testing.assert_array_equal(
        resize(photo()[None], ImageTransform(16), flip=True),
        resize(photo()[None], ImageTransform(16))[:, :, ::-1],
    )


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("shape", [(1, 65500), (65500, 1)])
def test_a_line_of_pixels_costs_no_more_than_another_image(fit, shape):
    line = decode_image(encode(Image.new("L", shape[::-1], 77)))
    out = resize(line[None], ImageTransform(64, fit))
    assert out.shape == (1, 64, 64, 3)
    assert (out[0, 31, 31] == 77).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"interpolation": "nearest"},
            "interpolation='nearest': unknown; known: bicubic, bilinear",
        ),
        ({"fit": "squash"}, "fit='squash': unknown; known: crop, pad, stretch"),
        ({"decode": "draft"}, "decode='draft': unknown; known: exact, fast"),
        ({"size": 0}, "image_size=0, .*image_size must be at least 1"),
        ({"crop_pct": 87.5}, "crop_pct=87.5: .*above 0 and at most 1"),
        ({"crop_pct": 0.0}, "crop_pct=0.0: .*above 0 and at most 1"),
    ],
)
def test_an_unknown_way_to_resize_is_a_configuration_error(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ImageTransform(**({"size": 8} | wrong))


def test_the_short_side_follows_exactly_from_the_share_that_is_kept():
    for size in (224, 336, 518):
        for short in range(size, 2 * size):
            assert ImageTransform(size, crop_pct=size / short).short == short
    assert ImageTransform(288, crop_pct=224 / 256).short == 329  # timm rounds 329.14 down, too


def test_a_still_image_repeats():
    data = encode(Image.fromarray(photo()))
    np.testing.assert_array_equal(load_media(data, frames=1), photo()[None])
    np.testing.assert_array_equal(load_media(data, frames=3), np.stack([photo()] * 3))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("frames", [1, 3])
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_the_shortcut_to_a_square_gives_what_decoding_and_resizing_give(fit, frames, flip):
    gif = [Image.fromarray(np.roll(photo(), 9 * n, 1)).quantize(64) for n in range(5)]
    media = [
        encode(Image.fromarray(photo()), exif=exif(6)),
        encode(gif[0], "GIF", save_all=True, append_images=gif[1:]),
        np.stack([photo(), photo()[::-1]]),
    ]
    view = ImageTransform(24, fit=fit)
    for each in media:
        made = load_square(each, view, frames=frames, flip=flip)
        assert (made.shape, made.dtype) == ((frames, 24, 24, 3), np.uint8)
        whole = resize(load_media(each, frames=frames), view, flip=flip)
        np.testing.assert_array_equal(made, whole)
    with pytest.raises(BadMedia, match=r"not an image \(JPEG"):
        load_square(b"<html>", view, frames=frames)


def test_raw_frames_are_taken_from_the_middles_of_equal_parts():
    raw = np.arange(8, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    level = lambda frames: load_media(raw, frames=frames)[:, 0, 0, 0].tolist()  # noqa: E731
    assert level(8) == list(range(8))
    assert level(4) == [1, 3, 5, 7]
    assert level(1) == [4]
    assert level(16) == [n // 2 for n in range(16)]
    assert load_media(raw[0], frames=2).shape == (2, 2, 2, 3)


@pytest.mark.parametrize(
    "raw", [np.zeros((2, 2, 2, 3)), np.zeros((2, 2), np.uint8), np.zeros((0, 2, 2, 3), np.uint8)]
)
def test_raw_frames_of_another_kind_are_bad_media(raw):
    with pytest.raises(BadMedia, match="u8"):
        load_media(raw, frames=1)


@pytest.mark.data
def test_real_photos_decode_to_the_stated_sizes(data_root):
    from vadapter.data.sources.tars import CaptionTars

    source = CaptionTars(data_root / "flickr8k", "test")
    for index in range(0, len(source), 50):
        frames = load_media(source[index].media, frames=1)
        assert frames.shape == (1, 144, 144, 3)
        assert frames.std() > 5
