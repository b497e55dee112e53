"""The linear layer whose kernel is int8 or int4, see `quantize`.

Legend: I inputs and O outputs, G groups of inputs that share a scale.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vadapter.errors import ConfigError
from vadapter.models.layers import Dtype, output_axis, partitioned
from vadapter.models.quantize import SCALE, library


class QuantizedLinear(nn.Module):
    """`x @ kernel + bias` with a kernel of integers; otherwise as `layers.linear`.

    The kernel is converted to float where it is used, and again in the backward pass, so that
    neither pass holds more than one layer's floats. It has no gradient.

    Attributes:
      stored: dtype of the kernel, see `quantize.STORED`.
      group: inputs that share a scale; 0: all.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = False
    dtype: Dtype = jnp.float32
    stored: Dtype = jnp.int8
    group: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        qwix = library()
        shape = (x.shape[-1], self.features)
        largest = int(jnp.iinfo(self.stored).max)
        # Random kernels are uniform, of variance 1/I; that of the integers is as below, by 3.
        step = (3 / shape[0] / (largest * (largest + 1))) ** 0.5
        groups = shape[0] // (self.group or shape[0])
        if groups * (self.group or shape[0]) != shape[0]:
            raise ConfigError(
                f"scale_group={self.group} does not divide the {shape[0]} inputs of a linear "
                "layer; use a number that does, or 0 for one scale per output"
            )

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            drawn = jax.random.randint(key, shape, -largest, largest + 1, jnp.int8)
            return drawn.astype(self.stored)

        kernel = self.param("kernel", partitioned(uniform, *self.axes), shape)
        init = partitioned(nn.initializers.constant(step), None, output_axis(self.axes))
        scale = self.param("kernel" + SCALE, init, (groups, self.features))

        def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
            return qwix.dot(x, qwix.QArray(kernel, scale.astype(self.dtype)))

        y = jax.checkpoint(product, prevent_cse=False)(x.astype(self.dtype), kernel, scale)
        if not self.bias:
            return y
        init = partitioned(nn.initializers.zeros, output_axis(self.axes))
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
