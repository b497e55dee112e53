"""Greedy decoding with a key-value cache: one prefill, then one token at a time.

Legend: B batch, P prompt tokens, Q queries, T text tokens, S cache slots, G new tokens,
V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vadapter.data.batch import EOS, PAD
from vadapter.models.lm import LM, empty_cache
from vadapter.models.transformer import text_mask
from vadapter.models.vadapter import Batch, Params, VAdapter


def greedy(
    model: VAdapter,
    params: Params,
    batch: Batch,
    max_new: int,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
) -> dict[str, jax.Array]:
    """The most probable continuation of each row's text, token by token.

    Rows may have texts of different lengths: padding is masked and takes no position. Decoding
    stops early once every row has ended.

    Args:
      model: the model; params: of every component.
      batch: `frames` or `features` (none for text only), `prompt`, and the text to continue in
        `tokens`, `segments`, `positions` (one segment a row, at least one token).
      max_new: G, at most this many tokens, the end token included.
      stop: the ids that end a text, `stop_ids` of its tokenizer.
      vocab: only ids below it are produced, `vocab_size` of the tokenizer: the rows of a public
        model that are mere padding have logits, too. None: all of them.

    Returns:
      tokens: i32[B, G], PAD after the end; ended: bool[B], whether the row produced one of `stop`;
      logprob: f32[B], sum over the produced tokens.
    """
    visual = model.encode(params, batch)
    prefix = None if visual is None else model.prefix(params, visual)
    lm = model.modules[model.lm]
    assert isinstance(lm, LM)
    x, segments, positions = model.layout(params, prefix, batch)
    B, S0, _ = x.shape

    def run(x, positions, mask, places, cache, index):
        states, cache = lm.apply(
            {"params": params[model.lm]}, x, method="hidden", positions=positions, mask=mask,
            key_positions=places, cache=cache, index=index,
        )  # fmt: skip
        return states, cache

    def ends(token):
        return (token[:, None] == jnp.array(stop, jnp.int32)[None, :]).any(axis=1)

    def choose(states):  # [B, E] -> token, its log probability
        logp = jax.nn.log_softmax(model.logits(params, states))
        token = jnp.argmax(logp[:, :vocab], axis=-1).astype(jnp.int32)
        return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]

    cache = empty_cache(lm.config, B, S0 + max_new, lm.dtype)
    mask = jnp.pad(text_mask(segments), ((0, 0), (0, 0), (0, max_new)))
    places = jnp.pad(positions, ((0, 0), (0, max_new)))
    states, cache = run(x, positions, mask, places, cache, 0)
    last = jnp.argmax(jnp.where(segments > 0, jnp.arange(S0)[None, :], -1), axis=1)
    token, logp = choose(jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0])
    position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0]
    visible = jnp.pad(segments != 0, ((0, 0), (0, max_new)))

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        i, token, ended = carry["i"], carry["token"], carry["ended"]
        slot = S0 + i
        position = carry["position"] + 1
        here = (jnp.arange(S0 + max_new) == slot)[None, :]
        visible = carry["visible"] | here
        places = jnp.where(here, position[:, None], carry["places"])
        embedded = lm.apply({"params": params[model.lm]}, token[:, None], method="embed")
        states, cache = run(
            embedded, position[:, None], visible[:, None, :], places, carry["cache"], slot
        )
        token, logp = choose(states[:, 0])
        token = jnp.where(ended, PAD, token)
        return {
            "i": i + 1,
            "token": token,
            "tokens": jax.lax.dynamic_update_slice(carry["tokens"], token[:, None], (0, i + 1)),
            "logprob": carry["logprob"] + jnp.where(ended, 0.0, logp),
            "ended": ended | ends(token),
            "position": position,
            "visible": visible,
            "places": places,
            "cache": cache,
        }

    tokens = jnp.full((B, max_new), PAD, jnp.int32).at[:, 0].set(token)
    out = jax.lax.while_loop(
        lambda c: (c["i"] < max_new - 1) & ~jnp.all(c["ended"]),
        body,
        {
            "i": jnp.int32(0), "token": token, "tokens": tokens, "logprob": logp,
            "ended": ends(token), "position": position, "visible": visible, "places": places,
            "cache": cache,
        },
    )  # fmt: skip
    return {k: out[k] for k in ("tokens", "ended", "logprob")}
