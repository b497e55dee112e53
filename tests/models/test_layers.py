"""Layers against plain numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.errors import ConfigError
from vadapter.models.layers import GATED, Attention, Mlp, Norm, attend, product
from vadapter.models.rope import RopeConfig, frequencies, rotate


@pytest.fixture
def normal():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def naive_attention(q, k, v, mask, scale=None, cap=None):
    """One row, head and query at a time; key head j serves the query heads jG .. jG+G-1."""
    B, T, H, K = q.shape
    G = H // k.shape[2]
    out = np.zeros((B, T, H, K), np.float32)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = np.flatnonzero(mask[b, t])
                scores = k[b, seen, h // G] @ q[b, t, h] * (scale or 1 / np.sqrt(K))
                weights = softmax(cap * np.tanh(scores / cap) if cap else scores)
                out[b, t, h] = weights @ v[b, seen, h // G]
    return out


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_equals_its_formula(kind, normal):
    x = 3 * normal(2, 5, 8) + 1
    module = Norm(kind, eps=1e-3)
    params = tiny.init(module, x)
    centered = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    expected = centered / np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-3) * params["scale"]
    expected = expected + (params["bias"] if kind == "layer" else 0)
    assert ("bias" in params) == (kind == "layer")
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, atol=1e-5)


def test_norm_statistics_are_float32_in_a_bfloat16_model(normal):
    x = 100 + normal(2, 64)  # in bfloat16 sums, the differences from 100 would be lost
    module = Norm("layer", dtype=jnp.bfloat16)
    params = tiny.init(module, x)
    half = module.apply({"params": params}, x)
    full = Norm("layer").apply({"params": params}, x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), full, atol=0.02)


@pytest.mark.parametrize("kind", ["swiglu", "geglu", "gelu", "gelu_erf", "quick_gelu", "relu"])
def test_feed_forward_equals_its_formula(kind, normal):
    x = normal(3, 8)
    module = Mlp(16, kind, bias=True)
    params = tiny.init(module, x)
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    tanh_gelu = lambda u: (  # noqa: E731
        0.5 * u * (1 + np.tanh(np.sqrt(2 / np.pi) * (u + 0.044715 * u**3)))
    )
    act = {
        "swiglu": lambda u: u / (1 + np.exp(-u)),
        "geglu": tanh_gelu,
        "gelu": tanh_gelu,
        "gelu_erf": lambda u: u / 2 * (1 + np.vectorize(math.erf)(u / math.sqrt(2))),
        "quick_gelu": lambda u: u / (1 + np.exp(-1.702 * u)),
        "relu": lambda u: np.maximum(u, 0),
    }[kind]
    assert ("gate" in params) == (kind in GATED)
    hidden = act(dense("gate", x)) * dense("up", x) if kind in GATED else act(dense("up", x))
    out = module.apply({"params": params}, x)
    np.testing.assert_allclose(out, dense("down", hidden), atol=1e-5)


def test_rotary_is_a_complex_rotation_with_geometric_wavelengths(normal):
    x, positions = normal(2, 3, 2, 8), np.array([[0, 1, 5], [7, 2, 2]])
    z = x[..., :4] + 1j * x[..., 4:]
    freq = 100.0 ** (-np.arange(4) / 4)
    z = z * np.exp(1j * positions[:, :, None, None] * freq)
    expected = np.concatenate([z.real, z.imag], -1)
    ours = rotate(jnp.asarray(x), positions, frequencies(RopeConfig(100.0), 8))
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_the_part_of_a_head_that_is_not_rotated_passes_and_the_scale_is_of_the_other(normal):
    x, positions = normal(1, 3, 2, 8), np.array([[0, 1, 5]])
    freq = frequencies(RopeConfig(part=0.5), 8)
    assert freq.shape == (2,)
    ours = rotate(jnp.asarray(x), positions, freq, 1.5)
    np.testing.assert_array_equal(ours[..., 4:], x[..., 4:])
    alone = rotate(jnp.asarray(x[..., :4]), positions, freq)
    np.testing.assert_allclose(ours[..., :4], 1.5 * alone, rtol=1e-6)


def test_a_stretch_that_is_unknown_or_lacks_its_length_is_an_error():
    with pytest.raises(ConfigError, match=r"rope\.scaling='ntk': must be none, linear"):
        frequencies(RopeConfig(scaling="ntk"), 8)
    with pytest.raises(ConfigError, match="'yarn' needs original_len"):
        frequencies(RopeConfig(scaling="yarn"), 8)


def test_rotary_scores_depend_on_the_distance_alone(normal):
    q, k, freq = normal(1, 1, 1, 16), normal(1, 1, 1, 16), frequencies(RopeConfig(), 16)

    def score(i, j):
        a = rotate(jnp.asarray(q), np.array([[i]]), freq)
        return float((a * rotate(jnp.asarray(k), np.array([[j]]), freq)).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-2)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_equals_a_naive_reference(kv_heads, normal):
    q, k, v = normal(2, 5, 4, 8), normal(2, 7, kv_heads, 8), normal(2, 7, kv_heads, 8)
    mask = np.random.default_rng(1).random((2, 5, 7)) < 0.5
    mask[..., 0] = True
    np.testing.assert_allclose(attend(q, k, v, mask), naive_attention(q, k, v, mask), atol=1e-5)
    everything = np.ones_like(mask)
    out = attend(q, k, v, None)
    np.testing.assert_allclose(out, naive_attention(q, k, v, everything), atol=1e-5)
    capped = attend(q, k, v, mask, 0.5, 2.0)
    np.testing.assert_allclose(capped, naive_attention(q, k, v, mask, 0.5, 2.0), atol=1e-5)
    assert np.abs(capped - attend(q, k, v, mask, 0.5)).max() > 1e-2


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_shared_key_heads_equal_repeated_ones(kv_heads, normal):
    x = normal(2, 6, 16)
    shared = Attention(heads=4, kv_heads=kv_heads, head_dim=4)
    positions, freq = np.tile(np.arange(6), (2, 1)), frequencies(RopeConfig(100.0), 4)
    params = tiny.init(shared, x, positions=positions, freq=freq)
    wide = jax.tree.map(lambda w: w, params)
    for name in ("k", "v"):
        kernel = params[name]["kernel"].reshape(16, kv_heads, 4)
        wide[name] = {"kernel": np.repeat(kernel, 4 // kv_heads, axis=1).reshape(16, 16)}
    full = Attention(heads=4, kv_heads=4, head_dim=4)
    a, _ = shared.apply({"params": params}, x, positions=positions, freq=freq)
    b, _ = full.apply({"params": wide}, x, positions=positions, freq=freq)
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_cross_attention_reads_inputs_of_another_width(normal):
    x, kv = normal(2, 3, 16), normal(2, 5, 24)
    module = Attention(heads=2, kv_heads=2, head_dim=8, bias=True)
    params = tiny.init(module, x, kv)
    dense = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"]  # noqa: E731
    heads = lambda y: y.reshape(*y.shape[:2], 2, 8)  # noqa: E731
    y = naive_attention(
        heads(dense("q", x)), heads(dense("k", kv)), heads(dense("v", kv)), np.ones((2, 3, 5))
    )
    out, cache = module.apply({"params": params}, x, kv)
    assert cache is None
    np.testing.assert_allclose(out, dense("o", y.reshape(2, 3, 16)), atol=1e-5)


def test_masked_keys_have_no_influence_at_all(normal):
    q, k, v = normal(1, 3, 2, 4), normal(1, 5, 2, 4), normal(1, 5, 2, 4)
    mask = np.ones((1, 3, 5), bool)
    mask[..., 3:] = False
    other_k, other_v = k.copy(), v.copy()
    other_k[:, 3:], other_v[:, 3:] = 1e4, -1e4
    np.testing.assert_array_equal(attend(q, k, v, mask), attend(q, other_k, other_v, mask))


def test_a_fully_masked_row_stays_finite_in_value_and_gradient(normal):
    q, k, v = normal(1, 2, 2, 4), normal(1, 3, 2, 4), normal(1, 3, 2, 4)
    mask = np.array([[[True, False, True], [False, False, False]]])
    out, grads = jax.value_and_grad(lambda *a: attend(*a, mask).sum(), argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(out)
    assert all(np.isfinite(g).all() for g in grads)


def test_softmax_is_float32_in_a_bfloat16_model(normal):
    q, k, v = (jnp.asarray(normal(1, 4, 1, 8), jnp.bfloat16) for _ in range(3))
    jaxpr = jax.make_jaxpr(lambda *a: attend(*a, None))(q, k, v)
    exps = [e for e in jaxpr.eqns if e.primitive.name == "exp"]
    assert exps, "no exponential found: look inside nested calls"
    assert all(e.invars[0].aval.dtype == jnp.float32 for e in exps)


def test_heads_that_do_not_divide_are_an_error(normal):
    module = Attention(heads=3, kv_heads=2, head_dim=4)
    with pytest.raises(ValueError, match="heads=3 is not divisible by kv_heads=2"):
        tiny.init(module, normal(1, 2, 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_gradients_of_a_product_are_those_of_the_plain_formula(normal, rank, dtype):
    x, kernel = normal(*(2, 3, 4)[: rank - 1], 8), normal(8, 6)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    loss = lambda fn: lambda x, kernel: jnp.sin(fn(x, kernel).astype(jnp.float32)).sum()  # noqa: E731
    ours = jax.value_and_grad(loss(product), argnums=(0, 1))(x, kernel)
    plain = jax.value_and_grad(loss(jnp.matmul), argnums=(0, 1))(x, kernel)
    atol = 1e-5 if dtype == jnp.float32 else 0.1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, plain)
    assert ours[1][1].dtype == dtype


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1)])
def test_a_product_computes_and_keeps_only_what_gradients_need(normal, trained):
    def residuals(x, kernel):
        sides = [x, kernel]
        free = [sides[i] for i in trained]

        def fn(*free):
            for i, value in zip(trained, free, strict=True):
                sides[i] = value
            return product(*sides)

        return jax.vjp(fn, *free)[1]

    x, kernel = normal(3, 8), normal(8, 6)
    kept = {leaf.shape for leaf in jax.tree.leaves(residuals(x, kernel)) if leaf.ndim}
    assert kept == {[kernel.shape, x.shape][i] for i in trained}
