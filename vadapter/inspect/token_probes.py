"""Probes of an encoder's tokens: what a linear layer, and one attention layer, can read of them.

A fact that neither finds in the tokens of a frozen encoder is hardly there for an adapter.

  linear     A logistic layer. It reads the token under the center of a thing for its color, shape
             and size; all tokens of an image for the number of things and for whether each cell
             of a 3x3 grid has one (place); all tokens of all frames for the motion of the only
             thing of a color.
  attention  One layer of cross-attention, which reads all tokens of all frames, with a learned
             vector for each position of each frame: one query for each color says whether there is
             a thing of that color, and its shape, size and place, or motion; one counts. All
             colors of a scene have to be right. What is read of a thing is interpreted alike for
             all colors.

Motion is learned from clips in both directions: reversed frames are the reversed motion. Tokens are
scaled to a mean of 0 and a variance of 1 by channel, over the images. Probes are trained with AdamW
on one set of scenes and scored on another.

Legend: n scenes or things, F frames, N visual tokens a frame, T tokens that are read, D encoder
width, H heads, Q queries, S slots (such as colors), K classes, B batch.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from vadapter.data.scenes.world import MOTIONS
from vadapter.distributed.compile import jit
from vadapter.inspect.scene_labels import CLASSES, UNKNOWN, Labels
from vadapter.metrics.bootstrap import Sample

HEADS, VALUES = 4, 32  # of the attention probe; VALUES for each head
Params = dict[str, Any]
Logits = dict[str, Float[Array, "B S K"]]
Targets = Mapping[str, Int[np.ndarray, "n S"]]  # UNKNOWN where there is no class


class Tokens(NamedTuple):
    """The tokens of scenes, float16[n,F,N,D], with their labels."""

    tokens: np.ndarray
    labels: Labels


class Found(NamedTuple):
    """What a probe gets right of held-out scenes, beside what the most frequent class gets."""

    sample: Sample
    majority: float


class Schedule(NamedTuple):
    """How long a probe is trained."""

    steps: int
    batch: int
    lr: float
    decay: float = 1e-2  # weight decay


LINEAR = {
    "things": Schedule(600, 256, 1e-2, 1e-3),
    "image": Schedule(1000, 256, 1e-3, 1.0),
    "clip": Schedule(200, 128, 3e-4, 1e-1),
}
ATTENTION = {"image": Schedule(1500, 64, 3e-3), "clip": Schedule(1200, 32, 5e-3, 1e-1)}
# The class of a motion when the frames are reversed.
_REVERSED = np.array([
    list(MOTIONS.values()).index((-dx, -dy, -dr)) for dx, dy, dr in MOTIONS.values()
])  # fmt: skip
_CHUNK = 256  # scenes that are scaled, or predicted, at a time

Scale = tuple[np.ndarray, np.ndarray]  # mean and standard deviation of each channel, f32[D]


def scale_of(tokens: np.ndarray) -> Scale:
    """Return mean and standard deviation by channel, of at most about 2^16 tokens of each."""
    every = max(1, tokens[..., 0].size // 2**16)
    flat = tokens.reshape(-1, tokens.shape[-1])[::every].astype(np.float32)
    return flat.mean(0), flat.std(0) + 1e-6


def rescale(tokens: np.ndarray, scale: Scale) -> None:
    """Scale tokens float16[n,F,N,D] in place."""
    mean, std = scale
    for start in range(0, len(tokens), _CHUNK):
        rows = slice(start, start + _CHUNK)
        tokens[rows] = (tokens[rows].astype(np.float32) - mean) / std


# -- what is read ----------------------------------------------------------------------------------


def linear_image(train: Tokens, held: Tokens, grid: tuple[int, ...]) -> dict[str, Found]:
    """Return what linear layers read of the tokens of images: color, shape, size, place, count.

    Without a grid of tokens there is none under the center of a thing: only place and count.
    """
    found: dict[str, Found] = {}
    if grid:
        at_train, at_held = _under(train, grid), _under(held, grid)
        facts = ("color", "shape", "size")
        to = {name: _columns(each.labels.things, facts)
              for name, each in (("train", train), ("held", held))}  # fmt: skip
        logits = _fit_linear(at_train, to["train"], at_held, LINEAR["things"])
        scenes = held.labels.things["scene"]
        found |= {f: _found(logits[f], to["train"][f], to["held"][f], scenes) for f in facts}
    to_train, to_held = (
        {"cells": each.labels.cells, "count": each.labels.count[:, None]} for each in (train, held)
    )
    logits = _fit_linear(train.tokens, to_train, held.tokens, LINEAR["image"])
    names = {"place": "cells", "count": "count"}
    return found | {f: _found(logits[k], to_train[k], to_held[k]) for f, k in names.items()}


def linear_clip(train: Tokens, held: Tokens) -> dict[str, Found]:
    """Return what a linear layer reads of the tokens of clips: motion."""
    to_train, to_held = ({"motion": x.labels.of_colors["motion"]} for x in (train, held))
    logits = _fit_linear(train.tokens, to_train, held.tokens, LINEAR["clip"])
    return {"motion": _found(logits["motion"], to_train["motion"], to_held["motion"])}


def attention(
    train: Tokens, held: Tokens, grid: tuple[int, ...], begin: Params | None = None
) -> tuple[dict[str, Found], Params]:
    """Return what one attention layer reads of the tokens of images, or of clips: motion.

    Also returned are its parameters, for `begin`: the queries of clips begin with those of images,
    which have found where a color is.
    """
    clips = "motion" in train.labels.of_colors
    to_train, to_held = (
        x.labels.of_colors | ({} if clips else {"count": x.labels.count[:, None]})
        for x in (train, held)
    )
    slots = {name: (to.shape[1], CLASSES[name]) for name, to in to_train.items()}
    params = _attention_params(train.tokens.shape[1:], grid, slots)
    if begin is not None:
        queries = params["queries"].shape[1]
        params["queries"] = begin["queries"][:, :queries]
    schedule = ATTENTION["clip" if clips else "image"]
    logits, params = _fit(_attend, params, train.tokens, to_train, held.tokens, schedule)
    facts = {name: _found(logits[name], to_train[name], to_held[name])
             for name in to_train if name != "present"}  # fmt: skip
    if clips:
        return facts, params
    right = (logits["present"].argmax(-1) == to_held["present"]).all(1)
    codes, count = np.unique(to_train["present"], axis=0, return_counts=True)
    usual = (to_held["present"] == codes[count.argmax()]).all(1)
    scenes = range(len(right))
    color = Found(
        Sample.of_means(scenes, scenes, right.astype(float).tolist()), float(usual.mean())
    )
    return {"color": color, **facts}, params


def _under(scenes: Tokens, grid: tuple[int, ...]) -> np.ndarray:
    """Return the token under the center of each thing of images, [m,1,1,D]."""
    rows, columns = grid
    x, y = scenes.labels.centers.T
    row, column = (
        np.clip((at * count).astype(int), 0, count - 1) for at, count in ((y, rows), (x, columns))
    )
    leading = scenes.tokens.shape[2] - rows * columns  # class token and registers
    index = leading + row * columns + column
    return scenes.tokens[scenes.labels.things["scene"], 0, index][:, None, None]


def _columns(things: Mapping[str, np.ndarray], facts: tuple[str, ...]) -> dict[str, np.ndarray]:
    return {fact: things[fact][:, None] for fact in facts}


def _found(
    logits: np.ndarray, train: np.ndarray, held: np.ndarray, scenes: np.ndarray | None = None
) -> Found:
    """Return how often the likeliest class is right, by item and scene, f32[n,S,K] to labels."""
    known = held != UNKNOWN
    right = (logits.argmax(-1) == held)[known].astype(float)
    majority = np.bincount(train[train != UNKNOWN]).argmax()
    owners = np.arange(len(held)) if scenes is None else scenes
    clusters = np.broadcast_to(owners[:, None], held.shape)[known]
    sample = Sample.of_means(range(len(right)), clusters.tolist(), right.tolist())
    return Found(sample, float((held[known] == majority).mean()))


# -- the layers ------------------------------------------------------------------------------------


def _fit_linear(
    train: np.ndarray, to: Targets, held: np.ndarray, schedule: Schedule
) -> dict[str, np.ndarray]:
    width = math.prod(train.shape[1:])
    params = {
        name: {
            "w": jnp.zeros((width, each.shape[1], CLASSES[name])),
            "b": jnp.zeros((each.shape[1], CLASSES[name])),
        }
        for name, each in to.items()
    }
    return _fit(_project, params, train, to, held, schedule)[0]


def _project(params: Params, tokens: Float[Array, "B F N D"]) -> Logits:
    """Return the logits of logistic layers, which read all tokens that they are given."""
    x = tokens.reshape(len(tokens), -1)
    return {
        name: jnp.einsum("bd,dsk->bsk", x, each["w"]) + each["b"][None]
        for name, each in params.items()
    }


def _attention_params(
    shape: tuple[int, ...], grid: tuple[int, ...], slots: Mapping[str, tuple[int, int]]
) -> Params:
    """Return random parameters; `shape` is (F, N, D), `slots` the (S, K) of each fact.

    Of clips, the heads begin with the first frames, with all, and with the last.
    """
    frames, count, width = shape
    queries = sum({s for s, _ in slots.values()})  # one of each color, and one that counts
    keys = iter(jax.random.split(jax.random.key(0), 3 + len(slots)))

    def normal(std: float, *dims: int) -> jax.Array:
        return std * jax.random.normal(next(keys), dims)

    def own(name: str, slots: int) -> tuple[int, ...]:
        """Whether there is a thing depends on its color; what is read of it does not."""
        return (slots,) if name == "present" else ()

    where = _where(frames, count, grid)
    slopes = jnp.outer(jnp.linspace(-6, 6, HEADS), _phases(frames))[..., None]
    return {
        "queries": normal(width**-0.5, HEADS, queries, width),
        "looks": jnp.broadcast_to(slopes, (HEADS, frames, count)).reshape(HEADS, 1, -1),
        "values": normal(width**-0.5, HEADS, width, VALUES),
        "places": jnp.einsum(
            "tw,hwv->htv", where, normal(where.shape[1] ** -0.5, HEADS, where.shape[1], VALUES)
        ),
        "facts": {
            name: {
                "w": normal((HEADS * VALUES) ** -0.5, *own(name, s), HEADS * VALUES, k),
                "b": jnp.zeros((s, k)),
            }
            for name, (s, k) in slots.items()
        },
    }


def _phases(frames: int) -> Float[Array, " F"]:
    return (jnp.arange(frames) + 0.5) / frames - 0.5


def _where(frames: int, count: int, grid: tuple[int, ...]) -> Float[Array, "T _"]:
    """Return what the learned vectors of positions and frames begin with, of variance about 1.

    They are low frequencies of row and column, alone and times the time: neighbors are alike, and
    a mean of them over frames says which way a thing went.
    """
    rows, columns = grid or (1, count)
    y, x = (
        jnp.cos(jnp.pi * jnp.arange(4)[:, None] * (jnp.arange(n)[None] + 0.5) / n)
        for n in (rows, columns)
    )
    of_frame = jnp.einsum("jr,kc->rcjk", y, x).reshape(rows * columns, -1)
    of_frame = jnp.pad(of_frame, ((count - rows * columns, 0), (0, 0)))  # class token, registers
    times = jnp.stack([jnp.ones(frames), 3 * _phases(frames)])
    return jnp.einsum("kf,nw->fnkw", times, of_frame).reshape(frames * count, -1)


def _attend(params: Params, tokens: Float[Array, "B F N D"]) -> Logits:
    """Return the logits of one layer of cross-attention.

    A head's query is the product of query and key projection, so that keys are the tokens.
    Of the vectors of a position only the products with queries and values are learned: what a head
    looks at before it knows any token (`looks`), and what is read there beside the token
    (`places`).
    """
    x = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    weights = jax.nn.softmax(
        jnp.einsum("btd,hqd->bhqt", x, params["queries"]) + params["looks"][None]
    )
    read = jnp.einsum("bhqt,btd->bhqd", weights, x)
    y = jnp.einsum("bhqd,hdv->bqhv", read, params["values"])
    y += jnp.einsum("bhqt,htv->bqhv", weights, params["places"])
    y = jax.nn.standardize(y.reshape(*y.shape[:2], -1))
    logits = {}
    for name, each in params["facts"].items():
        count = len(each["b"])
        own = y[:, :count] if count > 1 else y[:, -1:]  # the last query counts
        product = "bsv,svk->bsk" if each["w"].ndim == 3 else "bsv,vk->bsk"
        logits[name] = jnp.einsum(product, own, each["w"]) + each["b"][None]
    return logits


# -- training --------------------------------------------------------------------------------------


def _loss(logits: Logits, to: Mapping[str, Int[Array, "B S"]]) -> jax.Array:
    """Return the sum over facts of the mean cross entropy of the labels that exist."""
    total = jnp.zeros(())
    for name, each in logits.items():
        known = to[name] != UNKNOWN
        nats = optax.softmax_cross_entropy_with_integer_labels(each, jnp.where(known, to[name], 0))
        total += (nats * known).sum() / jnp.maximum(known.sum(), 1)
    return total


def _fit(
    apply: Callable[[Params, Any], Logits], params: Params, train: np.ndarray, to: Targets,
    held: np.ndarray, schedule: Schedule,
) -> tuple[dict[str, np.ndarray], Params]:  # fmt: skip
    """Train a probe; return its logits of held-out tokens by fact, f32[n,S,K], and parameters."""
    rate = optax.cosine_decay_schedule(schedule.lr, schedule.steps)
    tx = optax.adamw(rate, weight_decay=schedule.decay)

    @functools.partial(jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, tokens: Any, to: Any) -> Any:
        def loss(params: Params) -> jax.Array:
            return _loss(apply(params, tokens.astype(jnp.float32)), to)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jit(tx.init)(params)
    for tokens, labels in _batches(train, to, schedule):
        params, state = step(params, state, tokens, labels)
    predict = jit(lambda params, tokens: apply(params, tokens.astype(jnp.float32)))
    size = min(_CHUNK, len(held))
    groups = [held[i : i + size] for i in range(0, len(held), size)]
    out = [jax.device_get(predict(params, filled(group, size))) for group in groups]
    return {name: np.concatenate([x[name] for x in out])[: len(held)] for name in to}, params


def _batches(
    tokens: np.ndarray, to: Targets, schedule: Schedule
) -> Iterator[tuple[np.ndarray, Targets]]:
    """Yield the rows of each step, in a new order each epoch; of clips, either direction."""
    count, clips = len(tokens), "motion" in to
    rng, left = np.random.default_rng(0), np.zeros(0, int)
    size = min(schedule.batch, count)
    for _ in range(schedule.steps):
        if len(left) < size:
            left = rng.permutation(count * (1 + clips))
        chosen, left = left[:size], left[size:]
        rows, back = chosen % count, chosen >= count
        read, labels = tokens[rows], {name: each[rows] for name, each in to.items()}
        if back.any():
            read[back] = read[back, ::-1]
            motion = labels["motion"][back]
            labels["motion"][back] = np.where(motion == UNKNOWN, motion, _REVERSED[motion])
        yield read, labels


def filled(rows: np.ndarray, size: int) -> np.ndarray:
    """Return at least `size` rows, the last one repeated."""
    return np.concatenate([rows, np.repeat(rows[-1:], size - len(rows), axis=0)])
