"""The losses. Every sum is masked and float32.

Legend: B batch, M targets, Q queries, E width, V vocabulary, U contrastive width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.mesh import constrain


def token_xent(
    logits: Float[Array, "B M V"], targets: Int[Array, "B M"], weights: Float[Array, "B M"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return sums of cross entropy (nats) and of correct predictions; weight 0: no target."""
    correct = first_max(logits) == targets
    return (xent(logits, targets) * weights).sum(), (correct * weights).sum()


@jax.custom_vjp
def xent(logits: Float[Array, "B M V"], targets: Int[Array, "B M"]) -> Float[Array, "B M"]:
    """Return the cross entropy in nats, of logits of any dtype.

    The sums are float32. Yet logits, the largest array of a step, are kept for the backward pass
    in their own dtype alone, where autodiff would keep float32 copies; the gradient is rounded to
    it once, at the end.
    """
    return _forward(logits, targets)[0]


def _is_target(logits: jax.Array, targets: jax.Array) -> Bool[Array, "B M V"]:
    # A comparison, not a one-hot gather: it fuses, and works on a vocabulary that is sharded.
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    top = logits.max(-1).astype(jnp.float32)
    total = jnp.exp(logits.astype(jnp.float32) - top[..., None]).sum(-1)
    of_target = jnp.where(_is_target(logits, targets), logits, 0).sum(-1)  # one number and zeros
    return jnp.log(total) + (top - of_target), (logits, targets, top, total)


def _backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, top, total = kept
    p = jnp.exp(logits.astype(jnp.float32) - top[..., None]) / total[..., None]
    slope = (p - _is_target(logits, targets)) * gradient[..., None]
    return slope.astype(logits.dtype), None


xent.defvjp(_forward, _backward)


def first_max(x: Float[Array, "*n V"]) -> Float[Array, "*n"]:
    """Return `jnp.argmax(x, -1)`, as a float, for a vocabulary that is sharded over devices.

    For `argmax` itself the compiler sends the index of every element from device to device; here
    devices exchange one maximum and one index each.
    """
    index = jnp.arange(x.shape[-1], dtype=jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)
    return jnp.where(x == x.max(-1, keepdims=True), index, jnp.inf).min(-1)


def bag_xent(
    logits: Float[Array, "B Q V"], targets: Int[Array, "B M"], weights: Float[Array, "B M"]
) -> Float[Array, ""]:
    """Return the cross entropy (nats) of the targets of a row in no order, summed over targets.

    Q predictions of a row are one, the mean of their probabilities, so that each can be about
    other words. All different targets of a row count the same, however often they occur, and
    together as much as the row has targets; weight 0: no target.
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=1) - jnp.log(logits.shape[1])
    # A comparison, not a scatter: it works on a vocabulary that is sharded.
    ids = jax.lax.broadcasted_iota(jnp.int32, (1, 1, logits.shape[2]), 2)
    occurs = ((targets[:, :, None] == ids) & (weights > 0)[:, :, None]).any(axis=1)
    each = -(jnp.where(occurs, log_p, 0.0).sum(1) / jnp.maximum(occurs.sum(1), 1))
    return (each * weights.sum(1)).sum()


def chunked_xent(
    head: Callable[[jax.Array], jax.Array], states: Float[Array, "B M E"],
    targets: Int[Array, "B M"], weights: Float[Array, "B M"], rows: int,
) -> tuple[Float[Array, ""], Float[Array, ""]]:  # fmt: skip
    """Return `token_xent(head(states), …)`, holding about `rows` rows of logits at a time.

    Saves memory where batch times vocabulary is large; costs time below about 512 rows a chunk.

    Args:
      head: states -> logits.
      states: of the tokens before the targets.
      rows: B is divided into equal chunks of at least one example and at most `rows` targets.
    """
    return in_chunks(
        lambda *chunk: token_xent(head(chunk[0]), *chunk[1:]), (states, targets, weights), rows
    )


def in_chunks(loss: Callable[..., Any], arrays: tuple[jax.Array, ...], rows: int) -> Any:
    """Return `loss(*arrays)`, one or several sums over B, holding few rows of logits at a time.

    Args:
      loss: of chunks of the arrays, recomputed in the backward pass.
      arrays: [B, …], the first with the states of which logits are made.
      rows: about how many rows of logits exist at a time: B is divided into equal chunks of at
        least one example.
    """
    B, per_example = arrays[0].shape[:2]
    per_chunk = max(1, rows // per_example)
    while B % per_chunk:
        per_chunk -= 1

    @jax.checkpoint
    def add(total, chunk):
        return jax.tree.map(jnp.add, total, loss(*chunk)), None

    # Every chunk is sharded over all devices, so that none waits for another one's rows.
    chunks = tuple(
        constrain(rearrange(x, "(n b) ... -> n b ...", b=per_chunk), None, "batch") for x in arrays
    )
    sums = jax.eval_shape(loss, *(x[0] for x in chunks))
    return jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums), chunks)[0]


def contrastive(
    image: Float[Array, "B U"],
    text: Float[Array, "B U"],
    temperature: Float[Array, ""],
    valid: Bool[Array, "B"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return symmetric InfoNCE between unit vectors of a batch (CLIP, arXiv 2103.00020).

    That is the mean loss in nats over valid rows, and the share of images whose own text scores
    highest.
    """
    scores = image @ text.T / temperature
    scores = jnp.where(valid[:, None] & valid[None, :], scores, -1e30)
    diagonal = jnp.diagonal(scores)
    nats = jax.nn.logsumexp(scores, 1) + jax.nn.logsumexp(scores, 0) - 2 * diagonal
    count = jnp.maximum(valid.sum(), 1)
    first = (jnp.argmax(scores, 1) == jnp.arange(len(scores))) & valid
    return jnp.where(valid, nats, 0.0).sum() / (2 * count), first.sum() / count
