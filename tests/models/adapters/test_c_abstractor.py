"""Honeybee's C-Abstractor: size, arithmetic, frames, grids that are not square."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.cases import some_slow
from support.windows import resized

from vadapter import config
from vadapter.errors import ConfigError
from vadapter.models.adapters.c_abstractor import Block, CAbstractor, CAbstractorConfig
from vadapter.models.convolution import depthwise
from vadapter.models.transformer import REMAT

D, E = 6, 10
GRID = (3, 5)
BASE = CAbstractorConfig(queries=4, width=E, hidden_dim=8, blocks=1, grid=GRID)


def visual(frames=1, grid=GRID, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, frames, math.prod(grid), D)).astype(np.float32)


def build(x=None, **overrides):
    module = CAbstractor(dataclasses.replace(BASE, **overrides))
    return module, tiny.init(module, visual() if x is None else x)


def run(module, params, x):
    return np.asarray(jax.jit(module.apply)({"params": params}, x))


def test_it_has_honeybees_number_of_parameters():
    """22.4M at 1024 → 1024 → 2048, 144 queries, on a grid of 16 × 16."""
    module = CAbstractor(CAbstractorConfig(width=2048, grid=(16, 16)))
    image = jax.ShapeDtypeStruct((1, 1, 256, 1024), jnp.float32)
    out, params = jax.eval_shape(module.init_with_output, jax.random.key(0), image)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert count == pytest.approx(22.4e6, rel=0.01)
    assert out.shape == (1, 144, 2048)


def norm(params, x):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def silu(x):
    return x / (1 + np.exp(-x))


def filtered(x, kernel):
    """The depthwise filter of one image [h, w, C], token by token; outside the image are zeros."""
    out = np.zeros_like(x)
    h, w, _ = x.shape
    for i, j in np.ndindex(h, w):
        for a, b in np.ndindex(3, 3):
            if 0 <= i + a - 1 < h and 0 <= j + b - 1 < w:
                out[i, j] += x[i + a - 1, j + b - 1] * kernel[a, b, 0]
    return out


def block(params, x):
    """A block on one image [h, w, C]."""
    y = silu(norm(params["norm_expand"], x @ params["expand"]["kernel"]))
    y = silu(norm(params["norm_depthwise"], filtered(y, params["depthwise"]["kernel"])))
    inner = silu(y.mean((0, 1)) @ params["squeeze"]["kernel"] + params["squeeze"]["bias"])
    gate = inner @ params["excite"]["kernel"] + params["excite"]["bias"]
    y = norm(params["norm_project"], y / (1 + np.exp(-gate)) @ params["project"]["kernel"])
    if "shortcut" in params:
        x = norm(params["norm_shortcut"], x @ params["shortcut"]["kernel"])
    return silu(x + y)


@pytest.mark.parametrize("width", [D, 8])
def test_a_block_equals_its_definition_and_projects_an_input_of_another_width(width):
    x = np.random.default_rng(0).standard_normal((2, *GRID, D)).astype(np.float32)
    module = Block(width, jnp.float32)
    params = tiny.init(module, x)
    assert ("shortcut" in params) == (width != D)
    with jax.numpy_rank_promotion("allow"):
        expected = np.stack([block(params, image) for image in x])
    np.testing.assert_allclose(run(module, params, x), expected, atol=2e-4)


def test_the_whole_equals_positions_blocks_pool_blocks_and_two_layers():
    module, params = build()
    x = visual()[:, 0] + params["positions"][0]
    x = np.stack([block(params["block_0"], image.reshape(*GRID, D)) for image in x])
    x = resized(x.reshape(2, -1, 8), GRID, 2).reshape(2, 2, 2, 8)
    x = np.stack([block(params["block_1"], image) for image in x]).reshape(2, 4, 8)
    x = silu(x @ params["up"]["kernel"] + params["up"]["bias"])
    x = x @ params["down"]["kernel"] + params["down"]["bias"]
    np.testing.assert_allclose(run(module, params, visual()), x, atol=5e-4)


def test_rows_are_not_columns():
    module, params = build()
    other, _ = build(grid=GRID[::-1])
    assert np.abs(run(module, params, visual()) - run(other, params, visual())).max() > 1e-2


def test_frames_are_seen_one_by_one_and_merged_by_mean_or_concatenation():
    x = visual(frames=3)
    module, params = build(x)
    each = [run(module, params, x[:, i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(run(module, params, x), np.mean(each, axis=0), atol=1e-5)
    joined, _ = build(x, merge="concat")
    np.testing.assert_allclose(run(joined, params, x), np.concatenate(each, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "near"), [(150, "144 and 169"), (2, "1 and 4"), (0, "1"), (-4, "1"), (143, "121")]
)
def test_queries_that_are_no_square_are_refused_with_the_nearest_squares(queries, near):
    with pytest.raises(ConfigError, match=f"queries={queries} is not a square.*{near}") as error:
        config.build(CAbstractorConfig, {"queries": queries})
    assert error.value.exit_code == 78


def test_no_blocks_are_refused():
    with pytest.raises(ConfigError, match="blocks=0: at least 1"):
        config.build(CAbstractorConfig, {"blocks": 0})


def losses(remat):
    module, params = build(visual(frames=16), remat=remat)
    return params, lambda p: jnp.square(module.apply({"params": p}, visual(frames=16))).mean()


def kept(remat):
    """Numbers that the forward pass keeps for the backward pass."""
    params, loss = losses(remat)
    residuals = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
    return sum(leaf.size for leaf in jax.tree.leaves(residuals))


@pytest.mark.parametrize(
    ("policy", "share"),
    some_slow([("full", 0.3), ("names", 0.5), ("dots", 0.5)], fast=[("names", 0.5)]),
)
def test_rematerialization_keeps_less_and_changes_nothing(policy, share):
    assert kept(policy) < share * kept("none")
    outcomes = []
    for remat in ("none", policy):
        params, loss = losses(remat)
        outcomes.append(jax.jit(jax.value_and_grad(loss))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *outcomes)


def test_every_policy_is_tested():
    assert set(REMAT) == {"none", "full", "names", "dots"}


@pytest.mark.parametrize("stride", [1, 2])
def test_the_depthwise_filter_is_the_backends_grouped_convolution(stride):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 10, 4)).astype(np.float32)
    kernel = rng.standard_normal((3, 3, 1, 4)).astype(np.float32)
    expected = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )  # fmt: skip
    np.testing.assert_allclose(depthwise(x, kernel, stride), expected, atol=1e-5)
