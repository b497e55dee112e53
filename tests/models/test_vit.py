"""The vision transformer: its shapes and what it does to pixels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.errors import ConfigError
from vadapter.models.stem import ConvStem
from vadapter.models.vit import ViT


@pytest.fixture
def frames():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (2, 3, tiny.IMAGE, tiny.IMAGE, 3), np.uint8)


def run(module, params, frames):
    return np.asarray(jax.jit(module.apply)({"params": params}, frames))


@pytest.mark.parametrize("class_token", [False, True])
def test_tokens_have_the_announced_shape_and_the_class_token_comes_first(frames, class_token):
    module = ViT(dataclasses.replace(tiny.VIT, class_token=class_token))
    params = tiny.init(module, frames)
    tokens = run(module, params, frames)
    assert tokens.shape == (2, 3, module.tokens_per_frame(), module.width)
    assert module.tokens_per_frame() == 4 + class_token
    assert module.view.size == tiny.IMAGE
    assert ("class_token" in params) == class_token
    if class_token:  # the token that its parameter changes most
        other = params | {"class_token": -params["class_token"]}
        change = np.abs(run(ViT(module.config), other, frames) - tokens).max(axis=(0, 1, 3))
        assert change[0] > 2 * change[1:].max()


def test_pixels_are_scaled_to_one_then_normalized_by_mean_and_spread(frames):
    mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
    module = ViT(dataclasses.replace(tiny.VIT, mean=mean, std=std))
    plain = ViT(dataclasses.replace(tiny.VIT, mean=(0.0,) * 3, std=(1.0,) * 3))
    params = tiny.init(module, frames)
    by_hand = ((frames / 255 - np.array(mean)) / np.array(std) * 255).astype(np.float32)
    a, b = run(module, params, frames), run(plain, params, by_hand)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a - run(plain, params, frames)).max() > 0.01


def test_patches_are_read_row_by_row_with_channels_innermost(frames):
    module = ViT(tiny.VIT)
    params = tiny.init(module, frames)
    _, seen = jax.jit(
        lambda p: module.apply(
            {"params": p},
            frames,
            capture_intermediates=lambda m, _: m.name == "patches",
            mutable=["intermediates"],
        )
    )(params)
    patches = seen["intermediates"]["patches"]["__call__"][0]  # [B·F, N, D]
    x = (frames / 255 - 0.5) / 0.5
    kernel = params["patches"]["kernel"].reshape(8, 8, 3, module.width)
    for n, (row, column) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        patch = x[:, :, row : row + 8, column : column + 8]
        expected = np.einsum("bfhwc,hwcd->bfd", patch, kernel) + params["patches"]["bias"]
        np.testing.assert_allclose(patches[:, n], expected.reshape(6, -1), atol=1e-4)


def test_frames_and_rows_do_not_see_each_other(frames):
    module = ViT(tiny.VIT)
    params = tiny.init(module, frames)
    together = run(module, params, frames)
    for b, f in ((0, 0), (1, 2)):
        other = np.zeros_like(frames)
        other[b, f] = frames[b, f]
        np.testing.assert_allclose(run(module, params, other)[b, f], together[b, f], atol=1e-5)


def test_positions_matter(frames):
    module = ViT(tiny.VIT)
    params = tiny.init(module, frames)
    same = params | {"positions": np.zeros_like(params["positions"])}
    swapped = np.concatenate([frames[:, :, 8:], frames[:, :, :8]], axis=2)
    order = np.array([2, 3, 0, 1])
    without = run(module, same, frames), run(module, same, swapped)
    np.testing.assert_allclose(without[0], without[1][:, :, order], atol=1e-5)
    within = run(module, params, frames), run(module, params, swapped)
    assert np.abs(within[0] - within[1][:, :, order]).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_convolutional_stem_gives_the_same_grid_of_tokens(frames, dtype):
    module = ViT(dataclasses.replace(tiny.VIT, stem="convolutions"), jnp.dtype(dtype))
    params = tiny.init(module, frames)
    tokens = run(module, params, frames)
    assert tokens.shape == (2, 3, module.tokens_per_frame(), 16)
    assert tokens.dtype == dtype
    assert "patches" not in params


def test_a_token_of_a_convolutional_stem_sees_its_patch_and_little_around_it():
    module, size = ConvStem(width=16, patch=8), 48
    images = np.random.default_rng(0).standard_normal((1, size, size, 3), np.float32)
    params = tiny.init(module, images)
    tokens = run(module, params, images)
    assert tokens.shape == (1, 6, 6, 16)
    changed = images.copy()
    changed[:, 24:32, 24:32] = 0
    difference = np.abs(run(module, params, changed) - tokens).max(axis=(0, 3))
    assert difference[3, 3] > 0.01
    assert difference[0].max() == difference[:, 0].max() == 0
    assert difference[5].max() == difference[:, 5].max() == 0


@pytest.mark.parametrize(("patch", "width"), [(1, 8), (3, 12), (12, 12), (8, 6)])
def test_a_convolutional_stem_of_other_sizes_is_refused(patch, width):
    config = dataclasses.replace(
        tiny.VIT, stem="convolutions", patch=patch, image_size=24, width=width, heads=1
    )
    with pytest.raises(ConfigError, match=f"patch={patch} and width={width}"):
        tiny.init(ViT(config), np.zeros((1, 1, 24, 24, 3), np.uint8))


SIDES = [tiny.IMAGE + step for step in (-tiny.VIT.patch, -1, 1, tiny.VIT.patch, tiny.IMAGE)]


@pytest.mark.parametrize("positions", ["trained", "patches", "waves"])
@pytest.mark.parametrize("border", [0, 1])
def test_frames_of_another_size_than_the_encoders_are_never_cropped(positions, border, frames):
    size = tiny.IMAGE + border  # a border that no patch covers
    module = ViT(dataclasses.replace(tiny.VIT, image_size=size, positions=positions))
    own = np.pad(frames, [(0, 0), (0, 0), (0, border), (0, border), (0, 0)])
    jax.eval_shape(module.init, jax.random.key(0), own)
    for side in (step + border for step in SIDES):
        for shape in ((side, side), (size, side), (side, size)):
            other = np.zeros((1, 1, *shape, 3), np.uint8)
            with pytest.raises(ValueError, match=f"image_size is {size}"):
                jax.eval_shape(module.init, jax.random.key(0), other)
