"""The programs that look into a stage, against plain computations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.errors import ConfigError
from vadapter.evaluate.image_ablation import make_image_ablation
from vadapter.inspect.probe import first_layers, make_look, make_nats, parse_numbers
from vadapter.models.transformer import text_mask

B, P, T, TOP = 4, 3, 5, 3
WORDS = np.array([5, 6, 9, 20, 21, 30], np.int32)


@pytest.fixture(scope="module")
def model():
    return tiny.stage2(frozen_lm=True)


@pytest.fixture(scope="module")
def params(model):
    return tiny.filled(tiny.boxed(model))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, tiny.V, (B, T)).astype(np.int32)
    return {
        "features": rng.standard_normal((B, 1, tiny.N, 16)).astype(np.float32),
        "prompt": np.where(np.arange(P)[None] < 1, -1, 7).astype(np.int32).repeat(B, 0),
        "tokens": tokens,
        "segments": np.ones((B, T), np.int32),
        "positions": np.arange(T, dtype=np.int32)[None].repeat(B, 0),
        "target_at": np.arange(T, dtype=np.int32)[None].repeat(B, 0),
        "targets": np.roll(tokens, -1, axis=1),
        "weights": (rng.random((B, T)) < 0.7).astype(np.float32),
    }


@pytest.fixture(scope="module")
def look(model, params, batch):
    return jax.jit(make_look(model, WORDS, (1, 3), TOP))(params, batch)


def test_the_losses_of_rows_add_up_to_that_of_the_batch(model, params, batch):
    nats, targets = jax.jit(make_nats(model))(params, batch)
    sums = jax.jit(make_image_ablation(model))(params, batch)
    assert nats.shape == targets.shape == (B,)
    np.testing.assert_allclose(nats.sum(), sums["right"], rtol=1e-5)
    np.testing.assert_array_equal(targets, batch["weights"].sum(1))
    assert len(np.unique(np.asarray(nats))) == B


def test_the_nearest_words_are_those_of_the_largest_cosine(model, params, batch, look):
    prefix = np.asarray(model.prefix(params, jnp.asarray(batch["features"])))
    table = np.asarray(model.apply(params, "llm", WORDS[None], method="embed"))[0]
    dot = np.einsum("bqe,we->bqw", prefix, table)
    norms = np.linalg.norm(prefix, axis=-1)
    cosine = dot / norms[..., None] / np.linalg.norm(table, axis=-1)[None, None]
    order = np.argsort(-cosine, axis=-1)[..., :TOP]
    np.testing.assert_array_equal(look.words.index, order)
    np.testing.assert_allclose(
        look.words.score, np.take_along_axis(cosine, order, axis=-1), atol=1e-5
    )
    np.testing.assert_allclose(look.norm, norms, rtol=1e-5)


def test_the_lens_reads_the_states_of_a_layer_with_the_final_norm_and_the_head(
    model, params, batch, look
):
    prefix = model.prefix(params, jnp.asarray(batch["features"]))
    x, segments, positions = model.layout(params, prefix, batch)
    states, _ = model.apply(
        params, "llm", x, method="hidden", positions=positions, mask=text_mask(segments)
    )
    soft = states[:, P : P + prefix.shape[1]]
    p = np.asarray(jax.nn.softmax(model.logits(params, soft)))[..., WORDS]
    order = np.argsort(-p, axis=-1)[..., :TOP]
    np.testing.assert_array_equal(look.lens[3].index, order)  # layer 3 is the last
    np.testing.assert_allclose(look.lens[3].score, np.take_along_axis(p, order, axis=-1), atol=1e-6)
    assert np.abs(look.lens[1].score - look.lens[3].score).max() > 1e-4


def test_the_first_layers_continued_by_the_others_are_the_whole_model():
    lm, params = tiny.lm(tiny.LLM, windows=(2, 0), norm_offset=0.5)
    x = np.random.default_rng(1).standard_normal((2, 6, lm.config.width)).astype(np.float32)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((6, 6), bool)), (2, 6, 6))

    def run(depth):
        module, own = first_layers(lm, params, depth)
        assert module.config.windows == (2, 0)
        states, _ = module.apply(
            {"params": own}, x, method="hidden", positions=positions, mask=mask
        )
        return np.asarray(states)

    whole, _ = lm.apply({"params": params}, x, method="hidden", positions=positions, mask=mask)
    np.testing.assert_array_equal(run(lm.config.depth), whole)
    assert dataclasses.asdict(first_layers(lm, params, 2)[0].config)["depth"] == 2
    assert np.abs(run(1) - run(2)).max() > 1e-3


def test_layers_are_numbers_separated_by_commas():
    assert parse_numbers("--layer", "") == ()
    assert parse_numbers("--layer", "3") == (3,)
    assert parse_numbers("--layer", "2, 1,2") == (2, 1)
    with pytest.raises(ConfigError, match="--layer=first"):
        parse_numbers("--layer", "first")
