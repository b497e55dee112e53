"""Beam search with a key-value cache, and the one way to every search: `decode`.

Legend: B rows, K beams, C candidates of a step, S cache slots, G new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vadapter.data.batch import EOS, PAD
from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.generate import Context, Decode, ends, extend, greedy, permitted, prefill

_NOTHING = -1e9  # the score of a text that is none


def decode(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    how: Decode,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
    shown: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """Continues each row's text as `how` says; arguments and result as in `greedy`."""
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
    shown: jax.Array | None = None,
) -> dict[str, jax.Array]:
    """The best of the texts that K beams find.

    A finished text is worth its log probability divided by its length in tokens, the end token
    among them, to the power of the length penalty: 0 sums, 1 averages, more favors longer texts.
    Every step the K (1 + stops) best continuations are looked at; those among the first K that end
    are kept if they belong to the K best finished ones, and the K best that do not end go on. The
    search is over when no text that goes on could still beat the worst of K finished ones: with a
    penalty above 0 that is judged at the full length, without one at the next.

    This is the search of transformers (5) with `early_stopping="never"`, `num_beams`,
    `length_penalty`, `max_new_tokens` and `min_new_tokens` of the same values.

    Args: as `greedy`; how: G, K and the penalty.

    Returns:
      As `greedy`, of the best text of each row, and `score`: f32[B], what it is worth.
    """
    K, G = how.beams, how.max_new

    def pick(values: jax.Array, at: jax.Array) -> jax.Array:  # [B, C, …], [B, K] -> [B, K, …]
        at = at.reshape(*at.shape, *[1] * (values.ndim - 2))
        return jnp.take_along_axis(values, at, axis=1)

    def worth(logp: jax.Array, length: jax.Array | int) -> jax.Array:
        return logp / jnp.asarray(length, jnp.float32) ** how.length_penalty

    def advance(carry: dict[str, Any], logp: jax.Array, i: jax.Array | int) -> dict[str, Any]:
        """One step: logp f32[B·K, V] of the tokens behind i new ones."""
        V = logp.shape[-1]
        logp = permitted(logp, i, how.min_new, stop, vocab).reshape(-1, K, V)
        total = jnp.maximum(carry["logp"][:, :, None] + logp, 2 * _NOTHING)
        best, at = jax.lax.top_k(total.reshape(-1, K * V), min((1 + len(stop)) * K, K * V))
        parents, token = at // V, (at % V).astype(jnp.int32)
        tokens = pick(carry["tokens"], parents).at[:, :, i].set(token)
        done = ends(token, stop) | (i == G - 1)

        worthy = done & (jnp.arange(done.shape[1]) < K)[None, :] & (best > _NOTHING / 2)
        worthy &= carry["hope"][:, None]
        found = {
            "score": jnp.where(worthy, worth(best, i + 1), _NOTHING),
            "logprob": best,
            "texts": tokens,
            "ended": ends(token, stop),
        }
        merged = {k: jnp.concatenate([carry[k], v], axis=1) for k, v in found.items()}
        _, kept = jax.lax.top_k(merged["score"], K)
        finished = {k: pick(v, kept) for k, v in merged.items()}

        running, on = jax.lax.top_k(jnp.where(done, _NOTHING, best), K)
        reach = i + 1 if how.length_penalty <= 0 else G
        hope = worth(running[:, 0], reach) > finished["score"].min(axis=1)
        return finished | {
            "i": jnp.int32(i + 1),
            "logp": running,
            "tokens": pick(tokens, on),
            "token": pick(token, on),
            "parents": pick(parents, on),
            "hope": carry["hope"] & hope & (running[:, 0] > _NOTHING / 2),
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
        "logp": jnp.full((B, K), _NOTHING).at[:, 0].set(0.0),  # the beams are still all alike
        "tokens": blank,
        "texts": blank,
        "score": jnp.full((B, K), _NOTHING),
        "logprob": jnp.zeros((B, K)),
        "ended": jnp.zeros((B, K), bool),
        "hope": jnp.ones(B, bool),
    }
    carry = advance(start, logp[rows], 0) | {"context": _take(context, rows)}
    out = jax.lax.while_loop(lambda c: (c["i"] < G) & jnp.any(c["hope"]), body, carry)
    names = {"tokens": "texts", "ended": "ended", "logprob": "logprob", "score": "score"}
    return {name: out[key][:, 0] for name, key in names.items()}


def _take(context: Context, rows: jax.Array) -> Context:
    """The context of other rows."""
    take = lambda x: jnp.take(x, rows, axis=0)  # noqa: E731
    return Context(
        cache=jax.tree.map(lambda x: jnp.take(x, rows, axis=1), context.cache),
        places=take(context.places),
        visible=take(context.visible),
        position=take(context.position),
        slot=context.slot,
    )
