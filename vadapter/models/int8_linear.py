"""The linear layer whose kernel is int8, see `quantize`.

Legend: I inputs and O outputs.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vadapter.models.layers import Dtype, output_axis, partitioned
from vadapter.models.quantize import SCALE, library


class Int8Linear(nn.Module):
    """`x @ kernel + bias` with an int8 kernel; otherwise as `layers.linear`.

    The kernel is converted to float where it is used, and again in the backward pass, so that
    neither pass holds more than one layer's floats. It has no gradient.
    """

    features: int
    axes: tuple[str | None, str | None]
    bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*n I"]) -> Float[Array, "*n O"]:
        qwix = library()
        shape = (x.shape[-1], self.features)
        step = (3 / shape[0]) ** 0.5 / 127  # random kernels are uniform, of variance 1/I

        def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            return jax.random.randint(key, shape, -127, 128, jnp.int8)

        kernel = self.param("kernel", partitioned(uniform, *self.axes), shape)
        init = partitioned(nn.initializers.constant(step), None, output_axis(self.axes))
        scale = self.param("kernel" + SCALE, init, (1, self.features))

        def product(x: jax.Array, kernel: jax.Array, scale: jax.Array) -> jax.Array:
            return qwix.dot(x, qwix.QArray(kernel, scale.astype(self.dtype)))

        y = jax.checkpoint(product, prevent_cse=False)(x.astype(self.dtype), kernel, scale)
        if not self.bias:
            return y
        init = partitioned(nn.initializers.zeros, output_axis(self.axes))
        bias = self.param("bias", init, (self.features,)).astype(self.dtype)
        return y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
