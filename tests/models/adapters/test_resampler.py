"""Resampler, pooler and MLP adapter: the switches of Table 1, and images as clips."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter import config
from vadapter.errors import ConfigError
from vadapter.models.adapters.mlp import MlpAdapter, MlpAdapterConfig
from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.adapters.resampler import Resampler, ResamplerConfig, ResamplerLayer
from vadapter.models.layers import Norm
from vadapter.models.transformer import REMAT
from vadapter.models.vit import ViT

D, BASE = 12, dataclasses.replace(tiny.RESAMPLER, layers=2)


def visual(frames=8, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, frames, tiny.N, D)).astype(np.float32)


def build(**overrides):
    module = Resampler(dataclasses.replace(BASE, **overrides))
    return module, tiny.init(module, visual())


def run(module, params, x):
    return np.asarray(jax.jit(module.apply)({"params": params}, x))


@pytest.fixture(scope="module")
def base():
    """Parameters and output with everything on."""
    module, params = build()
    return params, run(module, params, visual())


# switch: (parameters that go, parameters that come), against two layers with everything on
SWITCHES = {
    "norm=none": (
        {f"layers/{m}/{p}" for m in ("norm_queries", "norm_visual") for p in ("scale", "bias")},
        set()),
    "norm=shared": ({f"layers/norm_visual/{p}" for p in ("scale", "bias")}, set()),
    "final_norm=": ({"norm/scale", "norm/bias"}, set()),
    "ffn=": (
        {f"layers/{p}" for p in (
            "norm_mlp/scale", "norm_mlp/bias", "mlp/up/kernel", "mlp/down/kernel")}, set()),
    "time_embed=": ({"time_embed"}, set()),
    "space_embed=yes": (set(), {"space_embed"}),
    "concat_queries=yes": (set(), set()),
}  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_changes_the_output_and_these_parameters(switch, base):
    gone, come = SWITCHES[switch]
    key, value = switch.split("=")
    module, params = build(**{key: value if key == "norm" else bool(value)})
    base_params, reference = base
    old, new = set(tiny.paths(base_params)), set(tiny.paths(params))
    assert (old - new, new - old) == (gone, come)

    # With the parameters that both have in common, so that only the switch differs.
    merged = tiny.paths(params) | {k: v for k, v in tiny.paths(base_params).items() if k in new}
    params = jax.tree_util.tree_unflatten(jax.tree.structure(params), list(merged.values()))
    out = run(module, params, visual())
    assert out.shape == reference.shape == (2, BASE.queries, BASE.query_dim)
    assert np.isfinite(out).all()
    assert np.abs(out - reference).max() > 1e-3


def test_sizes_set_shapes_and_layers_are_stacked():
    params = build(queries=6, query_dim=8, hidden_dim=20, layers=6)[1]
    assert params["queries"].shape == (1, 6, 8)
    assert params["in_proj"]["kernel"].shape == (D, 8)
    assert params["layers"]["attn"]["q"]["kernel"].shape == (6, 8, 20)
    assert params["layers"]["mlp"]["up"]["kernel"].shape == (6, 8, 80)


def test_layers_start_different_and_run_one_after_the_other():
    module, params = build(layers=3)
    kernels = params["layers"]["attn"]["q"]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-2
    inputs = visual()
    x = inputs @ params["in_proj"]["kernel"] + params["in_proj"]["bias"][None, None, None]
    x = (x + params["time_embed"]).reshape(2, -1, BASE.query_dim)
    queries = np.repeat(params["queries"], 2, axis=0)
    for i in range(3):
        layer = {"params": jax.tree.map(lambda p, i=i: p[i], params["layers"])}
        queries = ResamplerLayer(module.config, jnp.float32).apply(layer, queries, x)[0]
    norm = Norm("layer").apply({"params": params["norm"]}, queries)
    np.testing.assert_allclose(run(module, params, inputs), norm, atol=1e-5)


def test_an_unknown_norm_and_heads_that_do_not_divide_are_errors():
    with pytest.raises(ConfigError, match="norm='both': unknown; known: none, separate, shared"):
        config.build(ResamplerConfig, {"norm": "both"})
    with pytest.raises(ConfigError, match="hidden_dim=16 is not divisible by heads=3"):
        build(heads=3)


def test_queries_see_each_other_only_where_they_are_concatenated_to_the_keys():
    """One layer: without Flamingo's concatenation, a query's output depends on that query alone."""
    alone, params = build(concat_queries=False, layers=1)
    together, _ = build(concat_queries=True, layers=1)
    others = params["queries"].copy()
    others[:, 1:] = others[:, 1:, ::-1]
    changed = params | {"queries": others}
    first = lambda module, params: run(module, params, visual())[:, 0]  # noqa: E731
    np.testing.assert_allclose(first(alone, params), first(alone, changed), atol=1e-6)
    assert np.abs(first(together, params) - first(together, changed)).max() > 1e-3


def test_an_image_given_once_equals_eight_copies_given_as_a_clip():
    module, params = build()
    image = visual(frames=1)
    clip = np.tile(image, (1, 8, 1, 1))
    once = run(module, params, image)
    np.testing.assert_allclose(once, run(module, params, clip), atol=1e-5)
    # and the time embedding is there: frames in another order are another clip
    frames = visual()
    assert np.abs(run(module, params, frames) - run(module, params, frames[:, ::-1])).max() > 1e-3


def test_an_image_costs_an_eighth_of_a_clip_to_encode():
    module = ViT(tiny.VIT)
    frames = lambda F: np.zeros((2, F, tiny.IMAGE, tiny.IMAGE, 3), np.uint8)  # noqa: E731
    params = tiny.init(module, frames(1))

    def flops(F):
        compiled = jax.jit(module.apply).lower({"params": params}, frames(F)).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(1) / flops(8) == pytest.approx(1 / 8, rel=0.05)


def test_fewer_frames_are_held_in_order_and_other_counts_are_an_error():
    module, params = build()
    frames = visual(frames=2)
    held = np.repeat(frames, 4, axis=1)
    np.testing.assert_allclose(run(module, params, frames), run(module, params, held), atol=1e-5)
    with pytest.raises(ValueError, match="3 frames cannot be repeated to the 8"):
        run(module, params, visual(frames=3))


@pytest.mark.parametrize("policy", sorted(set(REMAT) - {"none"}))
def test_rematerialization_keeps_no_attention_weights_and_changes_nothing_else(policy):
    tokens, layers = np.tile(visual(), (1, 1, 8, 1)), 6

    def step(remat):
        module, params = build(layers=layers, remat=remat)
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens)).mean()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return *compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (loss, grads, temp), (plain_loss, plain_grads, plain_temp) = step(policy), step("none")
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, plain_grads)
    B, F, N, _ = tokens.shape
    weights = layers * B * BASE.heads * BASE.queries * F * N * 4
    assert plain_temp > weights
    assert plain_temp - temp > 0.7 * weights


@pytest.mark.parametrize("policy", sorted(set(REMAT) - {"none"}))
def test_a_single_layer_repeats_too(policy):
    """Outside a loop the compiler would find what is computed twice and keep it instead."""

    def flops(remat):
        module, params = build(layers=1, remat=remat)
        loss = lambda p: jnp.square(module.apply({"params": p}, visual())).mean()  # noqa: E731
        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    assert flops(policy) > 1.03 * flops("none")


def test_queries_start_with_the_stated_spread():
    config = ResamplerConfig(
        queries=64, query_dim=16, hidden_dim=16, layers=1, heads=2, query_std=0.3
    )
    params = jax.jit(Resampler(config).init)(tiny.key(0), visual())["params"]
    assert float(params["queries"].value.std()) == pytest.approx(0.3, rel=0.1)


def test_pooler_normalizes_its_output_and_ignores_the_order_of_tokens():
    module = Pooler(PoolerConfig(queries=3, width=16, heads=2))
    x = visual()
    params = tiny.init(module, x)
    out = run(module, params, x)
    assert out.shape == (2, 3, 16)
    shuffled = np.random.default_rng(1).permutation(x.reshape(2, 32, D), axis=1)
    np.testing.assert_allclose(out, run(module, params, shuffled.reshape(x.shape)), atol=1e-5)
    norm = params["norm"]
    unit = (out - norm["bias"][None, None]) / norm["scale"][None, None]
    np.testing.assert_allclose(unit.mean(-1), 0, atol=1e-4)
    np.testing.assert_allclose(unit.std(-1), 1, atol=1e-3)


def test_mlp_adapter_maps_token_by_token_and_averages_clips_over_time():
    module = MlpAdapter(MlpAdapterConfig(hidden_dim=20, width=24))
    x = visual()
    params = tiny.init(module, x)
    out = run(module, params, x)
    assert out.shape == (2, tiny.N, 24)
    np.testing.assert_allclose(out, run(module, params, x.mean(1, keepdims=True)), atol=1e-5)
    other = x.copy()
    other[:, :, 1] += 1
    change = np.abs(run(module, params, other) - out).max(axis=(0, 2))
    assert (change[[0, 2, 3]] == 0).all()
    assert change[1] > 0

    two = MlpAdapter(MlpAdapterConfig(hidden_dim=20, width=24, frames=2))
    halves = run(two, params, x)
    assert halves.shape == (2, 2 * tiny.N, 24)
    np.testing.assert_allclose(halves[:, : tiny.N], run(module, params, x[:, :4]), atol=1e-5)
    assert run(two, params, x[:, :1]).shape == (2, tiny.N, 24), "an image stays one frame"


def test_computation_runs_in_the_modules_dtype(base):
    out = jax.jit(Resampler(BASE, jnp.bfloat16).apply)({"params": base[0]}, visual())
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), base[1], atol=0.1)
