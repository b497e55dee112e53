"""The fully connected layers that match widths along the chain (paper, section 3).

Legend: D input width, E output width.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vadapter.models.layers import Dtype, default_init, linear


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """One fully connected layer.

    Attributes:
      width: E; 0 takes the width of the language model that follows in the chain.
      init: size of the output at initialization: a standard deviation of 1 for unit-variance input
        (`unit`), or the root mean square of the word embeddings of the language model that reads
        it, for what enters it there (`words`). Embeddings of public models are often far from 1.
      scale: factor on it.
    """

    width: int = 0
    init: Literal["unit", "words"] = "unit"
    scale: float = 1.0

    DERIVED: ClassVar = ("width",)


class Projection(nn.Module):
    """x @ kernel + bias over the last axis."""

    config: ProjectionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n E"]:
        def init(*args: Any) -> jax.Array:
            return default_init(*args) * self.config.scale

        return linear(self.config.width, (None, "embed"), True, self.dtype, init, name="out")(x)
