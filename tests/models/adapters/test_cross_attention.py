"""Gated cross-attention: the LLM unchanged at the start, a slow reference, cached decoding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from benches.fake_batch import fake_batch
from vadapter.data.batch import EOS
from vadapter.errors import ConfigError
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters import cross_attention
from vadapter.models.adapters.cross_attention import (
    CrossAttention,
    CrossAttentionConfig,
    GatedLayer,
)
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.generate import Decode, decode
from vadapter.models.lm import LM
from vadapter.models.losses import token_xent
from vadapter.models.transformer import Block, text_mask
from vadapter.models.vit import ViT

LLM = dataclasses.replace(tiny.LLM, depth=5, windows=(3, 0))
OPEN = 0.7  # a gate that lets the image through


def slow(every):
    return pytest.param(every, marks=pytest.mark.slow)


def make(every, dtype=jnp.float32, gate=OPEN, **lm):
    config = dataclasses.replace(LLM, **lm)
    cross = CrossAttentionConfig(every, heads=2, head_dim=4, width=config.width, depth=config.depth)
    modules = {
        "encoder": ViT(tiny.VIT, dtype),
        "resampler": Resampler(tiny.RESAMPLER, dtype),
        "cross": CrossAttention(cross, dtype),
        "llm": LM(config, dtype),
    }
    model = AdapterModel(modules, "llm", ("resampler", "cross"), "encoder", frozen_lm=True)
    params = tiny.filled(tiny.boxed(model), seed=2)
    layers = params["cross"]["layers"]
    gates = {name: np.full_like(layers[name], gate) for name in ("gate_attn", "gate_mlp")}
    return model, params | {"cross": {"layers": layers | gates}}


def batch_of(**kwargs):
    return fake_batch(2, size=tiny.IMAGE, text_len=8, vocab_size=tiny.V, **kwargs)


def read(model, params, batch):
    return model.hidden(params, model.encode(params, batch), batch)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("every", [1, slow(2), 4, slow(5)])
def test_closed_gates_leave_the_language_model_as_it_is_bit_for_bit(every, dtype):
    model, params = make(every, dtype, gate=0.0)
    alone = AdapterModel(model.modules, "llm")
    batch = batch_of()
    crossed = jax.jit(lambda p: model.logits(p, read(model, p, batch)))(params)
    plain = jax.jit(lambda p: alone.logits(p, alone.hidden(p, None, batch)))(params)
    np.testing.assert_array_equal(np.asarray(crossed), np.asarray(plain))


def test_the_gates_are_closed_at_initialization():
    model, _ = make(2)
    params = model.init(jax.random.key(0), jax.ShapeDtypeStruct((1, 1, 4, 16), jnp.float32))
    layers = tiny.paths(params["cross"]["layers"])
    gates = [leaf for path, leaf in layers.items() if "gate" in path]
    assert len(gates) == 2
    assert all(not np.any(np.asarray(gate)) and gate.shape == (2,) for gate in gates)


@pytest.mark.parametrize("every", [1, slow(2), 3, slow(5)])
def test_the_states_are_those_of_layers_that_run_one_after_the_other(every):
    model, params = make(every)
    batch = batch_of()
    states = jax.jit(lambda p: read(model, p, batch))(params)

    lm, p = model.modules["llm"], params["llm"]
    media = model.prefix(params, model.encode(params, batch))
    x, segments, positions = model.layout(params, media, batch)
    gated = GatedLayer(model.modules["cross"].config)
    layers, mask = lm.config.per_layer(), text_mask(segments)
    distance = positions[:, :, None] - positions[:, None, :]
    for i in range(lm.config.depth):
        if (i + 1) % every == 0:
            own = {"params": jax.tree.map(lambda a, i=i: a[i // every], params["cross"]["layers"])}
            pair = gated.apply(own, media, method="keys_values")
            x = gated.apply(own, x, pair, segments > 0)
        block, layer = jax.tree.map(lambda a, i=i: a[i], (p["stack"]["blocks"], layers))
        x, _ = Block(lm.config.block()).apply(
            {"params": block}, x, None, layer, mask, positions, distance, None, None, 0
        )
    norm = lm.bind({"params": p}).norm
    text = norm(x)[:, -batch["tokens"].shape[1] :]
    expected = np.take_along_axis(np.asarray(text), batch["target_at"][:, :, None], axis=1)
    np.testing.assert_allclose(states, expected, atol=2e-5)


def test_only_tokens_after_the_image_see_it():
    model, params = make(2)
    batch = batch_of()
    rows = {k: batch[k] for k in ("prompt", "tokens", "segments", "positions")}

    def all_states(scale):
        media = scale * model.prefix(params, model.encode(params, batch))
        x, segments, positions = model.layout(params, media, rows)
        arguments = model.between(params, model.media(params, media), segments > 0)
        return model.apply(
            params, "llm", x, method="hidden", positions=positions, mask=text_mask(segments),
            **arguments,
        )[0], segments  # fmt: skip

    (one, segments), (other, _) = all_states(1.0), all_states(-1.0)
    seen = np.asarray(segments > 0)
    differs = np.abs(np.asarray(one - other)).max(-1) > 1e-4
    assert differs[seen].all()
    assert not differs[~seen].any()


def test_gradients_reach_the_gates_first_and_everything_once_they_are_open():
    batch = batch_of()

    def gradients(gate):
        model, params = make(2, gate=gate)

        def loss(trained):
            p = params | trained
            logits = model.logits(p, read(model, p, batch))
            return token_xent(logits, batch["targets"], batch["weights"])[0]

        return tiny.paths(jax.jit(jax.grad(loss))({"cross": params["cross"]}))

    moving = {path for path, g in gradients(0.0).items() if np.any(np.asarray(g))}
    assert moving == {"cross/layers/gate_attn", "cross/layers/gate_mlp"}
    assert all(np.any(np.asarray(g)) for g in gradients(OPEN).values())


def continued(model, params, batch, new, beams):
    run = jax.jit(lambda p: decode(model, p, batch, Decode(new, beams=beams)))
    return jax.device_get(run(params))


def prompt_batch():
    rng = np.random.default_rng(0)
    lengths, T = (1, 4, 2), 5
    batch = {k: np.zeros((3, T), np.int32) for k in ("tokens", "segments", "positions")}
    for b, n in enumerate(lengths):
        batch["tokens"][b, :n] = rng.integers(3, 8, n)
        batch["segments"][b, :n] = 1
        batch["positions"][b, :n] = np.arange(n)
    batch["prompt"] = np.array([[-1, -1], [4, 5], [-1, 6]], np.int32)
    batch["frames"] = rng.integers(0, 256, (3, 1, tiny.IMAGE, tiny.IMAGE, 3), np.uint8)
    return batch


@pytest.mark.parametrize("every", [1, 3])
def test_cached_decoding_equals_recomputing_the_whole_sequence_for_every_token(every):
    model, params = make(every, vocab_size=8)
    batch, new = prompt_batch(), 6
    out = continued(model, params, batch, new, beams=1)

    @jax.jit
    def next_logp(rows):
        rows = rows | {"target_at": (rows["segments"] > 0).sum(1, keepdims=True) - 1}
        states = read(model, params, rows)
        return jax.nn.log_softmax(model.logits(params, states)[:, 0])

    pad = ((0, 0), (0, new))
    text = {k: np.pad(batch[k], pad) for k in ("tokens", "segments", "positions")}
    lengths, ended = (batch["segments"] > 0).sum(1), np.zeros(3, bool)
    for i in range(new):
        token = np.asarray(next_logp(batch | text)).argmax(-1)
        token[ended] = 0
        np.testing.assert_array_equal(out["tokens"][:, i], token)
        ended |= token == EOS
        for b, n in enumerate(lengths + i):
            text["tokens"][b, n], text["segments"][b, n], text["positions"][b, n] = token[b], 1, n
    assert len({tuple(row) for row in out["tokens"].tolist()}) > 1, "the rows are all alike"


def test_a_beam_search_continues_every_beam_with_its_own_image():
    model, params = make(2, vocab_size=8)
    batch = prompt_batch()
    together = continued(model, params, batch, 6, beams=3)
    for b in range(3):
        alone = continued(model, params, {k: v[b : b + 1] for k, v in batch.items()}, 6, beams=3)
        np.testing.assert_array_equal(alone["tokens"][0], together["tokens"][b])
    flipped = continued(model, params, batch | {"frames": batch["frames"][::-1]}, 6, beams=3)
    assert np.any(flipped["logprob"] != together["logprob"])


def test_keys_and_values_of_all_layers_are_those_of_each():
    model, params = make(1)
    media = np.random.default_rng(0).standard_normal((2, 4, 16)).astype(np.float32)
    keys, values = cross_attention.keys_values(model.modules["cross"], params["cross"], media)
    assert keys.shape == values.shape == (5, 2, 4, 2, 4)
    layer = GatedLayer(model.modules["cross"].config)
    for i in range(5):
        own = {"params": jax.tree.map(lambda a, i=i: a[i], params["cross"]["layers"])}
        pair = layer.apply(own, media, method="keys_values")
        np.testing.assert_allclose((keys[i], values[i]), pair, atol=1e-6)


@pytest.mark.parametrize("every", [0, -1, 6, 100])
def test_a_distance_that_the_language_model_does_not_have_is_refused(every):
    with pytest.raises(ConfigError, match=rf"every={every}: .* has 5 layers; give 1 to 5"):
        make(every)
