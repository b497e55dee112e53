"""MobileNetV2 as a frozen vision encoder (Sandler et al. 2018, arXiv:1801.04381, table 2).

Inference form: every batch norm is folded into the convolution in front of it, which leaves a
kernel and a bias a layer. Padding is TensorFlow's SAME: at stride 2 the odd pixel goes below and to
the right. Kernels are stored HWIO, depthwise kernels HW1C.

Dimensions: B batch, F frames, N visual tokens a frame, D encoder width, n = B*F images,
h/w rows and columns, C channels.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vadapter.data.media.images import ImageTransform
from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.encoder import EncoderConfig
from vadapter.models.layers import partitioned

Depthwise = Literal["shifts", "grouped"]

# Table 2 of the paper: expansion, output channels, repeats, stride of the first repeat.
_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
_TOTAL_STRIDE = 32


@dataclasses.dataclass(frozen=True)
class MobileNetConfig(EncoderConfig):
    """The encoder's shape, and how it is computed.

    Attributes:
      kind: names this encoder in a configuration.
      image_size: of the frames the pipeline should send; the network takes any size.
      width_mult: multiplies every channel count (the paper's alpha).
      classes: outputs of the classifier head; 0 builds none.
      depthwise: "shifts" adds nine shifted products, which XLA fuses into one pass; "grouped" is
        the backend's own grouped convolution (7 times slower on XLA:CPU).
      images_at_once: how many of the n images go through the network together, the others waiting;
        0 means all, which suits accelerators. On a CPU 2 keeps the activations in the cache and is
        1.7 times faster at 224 px. n that is no multiple of it uses their greatest common divisor.
        For a batch sharded over devices, take a multiple of the number of shards.
    """

    kind: Literal["mobilenet"] = "mobilenet"
    image_size: int = 224
    width_mult: float = 1.0
    classes: int = 0
    depthwise: Depthwise = "shifts"
    images_at_once: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width_mult <= 0:
            raise ConfigError(f"mobilenet: width_mult {self.width_mult} must be positive")
        if self.classes < 0 or self.images_at_once < 0:
            raise ConfigError(
                f"mobilenet: classes {self.classes} and images_at_once {self.images_at_once} must "
                "be 0 or more"
            )
        if self.depthwise not in _DEPTHWISE:
            raise ConfigError(
                f"mobilenet: depthwise {self.depthwise!r} is none of {sorted(_DEPTHWISE)}"
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
    """Scales a channel count to a multiple of 8, never more than a tenth below the exact value."""
    exact = count * width_mult
    rounded = max(8, int(exact + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * exact else rounded + 8


def stem_channels(config: MobileNetConfig) -> int:
    return _channels(_STEM_CHANNELS, config.width_mult)


def last_channels(config: MobileNetConfig) -> int:
    """D. The last layer grows with `width_mult` but never shrinks (section 4.1 of the paper)."""
    return _channels(_LAST_CHANNELS, max(1.0, config.width_mult))


def block_specs(config: MobileNetConfig) -> tuple[BlockSpec, ...]:
    """The 17 blocks, in order."""
    specs = []
    inputs = stem_channels(config)
    for expansion, channels, repeats, stride in _STAGES:
        outputs = _channels(channels, config.width_mult)
        for i in range(repeats):
            specs.append(BlockSpec(inputs, inputs * expansion, outputs, stride if i == 0 else 1))
            inputs = outputs
    return tuple(specs)


# Each of the four takes x [n, h, w, C], a kernel and a stride, and returns [n, h', w', C'].


def _conv(x: jax.Array, kernel: jax.Array, stride: int, groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def _pointwise(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    del stride  # always 1
    return jnp.einsum("nhwc,cd->nhwd", x, kernel[0, 0])


def _depthwise_grouped(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return _conv(x, kernel, stride, groups=x.shape[-1])


def _window(x: jax.Array, start: tuple[int, int], size: tuple[int, int], stride: int) -> jax.Array:
    limits = (x.shape[0], start[0] + size[0], start[1] + size[1], x.shape[3])
    return lax.slice(x, (0, *start, 0), limits, (1, stride, stride, 1))


def _depthwise_shifts(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    size, strides = kernel.shape[:2], (stride, stride)
    pads = lax.padtype_to_pads(x.shape[1:3], size, strides, "SAME")
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    rows, columns = x.shape[1] - size[0] + 1, x.shape[2] - size[1] + 1
    taps = [
        _window(x, (i, j), (rows, columns), stride) * kernel[i : i + 1, j : j + 1]
        for i in range(size[0])
        for j in range(size[1])
    ]
    return functools.reduce(jnp.add, taps)


_DEPTHWISE = {"shifts": _depthwise_shifts, "grouped": _depthwise_grouped}


class ConvBias(nn.Module):
    """A convolution by `op` with a bias, relu6 unless told otherwise."""

    op: Callable[[jax.Array, jax.Array, int], jax.Array]
    shape: tuple[int, int, int, int]  # HWIO
    stride: int = 1
    relu6: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.he_normal() if self.relu6 else nn.initializers.lecun_normal()
        init = partitioned(init, None, None, None, "embed")
        kernel = constrain(self.param("kernel", init, self.shape))  # small: gathered before use
        bias = self.param("bias", partitioned(nn.initializers.zeros, "norm"), self.shape[-1:])
        y = self.op(x, kernel.astype(x.dtype), self.stride)
        y = y + bias.astype(x.dtype)[None, None, None]
        return jnp.clip(y, 0, 6) if self.relu6 else y


class Block(nn.Module):
    """One inverted residual, [n, h, w, inputs] -> [n, h/stride, w/stride, outputs]."""

    spec: BlockSpec
    depthwise: Depthwise

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        spec, y = self.spec, x
        if spec.expanded != spec.inputs:
            y = ConvBias(_pointwise, (1, 1, spec.inputs, spec.expanded), name="expand")(y)
        y = ConvBias(
            _DEPTHWISE[self.depthwise], (3, 3, 1, spec.expanded), spec.stride, name="depthwise"
        )(y)
        y = ConvBias(_pointwise, (1, 1, spec.expanded, spec.outputs), relu6=False, name="project")(
            y
        )
        return x + y if spec.residual else y


class MobileNet(nn.Module):
    """Frames to visual tokens: the relu6 activations (0..6) of the last 1x1 convolution.

    Attributes:
      config: shape and form of computation.
      dtype: of the computation and of the tokens; parameters stay float32.
    """

    config: MobileNetConfig
    dtype: jnp.dtype = jnp.dtype(jnp.float32)

    @property
    def view(self) -> ImageTransform:
        return self.config.view

    @property
    def width(self) -> int:
        return last_channels(self.config)

    def tokens_per_frame(self) -> int:
        """N at `image_size`: 49 for 224 px."""
        return math.ceil(self.config.image_size / _TOTAL_STRIDE) ** 2

    def setup(self) -> None:
        config, specs = self.config, block_specs(self.config)
        self.stem = ConvBias(_conv, (3, 3, 3, stem_channels(config)), stride=2)
        self.blocks = [
            Block(spec, config.depthwise, name=f"block_{i:02d}") for i, spec in enumerate(specs)
        ]
        self.last = ConvBias(_pointwise, (1, 1, specs[-1].outputs, self.width))
        if config.classes:
            self.head = ConvBias(_pointwise, (1, 1, self.width, config.classes), relu6=False)

    def __call__(self, frames: jax.Array) -> jax.Array:
        """Encodes each frame on its own.

        Args:
          frames: u8 or float [B, F, H, W, 3], RGB in 0..255, of any height and width.

        Returns:
          `dtype` [B, F, N, D] with N = ceil(H/32) * ceil(W/32), row by row.

        Raises:
          ValueError: frames have another rank or another number of channels.
        """
        if frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be [B, F, H, W, 3], not {list(frames.shape)}")
        images = frames.reshape(-1, *frames.shape[2:])
        at_once = math.gcd(len(images), self.config.images_at_once)  # gcd(n, 0) = n
        if self.is_initializing() or at_once == len(images):
            features = self._features(images)
        else:
            # Image i*rounds + r is computed in round r: the axis that is looped over is not the
            # outer one, so a batch sharded over devices stays where it is.
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
            self._logits(tokens)  # one tree of parameters, whichever method ran first
        return tokens

    def classify(self, frames: jax.Array) -> jax.Array:
        """Class scores of each frame, `dtype` [B, F, classes]; needs `classes` > 0.

        Raises:
          ConfigError: the configuration has no head.
        """
        if not self.config.classes:
            raise ConfigError("mobilenet: no classifier head; set classes (1001 for ImageNet)")
        return self._logits(self(frames))

    def _features(self, images: jax.Array) -> jax.Array:
        """u8 or float [n, H, W, 3] -> `dtype` [n, H/32, W/32, D]."""
        x = (images.astype(jnp.float32) / 127.5 - 1.0).astype(self.dtype)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def _logits(self, tokens: jax.Array) -> jax.Array:
        return self.head(tokens.mean(axis=2, keepdims=True))[:, :, 0]
