"""Attention weights of every kind of connector, by frame, row and column."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.inspect.attention import arrange, make_attention
from vadapter.inspect.heat import FULL, Backgrounds, heat
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.registry import make_module

F, N, D = 2, 6, 16
VISUAL = np.random.default_rng(0).standard_normal((3, F, N, D)).astype(np.float32)
RESAMPLER = dict(kind="resampler", queries=4, query_dim=16, hidden_dim=16, heads=2)  # noqa: C408
CONNECTORS = {
    "resampler": RESAMPLER | {"layers": 2, "frames": 2},
    "resampler with its queries as keys": RESAMPLER | {"layers": 1, "frames": 4,
                                                       "concat_queries": True},
    "resampler with more queries as keys than a frame has tokens": RESAMPLER | {
        "layers": 1, "frames": 2, "queries": 2 * N, "concat_queries": True},
    "pooler": {"kind": "pooler", "queries": 4, "width": 16, "heads": 2},
    "qformer": {"kind": "qformer", "queries": 4, "width": 16, "depth": 4, "heads": 2,
                "mlp_dim": 32},
}  # fmt: skip


def encoder(grid, tokens=N, leading=0, patch=1):
    """What an encoder says about its tokens."""
    side = round((tokens - leading) ** 0.5)
    config = types.SimpleNamespace(image_size=side * patch, patch=patch)
    return types.SimpleNamespace(tokens_per_frame=lambda: tokens, grid=lambda: grid, config=config)


@pytest.mark.parametrize("name", CONNECTORS)
def test_every_query_distributes_its_attention_over_the_visual_tokens(name):
    module = make_module("connector", CONNECTORS[name])
    model = AdapterModel({"connector": module, "llm": None}, "llm", ("connector",), "encoder")
    params = {"connector": tiny.init(module, VISUAL)}
    found = jax.jit(make_attention(model))(params, {"features": jnp.asarray(VISUAL)})
    assert list(found) == ["connector"]
    maps = arrange("connector", np.asarray(found["connector"][1]), F, encoder((2, 3)))
    assert maps.maps.shape == (CONNECTORS[name]["queries"], F, 2, 3)
    np.testing.assert_allclose(maps.maps.sum((1, 2, 3)).mean() + maps.rest, 1, atol=1e-5)
    assert (maps.rest > 0.01) == ("keys" in name)
    assert 0 < maps.spread <= 1
    other = arrange("connector", np.asarray(found["connector"][2]), F, encoder((2, 3)))
    assert np.abs(other.maps - maps.maps).max() > 1e-3  # of another image


def test_a_connector_without_attention_has_no_maps():
    module = make_module("mlp", {"kind": "mlp", "hidden_dim": 8, "width": 8, "frames": F})
    model = AdapterModel({"mlp": module, "llm": None}, "llm", ("mlp",), "encoder")
    params = {"mlp": tiny.init(module, VISUAL)}
    assert make_attention(model)(params, {"features": jnp.asarray(VISUAL)}) == {}


def weights(frames, tokens, extra=0):
    """Weights of two queries that all differ, and add up to 1."""
    w = np.arange(1, 2 * (frames * tokens + extra) + 1, dtype=np.float32).reshape(2, -1)
    return w / w.sum(1, keepdims=True)


def test_the_tokens_of_a_grid_that_is_not_square_are_row_by_row():
    w = weights(2, 6)
    maps = arrange("c", w, 2, encoder((2, 3))).maps
    np.testing.assert_array_equal(maps[1, 1, 0], w[1, 6:9])
    np.testing.assert_array_equal(maps[1, 1, 1], w[1, 9:12])


def test_the_repetitions_of_an_image_are_added_up():
    w = weights(8, 6)
    maps = arrange("c", w, 1, encoder((2, 3))).maps
    np.testing.assert_allclose(maps[0, 0].ravel(), w[0].reshape(8, 6).sum(0), atol=1e-6)
    assert arrange("c", w, 4, encoder((2, 3))).maps.shape == (2, 4, 2, 3)


def test_class_token_and_registers_are_not_in_the_map_but_counted():
    w = weights(1, 11)
    found = arrange("c", w, 1, encoder((), 11, leading=2))
    assert found.is_grid
    np.testing.assert_array_equal(found.maps[0, 0].ravel(), w[0, 2:])
    assert found.rest == pytest.approx(float(w[:, :2].sum(1).mean()), abs=1e-6)


def test_tokens_without_a_grid_are_a_row():
    pooled = types.SimpleNamespace(
        tokens_per_frame=lambda: 5, grid=tuple, config=types.SimpleNamespace(pooled=True)
    )
    found = arrange("c", weights(2, 5), 2, pooled)
    assert not found.is_grid
    assert found.maps.shape == (2, 2, 1, 5)


def test_attention_to_all_tokens_alike_has_the_full_spread_and_to_one_the_least():
    alike = np.full((1, 6), 1 / 6, np.float32)
    assert arrange("c", alike, 1, encoder((2, 3))).spread == pytest.approx(1)
    one = np.eye(6, dtype=np.float32)[:1]
    assert arrange("c", one, 1, encoder((2, 3))).spread == pytest.approx(1 / 6)


def test_heat_is_transparent_up_to_uniform_attention_and_full_from_its_multiple():
    import base64
    import io

    from PIL import Image

    uri = heat(np.array([[0.1, 0.2, 0.2 * FULL], [0.0, 0.4, 9.0]]), 0.2)
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    alpha = np.asarray(image)[..., 3]
    assert image.size == (3, 2)
    assert (alpha[:, 0] == 0).all()
    assert alpha[0, 1] == 0
    assert 0 < alpha[1, 1] < alpha[0, 2] == alpha[1, 2]


def test_an_image_is_in_the_page_once():
    rng, backgrounds = np.random.default_rng(0), Backgrounds()
    frames = rng.integers(0, 255, (3, 32, 32, 3), np.uint8)
    names = [backgrounds.add(frames[i]) for i in (0, 1, 0, 2, 1)]
    assert names == ["i0", "i1", "i0", "i2", "i1"]
    assert backgrounds.style().count("data:image/png") == 3
