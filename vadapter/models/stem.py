"""Convolutions in place of a ViT's patch projection (Xiao et al. 2021, arXiv:2106.14881).

One projection of a patch has to tell outlines apart with a single linear map; a few convolutions
learn them in a small part of the steps (BUILD_NOTES, "An encoder that sees").

Legend: n images, H and W pixels, h/w rows and columns of tokens, C channels, D encoder width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vadapter.errors import ConfigError
from vadapter.models.layers import Dtype, Norm, default_init, linear, partitioned


class ConvStem(nn.Module):
    """Convolutions of stride 2, as many as it takes from a pixel to a token.

    The channels double from one to the next and end at `width`. All but the last are followed by a
    residual block at the same resolution: norm, 3x3 convolution, 1x1 convolution.

    Raises:
      ConfigError: `patch` is not a power of two above 1, or `width` has no `patch / 2` parts.
    """

    width: int  #: D
    patch: int  #: pixels a side of a token
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n h w D"]:
        halvings = self.patch.bit_length() - 1
        if self.patch != 2**halvings or not halvings or self.width % 2 ** (halvings - 1):
            raise ConfigError(
                f"stem='convolutions' with patch={self.patch} and width={self.width}: patch must "
                "be 2, 4, 8, 16 or another power of two, and width divisible by patch / 2"
            )
        for i in range(halvings):
            channels = self.width >> (halvings - 1 - i)
            x = nn.gelu(self._conv(channels, 3, 2, f"down_{i}")(x))
            if i < halvings - 1:
                h = Norm("layer", dtype=self.dtype, name=f"norm_{i}")(x)
                h = nn.gelu(self._conv(channels, 3, 1, f"conv_{i}")(h))
                x = x + linear(channels, (None, None), True, self.dtype, name=f"out_{i}")(h)
        return linear(self.width, (None, "embed"), True, self.dtype, name="out")(x)

    def _conv(self, channels: int, side: int, stride: int, name: str) -> nn.Conv:
        kernel_init = partitioned(default_init, None, None, None, None)
        bias_init = partitioned(nn.initializers.zeros, None)
        return nn.Conv(
            channels, (side, side), stride, dtype=self.dtype, kernel_init=kernel_init,
            bias_init=bias_init, name=name,
        )  # fmt: skip
