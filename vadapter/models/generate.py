"""Greedy decoding and beam search with a key-value cache: one prefill, then one token at a time.

`decode` chooses between the searches `greedy` and `beam`, for which `Decoder` runs the model.

Legend: B rows, K beams, C candidates of a step, S cache slots, G new tokens, X tokens of examples,
E language model width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from vadapter.data.batch import EOS, PAD, Batch
from vadapter.models.adapter_model import AdapterModel, Params
from vadapter.models.adapters.cross_attention import KeysValues
from vadapter.models.decoding import Decode
from vadapter.models.layered import fitted, is_layered
from vadapter.models.lm import LM, empty_cache
from vadapter.models.transformer import Cache

_NOTHING = -1e9  # the score of an empty place among K texts; finite, so that sums are no NaN


class Context(NamedTuple):
    """What the language model has read, with free slots for what it generates."""

    cache: Cache
    positions: Int[Array, "B S"]  # of the slots
    visible: Bool[Array, "B S"]  # slots that are filled, and not with padding
    position: Int[Array, " B"]  # of the last token of each text
    slot: Int[Array, ""]  # the next free one
    media: KeysValues | None = None  # of gated cross-attention
    words: Int[Array, "B Q"] | None = None  # words of a prefix that consists of words


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model with its parameters, and what it may generate; see `decode`."""

    model: AdapterModel
    params: Params
    how: Decode
    stop: Sequence[int] = (EOS,)
    vocab: int | None = None

    def prefill(
        self, batch: Batch, shown: Float[Array, "1 X E"] | None
    ) -> tuple[Float[Array, "B V"], Context]:
        """Read every row; return the log probabilities of its next token, and the context."""
        model, params, room = self.model, self.params, self.how.max_new
        lm, visual = model.modules[model.lm], model.encode(params, batch)
        assert isinstance(lm, LM)
        prefix, words = None, None
        if visual is not None:
            words = model.prefix_words(params, visual)
            if words is None:
                prefix = model.prefix(params, visual)
            else:
                prefix = model.apply(params, model.lm, words, method="embed")
        queries = prefix
        if shown is not None:
            assert prefix is not None
            examples = jnp.broadcast_to(shown, (len(prefix), *shown.shape[1:]))
            prefix = jnp.concatenate([examples.astype(prefix.dtype), prefix], axis=1)
        x, segments, positions = model.layout(params, prefix, batch)
        B, S, _ = x.shape
        text_len = batch["tokens"].shape[1]
        stacked = not is_layered(params[model.lm])
        cache = empty_cache(lm.config, B, S + room, lm.dtype, stacked)
        mask = jnp.pad(model.mask(segments, queries, text_len), ((0, 0), (0, 0), (0, room)))
        slots = jnp.pad(positions, ((0, 0), (0, room)))
        media = model.media(params, prefix)
        states, cache = model.apply(
            params, model.lm, x, method="hidden", positions=positions, mask=mask,
            key_positions=slots, cache=cache, index=0, **model.between(params, media, segments > 0),
        )  # fmt: skip
        # Texts are padded at the end: each row continues after its own last token.
        last = jnp.argmax(jnp.where(segments > 0, jnp.arange(S)[None, :], -1), axis=1)
        states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
        position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0]
        visible = jnp.pad(segments != 0, ((0, 0), (0, room)))
        context = Context(cache, slots, visible, position, jnp.int32(S), media, words)
        return self._log_probs(states), context

    def extend(
        self, context: Context, token: Int[Array, " B"]
    ) -> tuple[Float[Array, "B V"], Context]:
        """Read one more token of every row; return the same as `prefill`."""
        model, position, slot = self.model, context.position + 1, context.slot
        is_new = (jnp.arange(context.positions.shape[1]) == slot)[None, :]
        visible = context.visible | is_new
        slots = jnp.where(is_new, position[:, None], context.positions)
        embedded = model.apply(self.params, model.lm, token[:, None], method="embed")
        states, cache = model.apply(
            self.params, model.lm, embedded, method="hidden", positions=position[:, None],
            mask=visible[:, None, :], key_positions=slots, cache=context.cache, index=slot,
            **model.between(self.params, context.media, jnp.ones((len(token), 1), bool)),
        )  # fmt: skip
        extended = context._replace(
            cache=cache, positions=slots, visible=visible, position=position, slot=slot + 1
        )
        return self._log_probs(states[:, 0]), extended

    def _log_probs(self, states: Float[Array, "B E"]) -> Float[Array, "B V"]:
        logits = self.model.logits(self.params, states)
        return jax.nn.log_softmax(logits.astype(jnp.float32))

    def ends(self, token: Int[Array, "*n"]) -> Bool[Array, "*n"]:
        """Return whether each id ends a text."""
        stops = jnp.array(self.stop, jnp.int32).reshape(*[1] * token.ndim, -1)
        return (token[..., None] == stops).any(axis=-1)

    def permitted(
        self, logp: Float[Array, "B V"], length: Int[Array, ""] | int
    ) -> Float[Array, "B V"]:
        """Return `logp` with -inf for ids that must not follow `length` new tokens."""
        ids = jnp.arange(logp.shape[-1])
        forbidden = self.ends(ids) & (length + 1 < self.how.min_new)
        if self.vocab is not None:
            forbidden |= ids >= self.vocab
        return jnp.where(forbidden[None, :], -jnp.inf, logp)


def decode(
    model: AdapterModel, params: Params, batch: Batch, how: Decode, stop: Sequence[int] = (EOS,),
    vocab: int | None = None, shown: Float[Array, "1 X E"] | None = None, *, float32: bool = False,
) -> dict[str, jax.Array]:  # fmt: skip
    """Continue each row's text.

    Rows may have texts of different lengths: padding is masked and takes no position. Decoding
    stops early once every row has ended.

    Args:
      params: of every component; those of the language model may be `layered`.
      batch: `frames` or `features` (none for text only), `prompt`, and the text to continue in
        `tokens`, `segments`, `positions` (one segment a row, at least one token).
      stop: ids that end a text: `stop_ids` of the tokenizer.
      vocab: generate only ids below it: `vocab_size` of the tokenizer, as the padding rows of a
        public model's embedding have logits, too. None: all ids.
      shown: embeddings between every prompt and its image: few-shot examples, or None.
      float32: compute in float32, whatever the dtype of the model.

    Returns:
      tokens: i32[B, G], PAD after the end; ended: bool[B], whether the row ends with one of `stop`;
      logprob: f32[B], sum over the generated tokens; of a beam search score: f32[B]; of a prefix
      that consists of words prefix: i32[B, Q].
    """
    search = greedy if how.beams == 1 else beam
    model = fitted(model, params, float32=float32)
    return search(Decoder(model, params, how, stop, vocab), batch, shown)


def greedy(
    decoder: Decoder, batch: Batch, shown: Float[Array, "1 X E"] | None = None
) -> dict[str, jax.Array]:
    """Continue each row's text by the most probable next token, one after the other."""
    G = decoder.how.max_new

    def choose(logp, length):
        token = _first_maximum(decoder.permitted(logp, length))
        return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        i, ended = carry["i"] + 1, carry["ended"]
        logp, context = decoder.extend(carry["context"], carry["token"])
        token, logp = choose(logp, i)
        token = jnp.where(ended, PAD, token)
        return {
            "i": i,
            "token": token,
            "tokens": jax.lax.dynamic_update_slice(carry["tokens"], token[:, None], (0, i)),
            "logprob": carry["logprob"] + jnp.where(ended, 0.0, logp),
            "ended": ended | decoder.ends(token),
            "context": context,
        }

    logp, context = decoder.prefill(batch, shown)
    token, logp = choose(logp, 0)
    start = {
        "i": jnp.int32(0),
        "token": token,
        "tokens": jnp.full((len(token), G), PAD, jnp.int32).at[:, 0].set(token),
        "logprob": logp,
        "ended": decoder.ends(token),
        "context": context,
    }
    out = jax.lax.while_loop(lambda c: (c["i"] < G - 1) & ~jnp.all(c["ended"]), body, start)
    return {k: out[k] for k in ("tokens", "ended", "logprob")} | _words(out["context"])


class _Finished(NamedTuple):
    """The K best finished texts of every row, best first."""

    score: Float[Array, "B K"]
    logprob: Float[Array, "B K"]
    tokens: Int[Array, "B K G"]
    ended: Bool[Array, "B K"]  # by one of `stop`, not by the greatest length


class _Beams(NamedTuple):
    """A beam search after `length` new tokens: the texts that continue, and those that do not."""

    length: Int[Array, ""]
    logprob: Float[Array, "B K"]  # of the continuing texts, best first
    tokens: Int[Array, "B K G"]
    parents: Int[Array, "B K"]  # the beams of one token less that they continue
    active: Bool[Array, " B"]  # rows whose search is not over
    finished: _Finished


def beam(
    decoder: Decoder, batch: Batch, shown: Float[Array, "1 X E"] | None = None
) -> dict[str, jax.Array]:
    """Continue each row's text by the best of the continuations that K beams explore.

    The score of a finished text is its log probability divided by its length in tokens, including
    the end token, to the power of the length penalty: 0 sums, 1 averages, more favors longer texts.
    Every step considers the K (1 + stops) best continuations. Those among the first K that end are
    kept if they are among the K best finished texts; the K best that do not end continue. The
    search is over when no continuing text could still beat the worst of K finished ones: with a
    penalty above 0 that is judged at the full length, otherwise at the next.

    This is the search of transformers (5) with `early_stopping="never"`, `num_beams`,
    `length_penalty`, `max_new_tokens` and `min_new_tokens` of the same values.
    """
    K, G, penalty = decoder.how.beams, decoder.how.max_new, decoder.how.length_penalty

    def score(logprob: jax.Array, length: jax.Array | int) -> jax.Array:
        return logprob / jnp.asarray(length, jnp.float32) ** penalty

    def advance(beams: _Beams, logp: Float[Array, "BK V"]) -> _Beams:
        """Choose the texts of one more token; `logp` are the log probabilities of that token."""
        i, V = beams.length, logp.shape[-1]
        # 1. The best continuations. Even if every stop token of every beam is among them, K of
        # them do not end.
        count = min((1 + len(decoder.stop)) * K, K * V)
        logp = decoder.permitted(logp, i).reshape(-1, K, V)
        total = jnp.maximum(beams.logprob[:, :, None] + logp, 2 * _NOTHING)
        total, index = jax.lax.top_k(total.reshape(-1, K * V), count)
        parents, token = index // V, (index % V).astype(jnp.int32)
        tokens = _pick(beams.tokens, parents).at[:, :, i].set(token)
        ended = decoder.ends(token)
        over = ended | (i == G - 1)

        # 2. Those of the first K that are over compete with the texts that finished earlier.
        finishes = over & (jnp.arange(count) < K)[None, :] & (total > _NOTHING / 2)
        finishes &= beams.active[:, None]
        scores = jnp.where(finishes, score(total, i + 1), _NOTHING)
        new = _Finished(scores, total, tokens, ended)
        both = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), beams.finished, new)
        _, kept = jax.lax.top_k(both.score, K)
        finished = jax.tree.map(lambda x: _pick(x, kept), both)

        # 3. The K best of the others continue, while the best of them can still win.
        logprob, kept = jax.lax.top_k(jnp.where(over, _NOTHING, total), K)
        best, length = logprob[:, 0], i + 1 if penalty <= 0 else G
        active = beams.active & (score(best, length) > finished.score.min(axis=1))
        active &= best > _NOTHING / 2
        tokens, parents = _pick(tokens, kept), _pick(parents, kept)
        return _Beams(i + 1, logprob, tokens, parents, active, finished)

    def step(state: tuple[_Beams, Context]) -> tuple[_Beams, Context]:
        beams, context = state
        parents = jnp.arange(B)[:, None] * K + beams.parents
        token = beams.tokens[:, :, beams.length - 1]
        logp, context = decoder.extend(_take(context, parents.reshape(-1)), token.reshape(-1))
        return advance(beams, logp), context

    logp, context = decoder.prefill(batch, shown)
    B = len(logp)
    nothing = jnp.full((B, K), _NOTHING)
    blank = jnp.full((B, K, G), PAD, jnp.int32)
    start = _Beams(
        length=jnp.int32(0),
        logprob=nothing.at[:, 0].set(0.0),  # all beams are equal: only one counts
        tokens=blank,
        parents=jnp.zeros((B, K), jnp.int32),
        active=jnp.ones(B, bool),
        finished=_Finished(nothing, jnp.zeros((B, K)), blank, jnp.zeros((B, K), bool)),
    )
    rows = jnp.repeat(jnp.arange(B), K)
    state = advance(start, logp[rows]), _take(context, rows)
    searching = lambda s: (s[0].length < G) & jnp.any(s[0].active)  # noqa: E731
    beams, context = jax.lax.while_loop(searching, step, state)
    best = {name: x[:, 0] for name, x in beams.finished._asdict().items()}
    return best | _words(context, K)


def _first_maximum(x: Float[Array, "B V"]) -> Int[Array, " B"]:
    """Return the first index of the largest value of each row: `argmax` by plain reductions.

    A CPU computes several values at once in those, but not in that of pairs of value and index.
    """
    last = x.shape[1] - 1
    index = jnp.where(x == x.max(axis=1, keepdims=True), jnp.arange(last + 1), last)
    return index.min(axis=1).astype(jnp.int32)


def _pick(values: Shaped[Array, "B C ..."], index: Int[Array, "B K"]) -> Shaped[Array, "B K ..."]:
    """Return K of the candidates of each row."""
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _take(context: Context, rows: Int[Array, " BK"]) -> Context:
    """Return the context of other rows."""
    stacked = jax.tree.leaves(context.cache)[0].ndim == 4
    count = len(context.position)

    def of_rows(x: Shaped[Array, "... BN _ _"]) -> Shaped[Array, "... BKN _ _"]:
        split = x.reshape(*x.shape[:-3], count, -1, *x.shape[-2:])
        taken = jnp.take(split, rows, axis=int(stacked))
        return taken.reshape(*x.shape[:-3], -1, *x.shape[-2:])

    cache = jax.tree.map(of_rows, context.cache)
    media = jax.tree.map(lambda x: jnp.take(x, rows, axis=1), context.media)
    per_row = (context.positions, context.visible, context.position, context.words)
    taken = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), per_row)
    positions, visible, position, words = taken
    return Context(cache, positions, visible, position, context.slot, media, words)


def _words(context: Context, beams: int = 1) -> dict[str, jax.Array]:
    """Return the words of a prefix that consists of words, [B, Q]."""
    return {} if context.words is None else {"prefix": context.words[::beams]}
