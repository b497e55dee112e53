"""Beam search against trying every text, against greedy, and against its own sums."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from support import tiny
from support.cases import some_slow

from vadapter.data.batch import PAD
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.generate import Decode, Decoder, beam, decode
from vadapter.models.lm import LM

VOCAB, STOP, LENGTHS = 6, (2,), (1, 4, 2)
B, T = len(LENGTHS), max(LENGTHS) + 1


@pytest.fixture(scope="module")
def language():
    """A text-only model whose rows end at different times."""
    config = dataclasses.replace(tiny.LLM, vocab_size=VOCAB, tied=False, depth=1)
    model = AdapterModel({"llm": LM(config)}, lm="llm")
    abstract = jax.eval_shape(lambda k: model.init(k, None), jax.random.key(0))
    params = tiny.filled(abstract, seed=7)
    rng = np.random.default_rng(0)
    batch = {k: np.zeros((B, T), np.int32) for k in ("tokens", "segments", "positions")}
    batch["prompt"] = np.zeros((B, 0), np.int32)
    for b, n in enumerate(LENGTHS):
        batch["tokens"][b, :n] = rng.integers(3, VOCAB, n)
        batch["segments"][b, :n] = 1
        batch["positions"][b, :n] = np.arange(n)
    return model, params, batch


def search(language, how, **options):
    model, params, batch = language
    run = jax.jit(lambda p, b: beam(Decoder(model, p, how, **options), b))
    return jax.device_get(run(params, batch))


def log_probability(language, b, texts):
    """f64[texts]: the sum over the tokens of each, by one full pass without a cache."""
    model, params, batch = language
    n = LENGTHS[b]
    longest = max(map(len, texts))
    rows = np.zeros((len(texts), n + longest), np.int32)
    for row, text in zip(rows, texts, strict=True):
        row[: n + len(text)] = [*batch["tokens"][b, :n], *text]
    logits = jax.jit(model.modules["llm"].apply)({"params": params["llm"]}, rows)
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    return np.array([
        sum(logp[i, n - 1 + t, token] for t, token in enumerate(text))
        for i, text in enumerate(texts)
    ])  # fmt: skip


def text_of(row):
    """The tokens up to the end token."""
    row = [int(token) for token in row]
    return row[: row.index(STOP[0]) + 1] if STOP[0] in row else row


def every_text(length, min_new=0):
    """All that may be written: ended by the stop token, or as long as is allowed."""
    words = [i for i in range(VOCAB) if i not in STOP]
    for n in range(length):
        if n + 1 >= min_new:
            yield from ((*text, STOP[0]) for text in itertools.product(words, repeat=n))
    yield from itertools.product(words, repeat=length)


@pytest.mark.parametrize(
    ("penalty", "min_new"),
    some_slow([(0.0, 0), (1.0, 0), (2.0, 3), (-1.0, 2)], fast=[(0.0, 0), (2.0, 3)]),
)
def test_wide_beams_find_the_best_of_all_texts(language, penalty, min_new):
    length = 3
    how = Decode(length, min_new, VOCAB ** (length - 1), penalty)
    out = search(language, how)
    texts = [list(text) for text in every_text(length, min_new)]
    for b in range(B):
        sums = log_probability(language, b, texts)
        worth = sums / np.array([len(text) ** penalty for text in texts])
        best = int(worth.argmax())
        assert text_of(out["tokens"][b]) == texts[best]
        assert out["score"][b] == pytest.approx(worth[best], abs=1e-4)
        assert out["logprob"][b] == pytest.approx(sums[best], abs=1e-4)
        assert out["ended"][b] == (texts[best][-1] in STOP)


def test_a_width_of_the_vocabulary_is_exhaustive_for_two_tokens(language):
    out = search(language, Decode(2, 0, VOCAB, 1.0))
    texts = [list(text) for text in every_text(2)]
    for b in range(B):
        worth = log_probability(language, b, texts) / np.array([len(text) for text in texts])
        assert text_of(out["tokens"][b]) == texts[int(worth.argmax())]


@pytest.mark.parametrize("min_new", [0, 5])
def test_one_beam_is_greedy(language, min_new):
    model, params, batch = language
    out = search(language, Decode(8, min_new, 1, 0.0))
    run = lambda p, b: decode(model, p, b, Decode(8, min_new))  # noqa: E731
    same = jax.jit(run)(params, batch)
    np.testing.assert_array_equal(out["tokens"], same["tokens"])
    np.testing.assert_array_equal(out["ended"], same["ended"])
    np.testing.assert_allclose(out["logprob"], same["logprob"], atol=1e-5)
    assert out["ended"].any(), "it must end for this test to say anything"
    lengths = [len(text_of(row)) for row in out["tokens"]]
    assert min(lengths) >= min_new
    assert min_new or min(lengths) < 5, "a lower limit must change something"


@pytest.mark.parametrize(("beams", "penalty"), [(2, 0.0), (4, 1.0)])
def test_log_probabilities_are_those_of_the_full_pass(language, beams, penalty):
    out = search(language, Decode(7, 0, beams, penalty))
    for b in range(B):
        text = text_of(out["tokens"][b])
        assert (out["tokens"][b, len(text) :] == PAD).all()
        (total,) = log_probability(language, b, [text])
        assert out["logprob"][b] == pytest.approx(total, abs=1e-4)
        assert out["score"][b] == pytest.approx(total / len(text) ** penalty, abs=1e-4)


def test_a_finished_beam_is_kept_while_others_continue(language):
    """Of sums the first end that is likely enough wins, however much longer the search may go."""
    short, long = (search(language, Decode(length, 0, 3, 0.0)) for length in (4, 9))
    assert short["ended"].any(), "a text must end early for this test to say anything"
    for b in np.flatnonzero(short["ended"]):
        assert long["score"][b] >= short["score"][b] - 1e-5
        assert text_of(long["tokens"][b]) == text_of(short["tokens"][b])


def test_barred_ids_are_never_written(language):
    free = search(language, Decode(6, 0, 3))
    assert free["tokens"].max() >= 4, "it must occur for this test to say anything"
    assert search(language, Decode(6, 0, 3), vocab=4)["tokens"].max() < 4
    late = search(language, Decode(6, 6, 3))["tokens"]
    assert not (late[:, :-1] == STOP[0]).any()


def test_a_row_does_not_depend_on_the_others(language):
    model, params, batch = language
    together = search(language, Decode(6, 0, 3))
    turned = {k: v[::-1] for k, v in batch.items()}
    other = search((model, params, turned), Decode(6, 0, 3))
    np.testing.assert_array_equal(other["tokens"], together["tokens"][::-1])


def test_shots_are_between_prompt_and_image():
    model = tiny.stage2()
    params = {k: tiny.filled(v, seed=i) for i, (k, v) in enumerate(tiny.boxed(model).items())}
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 1, tiny.IMAGE, tiny.IMAGE, 3), np.uint8)
    batch = {"frames": frames, "prompt": np.full((2, 2), 3, np.int32)}
    batch |= {k: np.full((2, 1), v, np.int32) for k, v in (("tokens", 5), ("segments", 1))}
    batch["positions"] = np.zeros((2, 1), np.int32)
    words = np.array([[7, 8, 9]], np.int32)

    @jax.jit
    def both(params):
        shown = model.modules["llm"].apply({"params": params["llm"]}, words, method="embed")
        front = np.concatenate([batch["prompt"], np.repeat(words, 2, 0)], axis=1)
        run = lambda b, s: decode(model, params, b, Decode(4, 0, 2), shown=s)  # noqa: E731
        return run(batch, shown), run({**batch, "prompt": front}, None), run(batch, None)

    shown, written, without = jax.device_get(both(params))
    np.testing.assert_array_equal(shown["tokens"], written["tokens"])
    np.testing.assert_allclose(shown["logprob"], written["logprob"], atol=1e-5)
    assert not np.allclose(shown["logprob"], without["logprob"], atol=1e-3)
