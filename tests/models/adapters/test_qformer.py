"""The Q-Former: its published sizes, where it attends to the visual tokens, and its start."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.cases import some_slow

from vadapter.errors import ConfigError
from vadapter.models.adapters.qformer import QFormer, QFormerConfig, QFormerLayer
from vadapter.models.layers import Norm
from vadapter.models.registry import make_module
from vadapter.models.transformer import REMAT

D = 12
BASE = QFormerConfig(queries=3, width=16, depth=4, heads=2, mlp_dim=24, cross_every=2)


def visual(frames=1, tokens=tiny.N, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, frames, tokens, D)).astype(np.float32)


def build(**overrides):
    module = QFormer(dataclasses.replace(BASE, **overrides))
    return module, tiny.init(module, visual())


def run(module, params, x, **rngs):
    return np.asarray(jax.jit(module.apply)({"params": params}, x, rngs=rngs))


def shapes(module, x=None):
    x = visual() if x is None else x
    return nn.unbox(jax.eval_shape(module.init, jax.random.key(0), x))["params"]


# Layers, queries, their norm and the norm of the visual tokens; without the text branch and without
# the linear layer to the LLM's width, which is a component of its own.
@pytest.mark.parametrize(
    ("width", "count"), [(768, 99_265_536), (1024, 101_625_344), (1408, 105_165_056)]
)
def test_blip2s_has_its_number_of_parameters_at_every_width_of_the_encoder(width, count):
    module = make_module("qformer", {"size": "qformer_blip2"})
    tree = shapes(module, jax.ShapeDtypeStruct((1, 1, 257, width), jnp.float32))
    assert sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) == count


@pytest.mark.parametrize("every", [1, 2, 4])
def test_layers_run_one_after_the_other_and_every_nth_attends_to_the_visual_tokens(every):
    module, params = build(cross_every=every)
    inputs = visual(frames=2, tokens=5)
    norm = lambda name, eps, x: Norm("layer", eps).apply({"params": params[name]}, x)  # noqa: E731
    tokens = norm("norm_visual", BASE.visual_eps, inputs.reshape(2, 10, D))
    x = norm("norm", BASE.norm_eps, np.repeat(params["queries"], 2, axis=0))
    for i in range(BASE.depth):
        layer = params["groups"][f"layer_{i % every}"]
        assert ("cross" in layer) == (i % every == 0)
        layer = jax.tree.map(lambda p, i=i: p[i // every], layer)
        one = QFormerLayer(module.config, i % every == 0, jnp.float32)
        x = one.apply({"params": layer}, x, tokens)
    assert np.abs(x).max() > 1
    np.testing.assert_allclose(run(module, params, inputs), x, atol=1e-5)


def test_a_layer_adds_and_then_normalizes_each_of_its_three_branches():
    """Post-norm: what leaves a layer is normalized, whatever entered it."""
    layer = QFormerLayer(BASE, True, jnp.float32)
    x, tokens = np.float32(50) * visual()[:, 0, :3], visual()[:, 0]
    x = np.concatenate([x, x[..., :4]], -1)
    params = tiny.init(layer, x, tokens)
    out = np.asarray(layer.apply({"params": params}, x, tokens))
    unit = (out - params["norm_mlp"]["bias"]) / params["norm_mlp"]["scale"]
    np.testing.assert_allclose(np.mean(unit, -1), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(unit, -1), 1, atol=1e-4)
    for branch, last in (("attn", "o"), ("cross", "o"), ("mlp", "down")):
        off = jax.tree.map(np.zeros_like, params[branch][last])
        changed = params | {branch: params[branch] | {last: off}}
        assert np.abs(layer.apply({"params": changed}, x, tokens) - out).max() > 1e-3, branch


def test_a_depth_that_the_groups_do_not_divide_is_refused():
    with pytest.raises(ConfigError, match="depth=4 is not divisible by cross_every=3"):
        dataclasses.replace(BASE, cross_every=3)
    with pytest.raises(ConfigError, match="width=16 is not divisible by heads=3"):
        dataclasses.replace(BASE, heads=3)


def test_a_program_does_not_grow_with_depth():
    sizes = set()
    for depth in (4, 16):
        module = QFormer(dataclasses.replace(BASE, depth=depth))
        step = jax.grad(lambda p, m=module: m.apply({"params": p}, visual()).sum())
        sizes.add(len(jax.jit(step).lower(shapes(module)).as_text().splitlines()))
    assert len(sizes) == 1


def test_queries_and_kernels_start_at_a_spread_of_a_fiftieth_biases_at_zero():
    module = QFormer(dataclasses.replace(BASE, queries=64, width=64))
    params = nn.unbox(jax.jit(module.init)(tiny.key(0), visual())["params"])
    for path, leaf in tiny.paths(params).items():
        if path.endswith("bias"):
            assert not leaf.any(), path
        elif path.endswith("scale"):
            assert (leaf == 1).all(), path
        else:
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.1), path
    first, second = params["groups"]["layer_0"]["attn"]["q"]["kernel"]
    assert np.abs(first - second).max() > 1e-2


def test_dropout_draws_masks_where_a_key_is_given_and_each_layer_its_own():
    module, params = build(dropout=0.5)
    still = run(module, params, visual())
    draws = [run(module, params, visual(), dropout=tiny.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-2
    assert np.abs(draws[0] - still).max() > 1e-2
    off, _ = build(dropout=0.0)
    np.testing.assert_array_equal(run(off, params, visual(), dropout=tiny.key(0)), still)


def test_visual_tokens_are_normalized_unless_their_norm_is_off():
    module, params = build()
    x = visual()
    np.testing.assert_allclose(run(module, params, x), run(module, params, 3 * x + 1), atol=1e-4)
    off, rest = build(norm_visual=False)
    assert tiny.paths(params).keys() - tiny.paths(rest).keys() == {
        "norm_visual/scale", "norm_visual/bias",
    }  # fmt: skip
    assert np.abs(run(off, rest, x) - run(off, rest, 3 * x + 1)).max() > 1e-2


def test_frames_are_one_sequence_whose_order_only_a_time_embedding_shows():
    clip = visual(frames=4)
    module, params = build()
    merged = clip.reshape(2, 1, 4 * tiny.N, D)
    np.testing.assert_allclose(run(module, params, clip), run(module, params, merged), atol=1e-5)
    turned = run(module, params, clip[:, ::-1])
    np.testing.assert_allclose(run(module, params, clip), turned, atol=1e-5)

    timed, params = build(time_embed=True, frames=4)
    assert params["time_embed"].shape == (1, 4, 1, D)
    assert np.abs(run(timed, params, clip) - run(timed, params, clip[:, ::-1])).max() > 1e-3
    image = visual()
    copies = run(timed, params, np.tile(image, (1, 4, 1, 1)))
    np.testing.assert_allclose(run(timed, params, image), copies, atol=1e-5)
    with pytest.raises(ValueError, match="3 frames cannot be repeated to the 4"):
        run(timed, params, visual(frames=3))


@pytest.mark.parametrize("policy", some_slow(sorted(set(REMAT) - {"none"}), fast=("names",)))
def test_rematerialization_keeps_less_and_changes_nothing_else(policy):
    tokens = visual(tokens=512)

    def step(remat):
        module, params = build(depth=8, remat=remat)
        loss = lambda p: jnp.square(module.apply({"params": p}, tokens)[..., :8]).mean()  # noqa: E731
        compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
        return *compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (loss, grads, temp), (plain_loss, plain_grads, plain_temp) = step(policy), step("none")
    np.testing.assert_allclose(loss, plain_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), grads, plain_grads)
    B, _, S, _ = tokens.shape
    assert plain_temp - temp > 4 * B * BASE.heads * BASE.queries * S * 4  # weights of each group


def test_computation_runs_in_the_modules_dtype():
    module, params = build()
    out = jax.jit(QFormer(BASE, jnp.bfloat16).apply)({"params": params}, visual())
    assert out.dtype == jnp.bfloat16
    expected = run(module, params, visual())
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.15)
