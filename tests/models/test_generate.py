"""Cached greedy decoding against recomputing everything for every token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny

from vadapter.data.batch import BOS, EOS, PAD
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.projection import Projection, ProjectionConfig
from vadapter.models.adapters.resampler import Resampler
from vadapter.models.generate import Decode, decode
from vadapter.models.lm import LM
from vadapter.models.vit import ViT

VOCAB, NEW, LENGTHS = 8, 10, (1, 4, 2)
PROMPTS = ([], [5, 6], [3])


def make(visual, bidirectional=False, **lm):
    config = dataclasses.replace(tiny.LLM, vocab_size=VOCAB, tied=False, **lm)
    modules = {
        "encoder": ViT(tiny.VIT),
        "resampler": Resampler(tiny.RESAMPLER),
        "fc_out": Projection(ProjectionConfig(tiny.LLM.width)),
        "llm": LM(config),
    }
    if visual:
        model = AdapterModel(
            modules, lm="llm", chain=("resampler", "fc_out"), encoder="encoder",
            bidirectional=bidirectional,
        )  # fmt: skip
        return model, tiny.filled(tiny.boxed(model), seed=3)
    model = AdapterModel({"llm": modules["llm"]}, lm="llm")
    abstract = jax.eval_shape(lambda k: model.init(k, None), jax.random.key(0))
    return model, tiny.filled(abstract, seed=3)


def make_batch(visual):
    rng = np.random.default_rng(0)
    B, T, P = len(LENGTHS), max(LENGTHS) + 1, 3
    batch = {k: np.zeros((B, T), np.int32) for k in ("tokens", "segments", "positions")}
    batch["prompt"] = np.full((B, P), -1, np.int32)
    for b, (n, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        batch["tokens"][b, :n] = rng.integers(3, VOCAB, n)
        batch["segments"][b, :n] = 1
        batch["positions"][b, :n] = np.arange(n)
        if prompt:
            batch["prompt"][b, -len(prompt) :] = prompt
    if visual:
        shape = (B, 1, tiny.IMAGE, tiny.IMAGE, 3)
        batch["frames"] = rng.integers(0, 256, shape, np.uint8)
    return batch


def recompute(model, params, batch):
    """Row by row, the unpadded sequence through the model, once for each token.

    It is causal, but where the model is bidirectional for the queries, behind the prompt.
    """
    lm, p = model.modules["llm"], {"params": params["llm"]}
    prefix = None
    if "frames" in batch:
        prefix = jax.jit(lambda b: model.prefix(params, model.encode(params, b)))(batch)
    S = 3 + 4 + max(LENGTHS) + NEW  # everything is padded behind, where causality hides it

    @jax.jit
    def step(front, text, n_prompt, n_front, n):
        words = lm.apply(p, text[None], method="embed")
        at = jnp.arange(S)[None]
        x = jnp.zeros((1, S, words.shape[-1])).at[:, : front.shape[1]].set(front)
        x = jnp.where(at[..., None] >= n_front, jnp.roll(words, n_front, axis=1), x)
        mask = jnp.tril(jnp.ones((1, S, S), bool))
        query = (at[0] >= n_prompt) & (at[0] < n_front) & model.bidirectional
        mask |= query[None, :, None] & query[None, None, :]
        states, _ = lm.apply(p, x, method="hidden", positions=at, mask=mask)
        logp = jax.nn.log_softmax(lm.apply(p, states[0, n_front + n - 1], method="logits"))
        return jnp.argmax(logp), logp.max()

    rows, sums = [], []
    for b, (n, prompt) in enumerate(zip(LENGTHS, PROMPTS, strict=True)):
        parts = [lm.apply(p, np.array([prompt], np.int32).reshape(1, -1), method="embed")]
        parts += [] if prefix is None else [prefix[b : b + 1]]
        front = jnp.concatenate(parts, axis=1)
        front, n_front = jnp.pad(front, ((0, 0), (0, 7 - front.shape[1]), (0, 0))), front.shape[1]
        text, out, total = list(batch["tokens"][b, :n]), [], 0.0
        while len(out) < NEW and EOS not in out:
            padded = np.pad(np.array(text, np.int32), (0, S - len(text)))
            token, logp = step(front, padded, len(prompt), n_front, len(text))
            out.append(int(token))
            text.append(int(token))
            total += float(logp)
        rows.append(out + [PAD] * (NEW - len(out)))
        sums.append(total)
    return np.array(rows), np.array(sums)


CASES = {
    "rope, grouped keys, image": (True, {}),
    "queries both ways": (True, {"bidirectional": True}),
    "rope, one key head, text": (False, {"kv_heads": 1}),
    "learned, all keys, image": (True, {"positions": "learned", "kv_heads": 4}),
    "learned, serial, text": (False, {"positions": "learned", "parallel": False}),
    "gated delta networks, image": (True, {"delta": tiny.DELTA, "recurrent": (1, 1, 0)}),
}


@pytest.mark.parametrize("case", CASES)
def test_cached_decoding_equals_recomputing_the_whole_sequence_for_every_token(case):
    visual, lm = CASES[case]
    model, params = make(visual, **lm)
    batch = make_batch(visual)
    out = jax.jit(lambda p, b: decode(model, p, b, Decode(NEW)))(params, batch)
    tokens, logprob = recompute(model, params, batch)
    np.testing.assert_array_equal(out["tokens"], tokens)
    np.testing.assert_allclose(out["logprob"], logprob, atol=1e-4)
    np.testing.assert_array_equal(out["ended"], (tokens == EOS).any(1))
    assert len({tuple(row) for row in tokens.tolist()}) > 1, "the rows are all alike"


@pytest.fixture(scope="module")
def decoder():
    model, params = make(True)
    return model, params, jax.jit(lambda p, b: decode(model, p, b, Decode(NEW)))


def with_end_bias(params, strength):
    """Make EOS likelier where the last state's first coordinate is positive."""
    kernel = params["llm"]["head"]["kernel"].copy()
    kernel[0, EOS] += strength
    return params | {"llm": params["llm"] | {"head": {"kernel": kernel}}}


def test_after_the_end_token_there_is_only_padding(decoder):
    _, params, run = decoder
    ends = []
    for strength in (0.0, 1.0, 2.0, 3.0):
        out = jax.device_get(run(with_end_bias(params, strength), make_batch(True)))
        for row, ended in zip(out["tokens"], out["ended"], strict=True):
            at = np.flatnonzero(row == EOS)
            assert ended == (len(at) > 0)
            if ended:
                assert (row[at[0] + 1 :] == PAD).all()
            ends.append(bool(ended))
    assert set(ends) == {False, True}, "both must occur for this test to say anything"


@pytest.mark.parametrize(("word", "turns"), [(EOS, 0), (5, 3)])
def test_decoding_stops_once_every_row_has_ended(monkeypatch, word, turns):
    """A model that says one word forever; the loop also counts its turns."""
    model, params = make(False, norm="layer", depth=1)
    norm = {"scale": np.zeros(24, np.float32), "bias": np.ones(24, np.float32)}
    kernel = np.zeros((24, VOCAB), np.float32)
    kernel[:, word] = 1
    params = {"llm": params["llm"] | {"norm": norm, "head": {"kernel": kernel}}}
    loop, seen = jax.lax.while_loop, []

    def counted(cond, body, carry):
        def turn(carry):
            jax.debug.callback(seen.append, carry["i"])
            return body(carry)

        return loop(cond, turn, carry)

    monkeypatch.setattr(jax.lax, "while_loop", counted)
    out = jax.jit(lambda p: decode(model, p, make_batch(False), Decode(4)))(params)
    jax.effects_barrier()
    assert len(seen) == turns, "the first token comes from the prefill"
    expected = [EOS, PAD, PAD, PAD] if word == EOS else [word] * 4
    np.testing.assert_array_equal(out["tokens"], [expected] * 3)
    np.testing.assert_array_equal(out["ended"], [word == EOS] * 3)


def test_any_of_several_ids_ends_a_text(decoder):
    model, params, run = decoder
    batch = make_batch(True)
    first = np.asarray(run(params, batch)["tokens"])[:, 0]
    stops = (VOCAB - 1, *(int(token) for token in first[:2]))
    out = jax.jit(lambda p, b: decode(model, p, b, Decode(NEW), stop=stops))(params, batch)
    np.testing.assert_array_equal(out["tokens"][:2, 0], first[:2])
    assert (out["tokens"][:2, 1:] == PAD).all()
    assert out["ended"][:2].all()


def test_rows_of_the_embedding_that_are_no_tokens_are_never_produced(decoder):
    model, params, run = decoder
    batch, limit = make_batch(True), 5
    free = np.asarray(run(params, batch)["tokens"])
    assert free.max() >= limit, "it must occur for this test to say anything"
    out = jax.jit(lambda p, b: decode(model, p, b, Decode(NEW), vocab=limit))(params, batch)
    assert np.asarray(out["tokens"]).max() < limit
    kernel = params["llm"]["head"]["kernel"].copy()
    kernel[:, limit:] = 0
    other = params | {"llm": params["llm"] | {"head": {"kernel": kernel}}}
    same = jax.jit(lambda p, b: decode(model, p, b, Decode(NEW), vocab=limit))(other, batch)
    np.testing.assert_array_equal(out["tokens"], same["tokens"])


def test_a_row_does_not_depend_on_the_other_rows_of_its_batch(decoder):
    _, params, run = decoder
    batch = make_batch(True)
    together = run(params, batch)
    for b in range(len(LENGTHS)):
        alone = {k: np.zeros_like(v) for k, v in batch.items()}
        for key, value in batch.items():
            alone[key][:] = value[b : b + 1]
        # Row 0 keeps company with copies of row b, then row b stands among other rows.
        same = run(params, alone)
        np.testing.assert_array_equal(same["tokens"], np.tile(together["tokens"][b], (3, 1)))
        np.testing.assert_allclose(same["logprob"], [together["logprob"][b]] * 3, atol=1e-5)
    shuffled = run(params, {k: v[::-1] for k, v in batch.items()})
    np.testing.assert_array_equal(shuffled["tokens"], together["tokens"][::-1])


def test_one_new_token_is_the_likeliest_next_word():
    model, params = make(False)
    batch = {
        "prompt": np.zeros((1, 0), np.int32),
        "tokens": np.array([[BOS, 4]], np.int32),
        "segments": np.ones((1, 2), np.int32),
        "positions": np.array([[0, 1]], np.int32),
    }
    out = jax.jit(lambda p: decode(model, p, batch, Decode(1)))(params)
    lm = model.modules["llm"]
    logits = jax.jit(lm.apply)({"params": params["llm"]}, batch["tokens"])[0, -1]
    assert out["tokens"].shape == (1, 1)
    assert int(out["tokens"][0, 0]) == int(np.argmax(logits))
    assert float(out["logprob"][0]) == pytest.approx(float(jax.nn.log_softmax(logits).max()))
