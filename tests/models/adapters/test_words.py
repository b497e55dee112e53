"""The prefix as words: samples and their gradients, the temperature, evaluation without noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.cases import some_slow

from vadapter.models.adapter_model import AdapterModel, Training
from vadapter.models.adapters.projection import Projection, ProjectionConfig
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.adapters.words import Words, WordsConfig
from vadapter.models.generate import Decode, decode
from vadapter.models.lm import LM
from vadapter.models.vit import ViT

VIEW = (tiny.IMAGE, tiny.IMAGE)
E, V, PADDED = tiny.LLM.width, 24, tiny.V  # the embedding has PADDED rows, of which V are words


def make(embed_scale=True, **config):
    llm = dataclasses.replace(tiny.LLM, embed_scale=embed_scale)
    modules = {
        "encoder": ViT(tiny.VIT),
        "resampler": Resampler(tiny.RESAMPLER),
        "fc_out": Projection(ProjectionConfig(E)),
        "words": Words(WordsConfig(**config, width=E, vocab_size=V)),
        "llm": LM(llm),
    }
    chain = ("resampler", "fc_out", "words")
    model = AdapterModel(modules, "llm", chain, "encoder", frozen_lm=True)
    return model, tiny.filled(tiny.boxed(model), seed=1)


def visual():
    return np.random.default_rng(0).standard_normal((3, 1, tiny.N, 16)).astype(np.float32)


def soft_tokens(model, params):
    before = dataclasses.replace(model, chain=model.chain[:-1])
    return before.prefix(params, visual())


def training(step=0, seed=0):
    return Training(jax.random.key(seed), jnp.int32(step), dropout=False)


@pytest.mark.parametrize("embed_scale", [True, False])
def test_an_evaluation_reads_the_most_probable_words_and_can_say_which(embed_scale):
    model, params = make(embed_scale)
    logits = np.asarray(model.logits(params, soft_tokens(model, params)))
    ids = logits[..., :V].argmax(-1)
    np.testing.assert_array_equal(model.prefix_words(params, visual()), ids)
    words = model.apply(params, "llm", ids, method="embed")
    np.testing.assert_array_equal(model.prefix(params, visual()), words)
    assert len(np.unique(ids)) > 2


@pytest.mark.parametrize("step", [0, 3])
def test_hard_samples_are_words_and_the_padding_of_the_embedding_is_never_drawn(step):
    model, params = make(hard=True, temperature=5.0)
    every_word = np.asarray(model.apply(params, "llm", np.arange(PADDED)[None], method="embed"))[0]
    prefix = np.asarray(model.prefix(params, visual(), training(step))).reshape(-1, E)
    distance = np.abs(prefix[:, None] - every_word[None]).max(-1)
    np.testing.assert_allclose(distance.min(1), 0, atol=1e-6)
    assert distance.argmin(1).max() < V


def test_soft_samples_are_mixtures_that_become_words_as_the_temperature_falls():
    def distance(temperature):
        model, params = make(hard=False, temperature=temperature, min_temperature=1e-4)
        words = np.asarray(model.apply(params, "llm", np.arange(V)[None], method="embed"))[0]
        prefix = np.asarray(model.prefix(params, visual(), training())).reshape(-1, E)
        return np.abs(prefix[:, None] - words[None]).max(-1).min(1).max()

    far, near = distance(2.0), distance(1e-3)
    assert near < 1e-2 < far


def test_samples_follow_the_probabilities_of_the_head():
    model, params = make(hard=True, temperature=1.0)
    logits = np.asarray(model.logits(params, soft_tokens(model, params)))[0, 0, :V]
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    words = np.asarray(model.apply(params, "llm", np.arange(V)[None], method="embed"))[0]

    @jax.jit
    @jax.vmap
    def draw(seed):
        own = Training(jax.random.key(seed), jnp.int32(0), dropout=False)
        return model.prefix(params, visual()[:1], own)[0, 0]

    drawn = np.asarray(draw(np.arange(3000)))
    ids = np.abs(drawn[:, None] - words[None]).max(-1).argmin(1)
    share = np.bincount(ids, minlength=V) / len(ids)
    np.testing.assert_allclose(share, p, atol=5 * np.sqrt(p.max() / len(ids)))


@pytest.mark.parametrize("hard", [True, False])
def test_the_gradient_is_that_of_the_soft_sample(hard):
    model, params = make(hard=hard, temperature=1.5)
    soft, _ = make(hard=False, temperature=1.5)
    direction = np.random.default_rng(1).standard_normal((3, 4, E)).astype(np.float32)

    def gradients(model):
        def loss(trained):
            prefix = model.prefix(params | trained, visual(), training())
            return (prefix * direction).sum()

        return jax.jit(jax.grad(loss))({"fc_out": params["fc_out"]})

    ours, expected = gradients(model), gradients(soft)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, expected)
    assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(ours))


def test_without_noise_a_training_step_takes_the_most_probable_words():
    model, params = make(hard=True, noise=0.0)
    trained = model.prefix(params, visual(), training())
    np.testing.assert_allclose(trained, model.prefix(params, visual()), atol=1e-6)


@pytest.mark.parametrize("at_once", some_slow([1, 2, 3, 100], fast=[3, 100]))
def test_the_number_of_tokens_at_once_changes_nothing(at_once):
    model, params = make(hard=False)
    grouped, _ = make(hard=False, at_once=at_once)
    for context in (None, training()):
        expected = model.prefix(params, visual(), context)
        np.testing.assert_allclose(grouped.prefix(params, visual(), context), expected, atol=1e-5)


def test_noise_depends_on_the_key_alone():
    model, params = make(hard=False)
    run = jax.jit(lambda seed: model.prefix(params, visual(), training(seed=seed)))
    one, other, again = run(0), run(1), run(0)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one[:, 0] - one[:, 1]).max() > 1e-3


@pytest.mark.parametrize(("step", "expected"), [(0, 2.0), (100, 2.0 * np.exp(-1)), (10_000, 0.5)])
def test_the_temperature_decays_exponentially_down_to_its_minimum(step, expected):
    config = WordsConfig(temperature=2.0, decay=0.01, min_temperature=0.5)
    assert float(config.temperature_at(jnp.int32(step))) == pytest.approx(expected, rel=1e-6)


def test_the_step_of_training_reaches_the_temperature():
    model, params = make(hard=False, temperature=4.0, decay=0.01, min_temperature=0.01)
    run = jax.jit(lambda step: model.prefix(params, visual(), training(step)))
    assert np.abs(np.asarray(run(0)) - np.asarray(run(300))).max() > 0.1


def test_one_hot_weights_mix_to_the_embeddings():
    model, params = make()
    ids = np.arange(V)[None]
    mixed = model.apply(params, "llm", jax.nn.one_hot(ids, PADDED), method="mix")
    np.testing.assert_array_equal(mixed, model.apply(params, "llm", ids, method="embed"))


@pytest.mark.parametrize("beams", [1, 3])
def test_generations_come_with_the_words_of_their_own_image(beams):
    model, params = make()
    frames = np.random.default_rng(0).integers(0, 256, (3, 1, *VIEW, 3), np.uint8)
    text = np.ones((3, 2), np.int32)
    batch = {
        "frames": frames, "prompt": np.full((3, 2), 4, np.int32), "tokens": 5 * text,
        "segments": text, "positions": np.arange(2)[None] * text,
    }  # fmt: skip
    out = jax.jit(lambda p: decode(model, p, batch, Decode(4, beams=beams)))(params)
    expected = model.prefix_words(params, model.encode(params, batch))
    np.testing.assert_array_equal(out["prefix"], expected)
    assert len({tuple(row) for row in np.asarray(expected).tolist()}) > 1
