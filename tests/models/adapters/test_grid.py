"""Pooling over the grid of visual tokens, against loops over tokens one by one."""

import functools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from support.windows import averaged, resized, shuffled

from vadapter.errors import ConfigError
from vadapter.models.adapters.grid import adaptive_mean, mean_windows, on_grid, shuffle

D = 3
GRIDS = [(2, 3), (3, 2), (4, 4), (5, 7), (1, 6), (7, 4)]
GRIDS_AND_SIDES = [(grid, r) for grid in GRIDS for r in (1, 2, 3, 4)]


def tokens(grid, seed=0):
    """[2, h · w, D]: rows of the batch, tokens row by row."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, math.prod(grid), D)).astype(np.float32)


def pooled(fn, x, grid, size):
    out = fn(on_grid(jnp.asarray(x), grid), size)
    return out.shape[1:3], np.asarray(out.reshape(len(x), -1, out.shape[-1]))


@pytest.mark.parametrize(("grid", "r"), GRIDS_AND_SIDES)
def test_a_shuffle_joins_the_tokens_of_a_window_row_by_row(grid, r):
    x = tokens(grid)
    shape, out = pooled(shuffle, x, grid, r)
    assert shape == (math.ceil(grid[0] / r), math.ceil(grid[1] / r))
    np.testing.assert_array_equal(out, shuffled(x, grid, r))


@pytest.mark.parametrize(("grid", "r"), GRIDS_AND_SIDES)
def test_a_mean_is_that_of_the_tokens_that_a_window_has(grid, r):
    x = tokens(grid)
    shape, out = pooled(mean_windows, x, grid, r)
    assert shape == (math.ceil(grid[0] / r), math.ceil(grid[1] / r))
    np.testing.assert_allclose(out, averaged(x, grid, r), atol=1e-6)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [1, 2, 3, 4, 9])
def test_an_adaptive_mean_has_overlapping_windows_where_lengths_do_not_divide(grid, side):
    x = tokens(grid)
    shape, out = pooled(adaptive_mean, x, grid, side)
    assert shape == (side, side)
    np.testing.assert_allclose(out, resized(x, grid, side), atol=1e-6)


def test_the_adaptive_mean_is_pytorchs():
    torch = pytest.importorskip("torch", reason="compares with PyTorch's layer")
    x = np.random.default_rng(0).standard_normal((2, 5, 16, 11)).astype(np.float32)
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x), 12).numpy()
    ours = np.asarray(adaptive_mean(jnp.asarray(x.transpose(0, 2, 3, 1)), 12))
    np.testing.assert_allclose(ours.transpose(0, 3, 1, 2), theirs, atol=1e-6)


@pytest.mark.parametrize(
    "fn",
    [*(functools.partial(fn, r=2) for fn in (shuffle, mean_windows)),
     functools.partial(adaptive_mean, side=2)],
    ids=["shuffle", "mean_windows", "adaptive_mean"],
)  # fmt: skip
def test_rows_are_not_columns(fn):
    """A grid that is not square, read as the transposed one, gives something else."""
    x = tokens((2, 6))
    right, wrong = (fn(on_grid(jnp.asarray(x), grid)).reshape(-1) for grid in ((2, 6), (6, 2)))
    assert right.shape != wrong.shape or np.abs(right - wrong).max() > 0.1


@pytest.mark.parametrize("grid", [(), (3, 3), (8,), (2, 2, 2)])
def test_a_grid_that_does_not_have_the_tokens_is_refused_with_their_number(grid):
    with pytest.raises(
        ConfigError, match=r"grid=.* the 8 visual tokens .* must be 8.*patches_only"
    ):
        on_grid(jnp.zeros((1, 8, D)), grid)
