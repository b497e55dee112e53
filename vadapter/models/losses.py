"""The losses. Every sum is masked, float32, and divided by at least one.

Legend: B batch, M targets, E width, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from vadapter.distributed.mesh import constrain


def token_xent(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Weighted sums of cross entropy (nats) and of correct predictions.

    Args:
      logits: [B, M, V]; targets: i32[B, M]; weights: f32[B, M], 0 where there is no target.
    """
    correct = first_max(logits) == targets
    return (xent(logits, targets) * weights).sum(), (correct * weights).sum()


@jax.custom_vjp
def xent(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy in nats, f32[B, M], of logits [B, M, V] of any dtype.

    Sums are float32, yet logits, the largest array of a step, are kept only as they came: the
    backward pass reads them again, and rounds the gradient once, as a whole.
    """
    return _forward(logits, targets)[0]


def _chosen(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]


def _forward(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    most = logits.max(-1).astype(jnp.float32)
    total = jnp.exp(logits.astype(jnp.float32) - most[..., None]).sum(-1)
    picked = jnp.where(_chosen(logits, targets), logits, 0).sum(-1)  # one number and zeros
    return jnp.log(total) + (most - picked), (logits, targets, most, total)


def _backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, most, total = kept
    p = jnp.exp(logits.astype(jnp.float32) - most[..., None]) / total[..., None]
    slope = (p - _chosen(logits, targets)) * gradient[..., None]
    return slope.astype(logits.dtype), None


xent.defvjp(_forward, _backward)


def first_max(x: jax.Array) -> jax.Array:
    """`jnp.argmax(x, -1)` of numbers, for a vocabulary that is split over devices.

    Of `argmax` the compiler would send the index of every element from device to device.
    """
    at = jnp.arange(x.shape[-1], dtype=jnp.float32).reshape(*(1,) * (x.ndim - 1), -1)
    return jnp.where(x == x.max(-1, keepdims=True), at, jnp.inf).min(-1)


def chunked_xent(
    head: Callable[[jax.Array], jax.Array],
    states: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    rows: int,
) -> tuple[jax.Array, jax.Array]:
    """`token_xent(head(states), …)` with at most about `rows` rows of logits alive at a time.

    Saves memory where batch times vocabulary is large; costs time under about 512 rows a chunk.

    Args:
      head: [b, M, E] -> [b, M, V]; states: [B, M, E].
      rows: B·M is cut along B into chunks of at least one example.
    """
    B, M, _ = states.shape
    per_chunk = max(1, rows // M)
    while B % per_chunk:
        per_chunk -= 1

    @jax.checkpoint
    def one(total, chunk):
        nats, correct = token_xent(head(chunk[0]), chunk[1], chunk[2])
        return (total[0] + nats, total[1] + correct), None

    # Every chunk is spread over all devices: none waits for another one's rows.
    cut = lambda x: x.reshape(B // per_chunk, per_chunk, *x.shape[1:])  # noqa: E731
    chunks = [constrain(cut(x), None, "batch") for x in (states, targets, weights)]
    zero = jnp.zeros(())
    return jax.lax.scan(one, (zero, zero), tuple(chunks))[0]


def contrastive(
    image: jax.Array, text: jax.Array, temperature: jax.Array, valid: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Symmetric InfoNCE between the rows of a batch (CLIP, arXiv 2103.00020).

    Args:
      image, text: unit vectors f32[B, ·]; temperature: f32[]; valid: bool[B], rows that count.

    Returns:
      Mean loss in nats over valid rows, and the share of images whose own text comes first.
    """
    scores = image @ text.T / temperature
    scores = jnp.where(valid[:, None] & valid[None, :], scores, -1e30)
    diagonal = jnp.diagonal(scores)
    nats = jax.nn.logsumexp(scores, 1) + jax.nn.logsumexp(scores, 0) - 2 * diagonal
    count = jnp.maximum(valid.sum(), 1)
    first = (jnp.argmax(scores, 1) == jnp.arange(len(scores))) & valid
    return jnp.where(valid, nats, 0.0).sum() / (2 * count), first.sum() / count
