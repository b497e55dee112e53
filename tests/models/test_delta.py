"""Gated delta networks: the recurrence, paths of texts that share a prefix, gradients, meshes."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from benches.fake_batch import fake_batch
from vadapter.distributed.mesh import MeshConfig, make_mesh, with_mesh
from vadapter.errors import ConfigError
from vadapter.models.delta import DeltaConfig, Paths, delta_rule
from vadapter.models.lm import LM, empty_cache
from vadapter.models.losses import token_xent
from vadapter.models.transformer import text_mask

B, H, K, W = 2, 3, 5, 4
HYBRID = {"delta": tiny.DELTA, "recurrent": (1, 0), "depth": 4}


def rows(length, rng):
    """Segments of rows: padding here and there, a prefix of some length, several texts or none."""
    out = np.zeros((B, length), np.int32)
    for row, prefix in zip(out, (length // 3, 0), strict=True):
        row[:prefix] = -1
        at, text = prefix, 0
        while at < length:
            text += 1
            step = int(rng.integers(1, max(2, length // 3)))
            row[at : at + step] = text
            at += step
        row[rng.random(length) < 0.2] = 0
    return out


def recurrence(q, k, v, decay, beta, start, segments):
    """Token after token, as written down in the module, with a state for every text."""
    y, last = np.zeros(v.shape), np.array(start, np.float64)
    for b in range(B):
        prefix, states = start[b].astype(np.float64), {}
        for t, segment in enumerate(segments[b]):
            if segment == 0:
                continue
            for h in range(H):
                state = states.get((segment, h), prefix[h])
                state = np.exp(decay[b, h, t]) * state
                error = v[b, h, t] - state.T @ k[b, h, t]
                state = state + beta[b, h, t] * np.outer(k[b, h, t], error)
                states[segment, h], y[b, h, t] = state, state.T @ q[b, h, t]
                last[b, h] = state
            if segment == -1:
                prefix = np.stack([states[-1, h] for h in range(H)])
    return y, last


@pytest.mark.parametrize("length", [1, 7, 64, 65, 150])
def test_chunks_of_tokens_equal_the_recurrence_where_texts_share_a_prefix(length):
    rng = np.random.default_rng(length)
    segments = rows(length, rng)
    q, k, v = rng.standard_normal((3, B, H, length, K)).astype(np.float32)
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    real = (segments != 0)[:, None]
    decay = -rng.exponential(0.3, (B, H, length)).astype(np.float32) * real
    beta = rng.random((B, H, length)).astype(np.float32) * real
    start = rng.standard_normal((B, H, K, K)).astype(np.float32)

    @jax.jit
    def ours(*x: Any):
        return delta_rule(*x, Paths.of(text_mask(jnp.asarray(segments)), W))  # type: ignore[call-arg]

    y, last = ours(q, k, v, decay, beta, start)
    theirs, after = recurrence(q, k, v, decay, beta, start, segments)
    np.testing.assert_allclose(np.where(real[..., None], y, 0), theirs, atol=2e-5)
    np.testing.assert_allclose(last, after, atol=2e-5)


@pytest.mark.parametrize("conv", [1, 2, 4])
def test_paths_skip_padding_and_go_from_each_text_to_the_prefix(conv):
    segments = jnp.array([[0, -1, 0, -1, 1, 0, 1, 2, 2, 0]])
    paths = Paths.of(text_mask(segments), conv)
    old = conv - 1  # tokens of before are 0 … old - 1
    steps = {1: -1, 3: 1, 4: 3, 6: 4, 7: 3, 8: 7}
    for token, parent in steps.items():
        path, at = [], parent
        while len(path) < conv - 1:
            path.append(at + old)
            at = steps.get(at, at - 1)  # in front of the row, from neighbor to neighbor
        assert paths.before[0, token].tolist() == path
    assert paths.last[0].tolist() == [8 + old, 7 + old, 3 + old][: conv - 1][::-1]


@functools.partial(jax.jit, static_argnums=0)
def hidden(module, params, tokens, segments, positions):
    apply = lambda *a, **kw: module.apply({"params": params}, *a, **kw)  # noqa: E731
    return apply(
        apply(tokens, method="embed"), positions=positions, mask=text_mask(segments),
        method="hidden",
    )[0]  # fmt: skip


def test_texts_of_a_row_read_as_each_alone_behind_the_prefix_without_padding():
    module, params = tiny.lm(tiny.LLM, **HYBRID)
    segments = np.array([[-1, 0, -1, -1, 1, 1, 0, 2, 2, 2, 3]])
    positions = np.array([[0, 0, 1, 2, 3, 4, 0, 3, 4, 5, 3]])
    tokens = np.random.default_rng(0).integers(3, tiny.V, segments.shape)
    together = hidden(module, params, tokens, segments, positions)[0]
    for text in (1, 2, 3):
        at = np.flatnonzero((segments[0] == -1) | (segments[0] == text))
        plain = np.arange(len(at))[None]
        alone = hidden(module, params, tokens[:, at], np.ones_like(plain), plain)[0]
        np.testing.assert_allclose(together[at], alone, atol=1e-5)


def test_the_cache_hands_on_what_a_whole_pass_computes():
    module, params = tiny.lm(tiny.LLM, **HYBRID)
    T = 9
    tokens = np.random.default_rng(0).integers(3, tiny.V, (2, T))
    whole = jax.jit(module.apply)({"params": params}, tokens)
    cache = empty_cache(module.config, 2, T)

    @jax.jit
    def read(tokens, cache, start):
        positions = start + jnp.tile(jnp.arange(tokens.shape[1]), (2, 1))
        states, cache = module.apply(
            {"params": params}, module.apply({"params": params}, tokens, method="embed"),
            positions=positions, mask=jnp.arange(T)[None, None] <= positions[:, :, None],
            key_positions=jnp.tile(jnp.arange(T), (2, 1)), cache=cache, index=start,
            method="hidden",
        )  # fmt: skip
        return module.apply({"params": params}, states, method="logits"), cache

    for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7), (7, T)):
        logits, cache = read(tokens[:, start:stop], cache, start)
        np.testing.assert_allclose(logits, whole[:, start:stop], atol=1e-5)


# -- behind an adapter ---------------------------------------------------------------------------


def frozen(**changes):
    """(model, parameters, batch) of stage 2 in front of a frozen language model."""
    model = tiny.stage2(frozen_lm=True)
    config = dataclasses.replace(tiny.LLM, **HYBRID, **changes)
    model = dataclasses.replace(model, modules={**model.modules, "llm": LM(config)})
    batch = fake_batch(4, frames=1, size=tiny.IMAGE, text_len=8, vocab_size=tiny.V)
    return model, tiny.filled(tiny.boxed(model)), batch


def trained(model, params):
    return {name: params[name] for name in model.chain}


def loss_and_gradients(model, params, batch):
    def loss(part, params):
        params = params | part
        logits = model.logits(params, model.hidden(params, model.encode(params, batch), batch))
        return token_xent(logits, batch["targets"], batch["weights"])[0]

    return jax.jit(jax.value_and_grad(loss))(trained(model, params), params)


def test_gradients_reach_the_adapter_through_the_frozen_language_model_and_are_its_slopes():
    model, params, batch = frozen()
    loss, gradients = loss_and_gradients(model, params, batch)
    for path, gradient in tiny.paths(gradients).items():
        assert np.abs(gradient).max() > 0, path
    squares = sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(gradients))
    gain = 0.02  # of the loss, by a step along the gradient
    moved = jax.tree.map(lambda x, g: x - gain / squares * g, trained(model, params), gradients)
    after, _ = loss_and_gradients(model, params | moved, batch)
    np.testing.assert_allclose(loss - after, gain, rtol=0.1)
    # What the backward pass recomputes changes nothing.
    again, recomputed = loss_and_gradients(frozen(remat="names")[0], params, batch)
    np.testing.assert_allclose(again, loss, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), recomputed, gradients
    )


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_loss_of_one():
    model, params, batch = frozen()
    loss = lambda p, b: model.hidden(p, model.encode(p, b), b)  # noqa: E731
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(
        jax.jit(with_mesh(mesh, loss))(params, batch), jax.jit(loss)(params, batch), atol=1e-5
    )


# -- what is not possible ------------------------------------------------------------------------


def test_what_reads_both_ways_is_refused():
    model, params, batch = frozen()
    both = dataclasses.replace(model, bidirectional=True, frozen_lm=False)
    with pytest.raises(ConfigError, match="bidirectional=True is not possible"):
        jax.eval_shape(lambda p: both.hidden(p, both.encode(p, batch), batch), params)
    tlm = LM(dataclasses.replace(tiny.TLM, **HYBRID))
    chain = dataclasses.replace(both, modules={**model.modules, "tlm": tlm})
    params = nn.unbox(tiny.boxed(chain))
    with pytest.raises(ConfigError, match="bidirectional=True is not possible"):
        jax.eval_shape(lambda p: chain.prefix(p, jnp.zeros((1, 1, 4, 16))), params)


def test_a_depth_that_is_no_multiple_of_the_pattern_is_refused():
    with pytest.raises(ConfigError, match="depth=5: kinds of layers repeat every 2 layers"):
        tiny.lm(tiny.LLM, **{**HYBRID, "depth": 5})


def test_value_heads_that_key_heads_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"value_heads=3 must be a multiple of"):
        DeltaConfig(key_heads=2, value_heads=3, key_dim=4, value_dim=4)
