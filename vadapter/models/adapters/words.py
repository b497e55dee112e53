"""The prefix as words of the frozen LLM, by the Gumbel-softmax trick (paper, Table 9).

Every soft token becomes a distribution over the LLM's vocabulary, by the LLM's own frozen head, and
then the mean of its word embeddings: a sample while training, the most probable word otherwise. The
prefix then is text, which evaluations print.

The paper states the temperatures alone: head, hard or soft samples and the rate of decay are our
reading, each a field. Gumbel-softmax: arXiv 1611.01144.

Legend: B batch, Q soft tokens, E width of the language model, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vadapter.models.layers import Dtype


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """A temperature schedule, max(min_temperature, temperature · exp(-decay · step)).

    Attributes:
      hard: samples are words, with the gradient of the soft ones (straight-through).
      noise: factor on the Gumbel noise; 1: samples follow the head's probabilities, 0: no noise.
      at_once: soft tokens of a row whose logits exist at a time. The embedding is read once for
        each such group, so that few are slow and many take memory.
      width: E, and vocab_size: V without the padding of a public model's embedding; 0 takes those
        of the language model that follows.
    """

    temperature: float = 2.0
    min_temperature: float = 0.1
    decay: float = 0.0
    hard: bool = True
    noise: float = 1.0
    at_once: int = 16
    width: int = 0
    vocab_size: int = 0

    DERIVED: ClassVar = ("width", "vocab_size")

    def temperature_at(self, step: Int[Array, ""]) -> Float[Array, ""]:
        """Return the temperature after a number of steps, f32[]."""
        decayed = self.temperature * jnp.exp(-self.decay * step.astype(jnp.float32))
        return jnp.maximum(decayed, self.min_temperature)


class Words(nn.Module):
    """The component without parameters that marks this place in the chain."""

    config: WordsConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B Q E"]) -> Float[Array, "B Q E"]:
        """Return `x`; `AdapterModel.prefix` turns it into words."""
        return x


Head = Callable[[Float[Array, "B E"]], Float[Array, "B V"]]
Embed = Callable[[Float[Array, "B V"]], Float[Array, "B E"]]


def nearest(c: WordsConfig, head: Head, x: Float[Array, "B Q E"]) -> Int[Array, "B Q"]:
    """Return the most probable word of every soft token."""
    most_probable = lambda x: jnp.argmax(_scores(c, head, x), -1)  # noqa: E731
    ids = jax.lax.map(most_probable, x.swapaxes(0, 1), batch_size=c.at_once)
    return ids.swapaxes(0, 1).astype(jnp.int32)


def sample(
    c: WordsConfig, head: Head, embed: Embed, x: Float[Array, "B Q E"], key: jax.Array,
    step: Int[Array, ""],
) -> Float[Array, "B Q E"]:  # fmt: skip
    """Return the embeddings of sampled words.

    A group of soft tokens after the other, recomputed in the backward pass: the logits of all of
    them would be the largest array of a step by far.

    Args:
      head: states -> logits.
      embed: weights of all words -> the sum of their embeddings, as the model reads them.
      key: of the noise.
    """
    temperature = c.temperature_at(step)

    @jax.checkpoint
    def of_token(arguments: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, key = arguments
        scores = _scores(c, head, x)
        noise = c.noise * jax.random.gumbel(key, scores.shape)
        weights = jax.nn.softmax((scores + noise) / temperature)
        if c.hard:
            word = jax.nn.one_hot(jnp.argmax(weights, -1), weights.shape[-1], dtype=weights.dtype)
            weights = word + (weights - jax.lax.stop_gradient(weights))
        return embed(weights.astype(x.dtype))

    keys = jax.random.split(key, x.shape[1])
    arguments = (x.swapaxes(0, 1), keys)
    return jax.lax.map(of_token, arguments, batch_size=c.at_once).swapaxes(0, 1)


def _scores(c: WordsConfig, head: Head, x: Float[Array, "B E"]) -> Float[Array, "B V"]:
    """Return float32 logits, -inf for the rows of the embedding that are no words."""
    logits = head(x).astype(jnp.float32)
    return jnp.where(jnp.arange(logits.shape[-1])[None] < c.vocab_size, logits, -jnp.inf)
