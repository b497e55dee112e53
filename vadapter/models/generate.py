"""Greedy decoding with a key-value cache: one prefill, then one token at a time.

`prefill` and `extend` are what every search is made of; beam search is in `models.beam`.

Legend: B rows, P prompt tokens, Q queries, T text tokens, S cache slots, G new tokens,
E language model width, V vocabulary.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vadapter.data.batch import EOS, PAD
from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.lm import LM, empty_cache
from vadapter.models.transformer import text_mask


@dataclasses.dataclass(frozen=True)
class Decode:
    """How a text is written.

    Attributes:
      max_new: longest text in tokens, the end token included.
      min_new: a text does not end before it has so many tokens.
      beams: width of the beam search; 1: greedy.
      length_penalty: of the beam search, see `beam.beam`.
    """

    max_new: int = 32
    min_new: int = 0
    beams: int = 1
    length_penalty: float = 1.0


class Context(NamedTuple):
    """What the language model has read, with room for what it will write.

    Attributes:
      cache: its keys and values, [L, B, S, …] each.
      places: i32[B, S], the position of each slot.
      visible: bool[B, S], slots that are read and no padding.
      position: i32[B], of the last token of the text.
      slot: i32[], the next free one.
    """

    cache: Any
    places: jax.Array
    visible: jax.Array
    position: jax.Array
    slot: jax.Array


def _lm(model: AdapterModel) -> LM:
    lm = model.modules[model.lm]
    assert isinstance(lm, LM)
    return lm


def prefill(
    model: AdapterModel, params: Params, batch: Batch, room: int, shown: jax.Array | None = None
) -> tuple[jax.Array, Context]:
    """Reads prompt, image and text of every row.

    Args:
      batch: see `greedy`.
      room: slots for new tokens.
      shown: [1, S, E] embeddings between every prompt and its image, such as other images with
        their texts; None: nothing.

    Returns:
      f32[B, V] log probabilities of the token that follows, and the context.
    """
    lm, visual = _lm(model), model.encode(params, batch)
    prefix = None if visual is None else model.prefix(params, visual)
    if shown is not None:
        assert prefix is not None
        every = jnp.broadcast_to(shown, (len(prefix), *shown.shape[1:]))
        prefix = jnp.concatenate([every.astype(prefix.dtype), prefix], axis=1)
    x, segments, positions = model.layout(params, prefix, batch)
    B, S, _ = x.shape
    cache = empty_cache(lm.config, B, S + room, lm.dtype)
    mask = jnp.pad(text_mask(segments), ((0, 0), (0, 0), (0, room)))
    places = jnp.pad(positions, ((0, 0), (0, room)))
    states, cache = lm.apply(
        {"params": params[model.lm]}, x, method="hidden", positions=positions, mask=mask,
        key_positions=places, cache=cache, index=0,
    )  # fmt: skip
    last = jnp.argmax(jnp.where(segments > 0, jnp.arange(S)[None, :], -1), axis=1)
    states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0]
    visible = jnp.pad(segments != 0, ((0, 0), (0, room)))
    logp = _log_probs(model, params, states)
    return logp, Context(cache, places, visible, position, jnp.int32(S))


def extend(
    model: AdapterModel, params: Params, context: Context, token: jax.Array
) -> tuple[jax.Array, Context]:
    """Reads one more token of every row, i32[B]; returns as `prefill`."""
    lm, slot = _lm(model), context.slot
    position = context.position + 1
    here = (jnp.arange(context.places.shape[1]) == slot)[None, :]
    visible = context.visible | here
    places = jnp.where(here, position[:, None], context.places)
    embedded = lm.apply({"params": params[model.lm]}, token[:, None], method="embed")
    states, cache = lm.apply(
        {"params": params[model.lm]}, embedded, method="hidden", positions=position[:, None],
        mask=visible[:, None, :], key_positions=places, cache=context.cache, index=slot,
    )  # fmt: skip
    logp = _log_probs(model, params, states[:, 0])
    return logp, Context(cache, places, visible, position, slot + 1)


def _log_probs(model: AdapterModel, params: Params, states: jax.Array) -> jax.Array:
    """[B, E] -> f32[B, V]."""
    return jax.nn.log_softmax(model.logits(params, states).astype(jnp.float32))


def ends(token: jax.Array, stop: Sequence[int]) -> jax.Array:
    """Whether each id ends a text."""
    one_of = jnp.array(stop, jnp.int32).reshape(*[1] * token.ndim, -1)
    return (token[..., None] == one_of).any(axis=-1)


def permitted(
    logp: jax.Array, length: jax.Array | int, min_new: int, stop: Sequence[int], vocab: int | None
) -> jax.Array:
    """f32[B, V] with -inf for ids that must not be the token behind `length` new ones."""
    ids = jnp.arange(logp.shape[-1])
    barred = ends(ids, stop) & (length + 1 < min_new)
    if vocab is not None:
        barred |= ids >= vocab
    return jnp.where(barred[None, :], -jnp.inf, logp)


def greedy(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    max_new: int,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
    min_new: int = 0,
    shown: jax.Array | None = None,
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
      min_new: the end token is not produced before it is the one of this number.
      shown: see `prefill`.

    Returns:
      tokens: i32[B, G], PAD after the end; ended: bool[B], whether the row produced one of `stop`;
      logprob: f32[B], sum over the produced tokens.
    """

    def choose(logp, length):
        token = jnp.argmax(permitted(logp, length, min_new, stop, vocab), -1).astype(jnp.int32)
        return token, jnp.take_along_axis(logp, token[:, None], axis=1)[:, 0]

    def body(carry: dict[str, Any]) -> dict[str, Any]:
        i, ended = carry["i"] + 1, carry["ended"]
        logp, context = extend(model, params, carry["context"], carry["token"])
        token, logp = choose(logp, i)
        token = jnp.where(ended, PAD, token)
        return {
            "i": i,
            "token": token,
            "tokens": jax.lax.dynamic_update_slice(carry["tokens"], token[:, None], (0, i)),
            "logprob": carry["logprob"] + jnp.where(ended, 0.0, logp),
            "ended": ended | ends(token, stop),
            "context": context,
        }

    logp, context = prefill(model, params, batch, max_new, shown)
    token, logp = choose(logp, 0)
    tokens = jnp.full((len(token), max_new), PAD, jnp.int32).at[:, 0].set(token)
    out = jax.lax.while_loop(
        lambda c: (c["i"] < max_new - 1) & ~jnp.all(c["ended"]),
        body,
        {
            "i": jnp.int32(0), "token": token, "tokens": tokens, "logprob": logp,
            "ended": ends(token, stop), "context": context,
        },
    )  # fmt: skip
    return {k: out[k] for k in ("tokens", "ended", "logprob")}
