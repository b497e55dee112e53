"""Beam search with a key-value cache, and `decode`, which runs the search of a configuration.

Legend: B rows, K beams, C candidates of a step, G new tokens, X tokens of examples, E language
model width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from vadapter.data.batch import EOS, PAD, Batch
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.component import Params
from vadapter.models.generate import Context, Decode, ends, extend, greedy, permitted, prefill

_NOTHING = -1e9  # the score of an empty place among the beams; finite, so that sums are no NaN


def decode(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    how: Decode,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
    shown: Float[Array, "1 X E"] | None = None,
) -> dict[str, jax.Array]:
    """Continue each row's text as `how` says; arguments and result as in `greedy`."""
    if how.beams == 1:
        return greedy(model, params, batch, how.max_new, stop, vocab, how.min_new, shown)
    return beam(model, params, batch, how, stop, vocab, shown)


def beam(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    how: Decode,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
    shown: Float[Array, "1 X E"] | None = None,
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

    Args: as `greedy`; how: G, K and the penalty.

    Returns:
      As `greedy`, of the best text of each row, and its `score`, f32[B].
    """
    K, G = how.beams, how.max_new

    def score(logp: jax.Array, length: jax.Array | int) -> jax.Array:
        return logp / jnp.asarray(length, jnp.float32) ** how.length_penalty

    def advance(
        carry: dict[str, Any], logp: Float[Array, "BK V"], i: Int[Array, ""] | int
    ) -> dict[str, Any]:
        """Choose the beams after one more token, from the log probabilities after i new ones."""
        V = logp.shape[-1]
        logp = permitted(logp, i, how.min_new, stop, vocab).reshape(-1, K, V)
        total = jnp.maximum(carry["logp"][:, :, None] + logp, 2 * _NOTHING)
        # Even if every stop token of every beam is among them, K of the candidates do not end.
        best, index = jax.lax.top_k(total.reshape(-1, K * V), min((1 + len(stop)) * K, K * V))
        parents, token = index // V, (index % V).astype(jnp.int32)
        tokens = _pick(carry["tokens"], parents).at[:, :, i].set(token)
        done = ends(token, stop) | (i == G - 1)

        finishes = done & (jnp.arange(done.shape[1]) < K)[None, :] & (best > _NOTHING / 2)
        finishes &= carry["active"][:, None]
        candidates = {
            "score": jnp.where(finishes, score(best, i + 1), _NOTHING),
            "logprob": best,
            "texts": tokens,
            "ended": ends(token, stop),
        }
        merged = {k: jnp.concatenate([carry[k], v], axis=1) for k, v in candidates.items()}
        _, kept = jax.lax.top_k(merged["score"], K)
        finished = {k: _pick(v, kept) for k, v in merged.items()}

        running, kept = jax.lax.top_k(jnp.where(done, _NOTHING, best), K)
        length = i + 1 if how.length_penalty <= 0 else G
        can_win = score(running[:, 0], length) > finished["score"].min(axis=1)
        return finished | {
            "i": jnp.int32(i + 1),
            "logp": running,
            "tokens": _pick(tokens, kept),
            "token": _pick(token, kept),
            "parents": _pick(parents, kept),
            "active": carry["active"] & can_win & (running[:, 0] > _NOTHING / 2),
        }

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        beams = jnp.arange(B)[:, None] * K + carry["parents"]
        context = _take(carry["context"], beams.reshape(-1))
        logp, context = extend(model, params, context, carry["token"].reshape(-1))
        return advance(carry, logp, carry["i"]) | {"context": context}

    logp, context = prefill(model, params, batch, G, shown)
    B = len(logp)
    rows = jnp.repeat(jnp.arange(B), K)
    blank = jnp.full((B, K, G), PAD, jnp.int32)
    start = {
        "logp": jnp.full((B, K), _NOTHING)
        .at[:, 0]
        .set(0.0),  # all beams are equal: only one counts
        "tokens": blank,
        "texts": blank,
        "score": jnp.full((B, K), _NOTHING),
        "logprob": jnp.zeros((B, K)),
        "ended": jnp.zeros((B, K), bool),
        "active": jnp.ones(B, bool),  # rows whose search is not over
    }
    carry = advance(start, logp[rows], 0) | {"context": _take(context, rows)}
    out = jax.lax.while_loop(lambda c: (c["i"] < G) & jnp.any(c["active"]), body, carry)
    names = {"tokens": "texts", "ended": "ended", "logprob": "logprob", "score": "score"}
    return {name: out[key][:, 0] for name, key in names.items()}


def _pick(values: Shaped[Array, "B C ..."], index: Int[Array, "B K"]) -> Shaped[Array, "B K ..."]:
    """Return K of the candidates of each row."""
    index = index.reshape(*index.shape, *[1] * (values.ndim - 2))
    return jnp.take_along_axis(values, index, axis=1)


def _take(context: Context, rows: Int[Array, " BK"]) -> Context:
    """Return the context of other rows."""
    return Context(
        cache=jax.tree.map(lambda x: jnp.take(x, rows, axis=1), context.cache),
        positions=jnp.take(context.positions, rows, axis=0),
        visible=jnp.take(context.visible, rows, axis=0),
        position=jnp.take(context.position, rows, axis=0),
        slot=context.slot,
    )
