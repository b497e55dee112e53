"""MobileNetV2 as a frozen vision encoder (Sandler et al. 2018, arXiv:1801.04381, table 2).

Inference form: every batch norm is folded into the convolution before it, which leaves a kernel and
a bias per layer. Padding is TensorFlow's SAME: at stride 2 the odd pixel goes below and to the
right. Kernels are stored HWIO, depthwise kernels HW1C.

Legend: B batch, F frames, H and W pixels, N visual tokens a frame, D encoder width, n = B * F
images, h/w rows and columns, C input and O output channels, i/j kernel rows and columns.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Num

from vadapter.data.image_transform import ImageTransform
from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.convolution import depthwise
from vadapter.models.encoder import EncoderConfig, normalize_pixels
from vadapter.models.layers import Dtype, partitioned

Depthwise = Literal["shifts", "grouped"]

# Table 2 of the paper: expansion, output channels, repeats, stride of the first repeat.
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2),
    (6, 320, 1, 1),
)  # fmt: skip
_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
_TOTAL_STRIDE = 32


@dataclasses.dataclass(frozen=True)
class MobileNetConfig(EncoderConfig):
    """The encoder's shape, and how it is computed.

    Attributes:
      image_size: of the frames that the data pipeline sends; the network takes any size.
      width_mult: multiplies every channel count (the paper's alpha).
      classes: outputs of the classifier head, which no stage uses; 0 creates none.
      depthwise: "shifts" adds nine shifted products, which XLA fuses into one pass; "grouped" is
        the backend's own grouped convolution (7 times slower on XLA:CPU).
      images_at_once: how many of the n images pass through the network together; 0 means all,
        which suits accelerators. On a CPU 2 keeps the activations in the cache and is 1.7 times
        faster at 224 px. Where n is not a multiple of it, their greatest common divisor is used.
        For a batch sharded over devices, take a multiple of the number of shards.
    """

    image_size: int = 224
    width_mult: float = 1.0
    classes: int = 0
    depthwise: Depthwise = "shifts"
    images_at_once: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_mult <= 0:
            raise ConfigError(f"mobilenet: width_mult={self.width_mult} must be positive")
        if self.classes < 0 or self.images_at_once < 0:
            raise ConfigError(
                f"mobilenet: classes={self.classes} and images_at_once={self.images_at_once} must "
                "not be negative"
            )
        if self.depthwise not in _DEPTHWISE:
            raise ConfigError(
                f"mobilenet: depthwise={self.depthwise!r} must be one of {sorted(_DEPTHWISE)}"
            )


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Channels of an inverted residual: 1x1 (none if `expanded == inputs`), depthwise 3x3, 1x1."""

    inputs: int
    expanded: int
    outputs: int
    stride: int

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.inputs == self.outputs


def _channels(count: int, width_mult: float) -> int:
    """Return the scaled count as a multiple of 8, at most a tenth below the exact value."""
    exact = count * width_mult
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def block_specs(config: MobileNetConfig) -> tuple[BlockSpec, ...]:
    """Return the 17 blocks, in order."""
    specs = []
    inputs = _channels(_STEM_CHANNELS, config.width_mult)
    for expansion, channels, repeats, stride in _STAGES:
        outputs = _channels(channels, config.width_mult)
        for i in range(repeats):
            specs.append(BlockSpec(inputs, inputs * expansion, outputs, stride if i == 0 else 1))
            inputs = outputs
    return tuple(specs)


# The forms of a convolution: images, kernel, stride -> images.
Images = Float[Array, "n h w C"]
Kernel = Float[Array, "i j _ O"]


def _conv(x: Images, kernel: Kernel, stride: int) -> jax.Array:
    """Convolve; depthwise if the kernel has one input channel, by the backend's own groups."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1] // kernel.shape[2],
    )  # fmt: skip


def _pointwise(x: Images, kernel: Kernel, stride: int) -> jax.Array:
    del stride  # always 1
    return jnp.einsum("nhwc,cd->nhwd", x, kernel[0, 0])


_DEPTHWISE = {"shifts": depthwise, "grouped": _conv}


class ConvBias(nn.Module):
    """A convolution by `op` with a bias, then a relu6."""

    op: Callable[[jax.Array, jax.Array, int], jax.Array]
    shape: tuple[int, int, int, int]  # HWIO
    stride: int = 1
    relu6: bool = True

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "n _ _ O"]:
        init = nn.initializers.he_normal() if self.relu6 else nn.initializers.lecun_normal()
        init = partitioned(init, None, None, None, "embed")
        kernel = constrain(self.param("kernel", init, self.shape))  # small: gathered before use
        bias = self.param("bias", partitioned(nn.initializers.zeros, "norm"), self.shape[-1:])
        y = self.op(x, kernel.astype(x.dtype), self.stride)
        y = y + bias.astype(x.dtype)[None, None, None]
        return jnp.clip(y, 0, 6) if self.relu6 else y


class Block(nn.Module):
    """One inverted residual: expand, filter by a depthwise convolution, project."""

    spec: BlockSpec
    depthwise: Depthwise

    @nn.compact
    def __call__(self, x: Images) -> Float[Array, "n _ _ O"]:
        spec, y = self.spec, x
        inner, op = spec.expanded, _DEPTHWISE[self.depthwise]
        if inner != spec.inputs:
            y = ConvBias(_pointwise, (1, 1, spec.inputs, inner), name="expand")(y)
        y = ConvBias(op, (3, 3, 1, inner), spec.stride, name="depthwise")(y)
        y = ConvBias(_pointwise, (1, 1, inner, spec.outputs), relu6=False, name="project")(y)
        return x + y if spec.residual else y


class MobileNet(nn.Module):
    """Frames to visual tokens: the relu6 activations (0..6) of the last 1x1 convolution."""

    config: MobileNetConfig
    dtype: Dtype = jnp.float32

    @property
    def view(self) -> ImageTransform:
        return self.config.view

    @property
    def width(self) -> int:
        # The last layer grows with `width_mult` but never shrinks (paper, section 4.1).
        return _channels(_LAST_CHANNELS, max(1.0, self.config.width_mult))

    def tokens_per_frame(self) -> int:
        """Return N at `image_size`: 49 for 224 px."""
        return math.prod(self.grid())

    def grid(self) -> tuple[int, ...]:
        """Return the (rows, columns) of the tokens of a frame at `image_size`."""
        side = math.ceil(self.config.image_size / _TOTAL_STRIDE)
        return side, side

    def time_positions(self, frames: int) -> int:
        """Return the number of a clip's time positions: each frame is encoded on its own."""
        return frames

    def setup(self) -> None:
        config, specs = self.config, block_specs(self.config)
        self.stem = ConvBias(_conv, (3, 3, 3, specs[0].inputs), stride=2)
        self.blocks = [
            Block(spec, config.depthwise, name=f"block_{i:02d}") for i, spec in enumerate(specs)
        ]
        self.last = ConvBias(_pointwise, (1, 1, specs[-1].outputs, self.width))
        if config.classes:
            self.head = ConvBias(_pointwise, (1, 1, self.width, config.classes), relu6=False)

    def __call__(self, frames: Num[Array, "B F H W 3"]) -> Float[Array, "B F N D"]:
        """Encode each frame on its own; return tokens row by row, N = ceil(H/32) * ceil(W/32)."""
        if frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be [B, F, H, W, 3], not {list(frames.shape)}")
        images = rearrange(frames, "b f h w c -> (b f) h w c")
        at_once = math.gcd(len(images), self.config.images_at_once)  # gcd(n, 0) = n
        if self.is_initializing() or at_once == len(images):
            features = self._features(images)
        else:
            # Image i * rounds + r is computed in round r. The loop is over the inner axis, so that
            # every round has images of every device, and none moves to another.
            loop = nn.scan(
                lambda encoder, carry, chunk: (carry, encoder._features(chunk)),
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )
            _, features = loop(self, (), images.reshape(at_once, -1, *images.shape[1:]))
        tokens = features.reshape(*frames.shape[:2], -1, self.width)
        if self.is_initializing() and self.config.classes:
            self.head(tokens.mean(axis=2, keepdims=True))  # creates its parameters
        return tokens

    def _features(self, images: Num[Array, "n H W 3"]) -> Float[Array, "n h w D"]:
        x = self.stem(normalize_pixels(images).astype(self.dtype))
        for block in self.blocks:
            x = block(x)
        return self.last(x)
