"""The linear adapters: layers, pools over the grid, and the named settings of known systems."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.windows import averaged, shuffled

from vadapter import config
from vadapter.errors import ConfigError
from vadapter.models.adapters.mlp import MlpAdapter, MlpAdapterConfig
from vadapter.models.registry import SIZES, make_module

D, E, HIDDEN = 6, 10, 14
GRID = (3, 5)


def visual(frames=1, grid=GRID, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, frames, math.prod(grid), D)).astype(np.float32)


def build(x=None, **fields):
    """An adapter with random parameters for visual tokens `x`."""
    module = MlpAdapter(MlpAdapterConfig(width=E, **fields))
    return module, tiny.init(module, visual() if x is None else x)


def layers(params, x):
    """The layers of a 2-layer adapter, on numpy."""
    for name in ("up", "down"):
        x = x if name == "up" else np.asarray(jax.nn.gelu(x))
        x = x @ params[name]["kernel"] + params[name]["bias"][None, None]
    return x


def run(module, params, x):
    return np.asarray(module.apply({"params": params}, x))


COUNTS = {1: ["out"], 2: ["up", "down"], 3: ["up", "middle_1", "down"]}


@pytest.mark.parametrize(("n", "bias"), [*itertools.product(COUNTS, (True, False))])
def test_layers_are_linear_with_a_gelu_between_them(n, bias):
    module, params = build(layers=n, bias=bias, hidden_dim=HIDDEN)
    assert set(params) == set(COUNTS[n])
    widths = [D, *[HIDDEN] * (n - 1), E]
    x = visual()[:, 0]
    for i, name in enumerate(COUNTS[n]):
        assert params[name]["kernel"].shape == (widths[i], widths[i + 1])
        x = np.asarray(jax.nn.gelu(x)) if i else x
        x = x @ params[name]["kernel"]
        assert ("bias" in params[name]) == bias
        x = x + params[name]["bias"][None, None] if bias else x
    np.testing.assert_allclose(run(module, params, visual()), x, atol=1e-4)


def test_the_width_between_the_layers_is_that_of_the_output_by_default():
    assert build()[1]["up"]["kernel"].shape == (D, E)


POOLS = {
    "none": lambda params, x: layers(params, x),
    "shuffle": lambda params, x: layers(params, shuffled(x, GRID, 2)),
    "mean": lambda params, x: layers(params, averaged(x, GRID, 2)),
    "mean_after": lambda params, x: averaged(layers(params, x), GRID, 2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_each_pool_equals_its_definition_on_a_grid_with_odd_sides(pool):
    module, params = build(pool=pool, grid=GRID)
    out = run(module, params, visual())
    np.testing.assert_allclose(out, POOLS[pool](params, visual()[:, 0]), atol=1e-4)


@pytest.mark.parametrize("pool", sorted({*POOLS} - {"none"}))
def test_frames_are_pooled_one_by_one_and_their_tokens_come_one_after_the_other(pool):
    x = visual(frames=4)
    module, params = build(x, pool=pool, grid=GRID, frames=2)
    out = run(module, params, x)
    halves = [run(module, params, x[:, i : i + 2].mean(1, keepdims=True)) for i in (0, 2)]
    np.testing.assert_allclose(out, np.concatenate(halves, axis=1), atol=1e-5)
    assert out.shape == (2, 2 * math.ceil(GRID[0] / 2) * math.ceil(GRID[1] / 2), E)


def test_a_norm_is_over_all_numbers_of_a_shuffled_token():
    module, params = build(pool="shuffle", grid=GRID, norm=True)
    assert params["norm"]["scale"].shape == (4 * D,)
    x = shuffled(visual()[:, 0], GRID, 2)
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    x = x * params["norm"]["scale"][None, None] + params["norm"]["bias"][None, None]
    np.testing.assert_allclose(run(module, params, visual()), layers(params, x), atol=1e-4)


@pytest.mark.parametrize(("std", "expected"), [(0.02, 0.02), (0.0, D**-0.5)])
def test_kernels_start_with_the_stated_spread_or_that_of_their_inputs(std, expected):
    module = MlpAdapter(MlpAdapterConfig(width=2000, layers=1, kernel_std=std))
    kernel = module.init(tiny.key(0), visual())["params"]["out"]["kernel"].value
    assert float(kernel.std()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("pool", sorted({*POOLS} - {"none"}))
def test_a_pool_needs_a_grid_of_the_encoders_tokens(pool):
    assert MlpAdapterConfig(pool=pool).needs_grid
    with pytest.raises(ConfigError, match="15 visual tokens"):
        build(pool=pool, grid=(4, 4))
    assert not MlpAdapterConfig().needs_grid


@pytest.mark.parametrize("key", ["layers", "factor", "frames"])
def test_numbers_below_one_are_refused(key):
    with pytest.raises(ConfigError, match=f"{key}=0: at least 1"):
        config.build(MlpAdapterConfig, {key: 0})


# Tokens of an image with a grid of 16 × 16, parameters at widths 1024 → 2048: in · out (+ out).
NAMED = {
    "linear": (256, 1024 * 2048 + 2048),
    "mlp_2": (256, 1024 * 2048 + 2048 * 2048 + 2 * 2048),
    "shuffle_4_linear": (16, 16 * 1024 * 2048),
    "shuffle_2_mlp": (64, 2 * 4096 + 4096 * 2048 + 2048 * 2048 + 2 * 2048),
    "mean_2_mlp": (64, 1024 * 2048 + 2048 * 2048 + 2 * 2048),
    "mlp_mean_2": (64, 1024 * 2048 + 2048 * 2048 + 2 * 2048),
}


def test_every_named_setting_is_listed_here():
    assert set(NAMED) == {name for name, row in SIZES.items() if row["kind"] == "mlp"}


@pytest.mark.parametrize("name", NAMED)
def test_a_named_setting_has_these_tokens_and_parameters(name):
    # `grid` in the spec: values that are derived are set by the recipe.
    module = make_module(name, {"size": name, "width": 2048, "grid": (16, 16)})
    image = jax.ShapeDtypeStruct((1, 1, 256, 1024), jnp.float32)
    out, params = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert (out.shape[1], count) == NAMED[name]
