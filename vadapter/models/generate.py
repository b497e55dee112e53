"""Greedy decoding with a key-value cache: one prefill, then one token at a time.

Every search consists of `prefill` and `extend`; beam search is in `models.beam`.

Legend: B rows, S cache slots, G new tokens, X tokens of examples, L layers, N KV heads, K head dim,
E language model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vadapter.data.batch import EOS, PAD, Batch
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.component import Params, apply_component
from vadapter.models.lm import LM, empty_cache
from vadapter.models.transformer import Cache, text_mask


@dataclasses.dataclass(frozen=True)
class Decode:
    """How text is generated.

    Attributes:
      max_new: longest text in tokens, the end token included.
      min_new: shortest text in tokens, the end token included.
      beams: width of the beam search; 1: greedy.
      length_penalty: of the beam search, see `beam.beam`.
    """

    max_new: int = 32
    min_new: int = 0
    beams: int = 1
    length_penalty: float = 1.0


class Context(NamedTuple):
    """What the language model has read, with free slots for what it generates.

    Attributes:
      cache: keys and values.
      positions: of the slots.
      visible: slots that are filled, and not with padding.
      position: of the last token of each text.
      slot: the next free slot.
    """

    cache: Cache
    positions: Int[Array, "B S"]
    visible: Bool[Array, "B S"]
    position: Int[Array, " B"]
    slot: Int[Array, ""]


def _lm(model: AdapterModel) -> LM:
    lm = model.modules[model.lm]
    assert isinstance(lm, LM)
    return lm


def prefill(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    room: int,
    shown: Float[Array, "1 X E"] | None = None,
) -> tuple[Float[Array, "B V"], Context]:
    """Read prompt, image and text of every row.

    Args:
      model, params, batch: see `greedy`.
      room: slots for new tokens.
      shown: embeddings between every prompt and its image: few-shot examples, or None.

    Returns:
      Log probabilities of the next token, and the context.
    """
    lm, visual = _lm(model), model.encode(params, batch)
    prefix = None if visual is None else model.prefix(params, visual)
    if shown is not None:
        assert prefix is not None
        examples = jnp.broadcast_to(shown, (len(prefix), *shown.shape[1:]))
        prefix = jnp.concatenate([examples.astype(prefix.dtype), prefix], axis=1)
    x, segments, positions = model.layout(params, prefix, batch)
    B, S, _ = x.shape
    cache = empty_cache(lm.config, B, S + room, lm.dtype)
    mask = jnp.pad(text_mask(segments), ((0, 0), (0, 0), (0, room)))
    slots = jnp.pad(positions, ((0, 0), (0, room)))
    states, cache = apply_component(
        model.modules,
        params,
        model.lm,
        x,
        method="hidden",
        positions=positions,
        mask=mask,
        key_positions=slots,
        cache=cache,
        index=0,
    )
    # Texts of different lengths are padded at the end: each row continues after its own last token.
    last = jnp.argmax(jnp.where(segments > 0, jnp.arange(S)[None, :], -1), axis=1)
    states = jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
    position = jnp.take_along_axis(positions, last[:, None], axis=1)[:, 0]
    visible = jnp.pad(segments != 0, ((0, 0), (0, room)))
    logp = _log_probs(model, params, states)
    return logp, Context(cache, slots, visible, position, jnp.int32(S))


def extend(
    model: AdapterModel, params: Params, context: Context, token: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Context]:
    """Read one more token of every row; return the same as `prefill`."""
    position, slot = context.position + 1, context.slot
    is_new = (jnp.arange(context.positions.shape[1]) == slot)[None, :]
    visible = context.visible | is_new
    slots = jnp.where(is_new, position[:, None], context.positions)
    apply = functools.partial(apply_component, model.modules, params, model.lm)
    embedded = apply(token[:, None], method="embed")
    states, cache = apply(
        embedded,
        method="hidden",
        positions=position[:, None],
        mask=visible[:, None, :],
        key_positions=slots,
        cache=context.cache,
        index=slot,
    )
    logp = _log_probs(model, params, states[:, 0])
    return logp, Context(cache, slots, visible, position, slot + 1)


def _log_probs(
    model: AdapterModel, params: Params, states: Float[Array, "B E"]
) -> Float[Array, "B V"]:
    return jax.nn.log_softmax(model.logits(params, states).astype(jnp.float32))


def ends(token: Int[Array, "*n"], stop: Sequence[int]) -> Bool[Array, "*n"]:
    """Return whether each id ends a text."""
    stops = jnp.array(stop, jnp.int32).reshape(*[1] * token.ndim, -1)
    return (token[..., None] == stops).any(axis=-1)


def permitted(
    logp: Float[Array, "B V"],
    length: Int[Array, ""] | int,
    min_new: int,
    stop: Sequence[int],
    vocab: int | None,
) -> Float[Array, "B V"]:
    """Return `logp` with -inf for ids that must not follow `length` new tokens."""
    ids = jnp.arange(logp.shape[-1])
    forbidden = ends(ids, stop) & (length + 1 < min_new)
    if vocab is not None:
        forbidden |= ids >= vocab
    return jnp.where(forbidden[None, :], -jnp.inf, logp)


def greedy(
    model: AdapterModel,
    params: Params,
    batch: Batch,
    max_new: int,
    stop: Sequence[int] = (EOS,),
    vocab: int | None = None,
    min_new: int = 0,
    shown: Float[Array, "1 X E"] | None = None,
) -> dict[str, jax.Array]:
    """Continue each row's text by the most probable next token, one after the other.

    Rows may have texts of different lengths: padding is masked and takes no position. Decoding
    stops early once every row has ended.

    Args:
      model: the model.
      params: of every component.
      batch: `frames` or `features` (none for text only), `prompt`, and the text to continue in
        `tokens`, `segments`, `positions` (one segment a row, at least one token).
      max_new: G, at most this many tokens, the end token included.
      stop: ids that end a text: `stop_ids` of the tokenizer.
      vocab: generate only ids below it: `vocab_size` of the tokenizer, as the padding rows of a
        public model's embedding have logits, too. None: all ids.
      min_new: at least this many tokens, the end token included.
      shown: see `prefill`.

    Returns:
      tokens: i32[B, G], PAD after the end; ended: bool[B], whether the row ends with one of `stop`;
      logprob: f32[B], sum over the generated tokens.
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
            "i": jnp.int32(0),
            "token": token,
            "tokens": tokens,
            "logprob": logp,
            "ended": ends(token, stop),
            "context": context,
        },
    )
    return {k: out[k] for k in ("tokens", "ended", "logprob")}
