"""JPEGs decoded at a part of their size are nearly the same, and all other images the same bits."""

import dataclasses
import io
import random

import numpy as np
import pytest
from PIL import Image

from vadapter.data.media.frames import load_square
from vadapter.data.media.images import BadMedia, ImageTransform

# Levels of 255: the mean difference of any image (typically 0.5), and the most of 9 in 10 pixels.
MEAN, MOST = 4, 12
COUNT = 150


def detailed(draw: random.Random, width: int, height: int) -> Image.Image:
    """A photograph's detail: noise of several scales, and edges."""
    noise = np.random.default_rng(draw.randrange(2**32))
    pixels = np.full((height, width, 3), 128.0)
    for scale in (2, 8, 32, 128):
        coarse = noise.normal(0, 5 * scale**0.4, (height // scale + 2, width // scale + 2, 3))
        layers = [Image.fromarray(c.astype(np.float32)) for c in np.moveaxis(coarse, -1, 0)]
        pixels += np.stack([np.asarray(x.resize((width, height), 3)) for x in layers], -1)
    for _ in range(4):
        x, y = draw.randrange(width), draw.randrange(height)
        pixels[y : y + height // 4, x : x + width // 3] += draw.randrange(-80, 80)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def random_jpeg(draw: random.Random, mode: str = "") -> tuple[bytes, tuple[int, int]]:
    """A JPEG of any size, mode, orientation and encoding, and its width and height."""
    size = round(2 ** draw.uniform(4, 9)), round(2 ** draw.uniform(4, 9))
    table = Image.Exif()
    table[0x0112] = draw.randrange(1, 9)
    buffer = io.BytesIO()
    detailed(draw, *size).convert(mode or draw.choice(["RGB", "RGB", "L", "CMYK"])).save(
        buffer, "JPEG", quality=draw.choice([30, 75, 90, 98]), subsampling=draw.randrange(3),
        progressive=draw.random() < 0.3, exif=table.tobytes(),
    )  # fmt: skip
    return buffer.getvalue(), size


def random_view(draw: random.Random) -> ImageTransform:
    return ImageTransform(
        draw.randrange(8, 100), draw.choice(["crop", "stretch", "pad"]),
        draw.choice(["bicubic", "bilinear"]), draw.choice([1.0, 0.875]), draw.random() < 0.5,
    )  # fmt: skip


def both(data: bytes, view: ImageTransform, **options) -> list[np.ndarray]:
    ways = ("exact", "fast")
    views = (dataclasses.replace(view, decode=way) for way in ways)
    return [load_square(data, each, frames=1, **options)[0].astype(int) for each in views]


@pytest.mark.parametrize("seed", range(4))
def test_a_jpeg_of_any_kind_differs_little_if_reduced_and_not_at_all_if_not(seed):
    draw, reduced = random.Random(seed), []
    for _ in range(COUNT // 4):
        (data, size), view = random_jpeg(draw), random_view(draw)
        exact, fast = both(data, view, flip=draw.random() < 0.5)
        factor = dataclasses.replace(view, decode="fast").reduction(*size)
        if factor == 1:
            np.testing.assert_array_equal(fast, exact)
            continue
        difference = np.abs(fast - exact)
        reduced.append(factor)
        assert difference.mean() <= MEAN, (view, size, factor)
        assert np.percentile(difference, 90) <= MOST, (view, size, factor)
    assert {2, 4, 8} <= set(reduced)
    assert len(reduced) > COUNT // 16


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(257, 131), (255, 129), (131, 261)])
def test_the_part_of_a_last_column_or_row_does_not_move_an_image(orientation, size):
    # A ramp is resized to a ramp: half a pixel off would be half a step of it, 2 levels.
    x, y = np.meshgrid(*map(np.arange, size))
    ramp = np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) * 255 / sum(size)], -1)
    table, buffer = Image.Exif(), io.BytesIO()
    table[0x0112] = orientation
    image = Image.fromarray(ramp.round().astype(np.uint8))
    image.save(buffer, "JPEG", quality=98, subsampling=0, exif=table.tobytes())
    for fit in ("crop", "stretch", "pad"):
        view = ImageTransform(62, fit)
        assert dataclasses.replace(view, decode="fast").reduction(*size) in (2, 4)
        exact, fast = both(buffer.getvalue(), view)
        assert np.abs((fast - exact).mean((0, 1))).max() < 0.15
        assert np.abs(fast - exact)[2:-2, 2:-2].max() <= 3


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_no_side_becomes_shorter_than_what_it_is_resized_to(fit):
    for side in range(1, 400, 3):
        for other in (side, 2 * side, 7 * side + 1):
            for size in (1, 10, 24, 50):
                view = ImageTransform(size, fit, crop_pct=0.8, decode="fast")
                factor = view.reduction(side, other)
                least = {"crop": view.short, "stretch": size, "pad": size}[fit]
                longest = max(side, other) if fit == "pad" else min(side, other)
                assert factor == 1 or longest / factor >= least
                # and a greater one would not do
                assert factor == 8 or min(side, other) < 2 * factor or longest < 2 * factor * least
                assert view.reduction(other, side) == factor
                assert dataclasses.replace(view, decode="exact").reduction(side, other) == 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "GIF"])
def test_other_formats_are_the_same_bits(format):
    buffer = io.BytesIO()
    detailed(random.Random(0), 200, 150).save(buffer, format)
    exact, fast = both(buffer.getvalue(), ImageTransform(16))
    np.testing.assert_array_equal(fast, exact)


@pytest.mark.parametrize("part", [0.02, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpegs_are_refused_for_the_same_reason(part, progressive):
    buffer = io.BytesIO()
    detailed(random.Random(1), 320, 240).save(buffer, "JPEG", progressive=progressive)
    data = buffer.getvalue()[: int(part * len(buffer.getvalue()))]
    reasons = []
    for decode in ("exact", "fast"):
        with pytest.raises(BadMedia) as caught:
            load_square(data, ImageTransform(32, decode=decode), frames=1)
        reasons.append(caught.value.reason)
    assert len(set(reasons)) == 1


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (7, 9), (3, 500), (65, 2)])
@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
def test_tiny_and_narrow_jpegs_are_decoded(size, fit):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 100, 50)).save(buffer, "JPEG", quality=95)
    for target in (1, 4, 32):
        exact, fast = both(buffer.getvalue(), ImageTransform(target, fit))
        assert fast.shape == (target, target, 3)
        assert np.abs(fast - exact).max() <= 2


def test_frames_of_a_still_image_share_its_memory():
    buffer = io.BytesIO()
    detailed(random.Random(2), 64, 48).save(buffer, "JPEG")
    frames = load_square(buffer.getvalue(), ImageTransform(16), frames=8)
    assert frames.shape == (8, 16, 16, 3)
    assert frames.strides[0] == 0
