"""Vision transformer that sees a clip as a whole: its tokens attend to those of all frames.

Legend: B batch, F frames, H and W pixels, T time positions, N visual tokens of each, S = T · N, D
encoder width, K head dim, P rotated pairs of a head, A rotated pairs of an axis.
"""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Num

from vadapter.data.image_transform import ImageTransform
from vadapter.errors import ConfigError
from vadapter.models.encoder import (
    HALF,
    EncoderConfig,
    normalize_pixels,
    patches_a_side,
    without_border,
)
from vadapter.models.layers import Dtype, MlpKind, Norm, default_init, partitioned
from vadapter.models.rope import Angles
from vadapter.models.transformer import BlockConfig, Remat, Stack

_THETA = 10_000.0  # of sinusoids and of rotations


@dataclasses.dataclass(frozen=True)
class VideoViTConfig(EncoderConfig):
    """A ViT over tubelets, pre-norm (VideoMAE, arXiv 2203.12602; V-JEPA 2, arXiv 2506.09985).

    A clip of F frames has T = F / tubelet time positions. An image is a clip of equal frames.

    Attributes:
      tubelet: frames of a token.
      frames: of a clip; 0: any multiple of `tubelet`.
      still: frames of the clip that an image becomes; 0: `tubelet`.
      patch: pixels a side of a token; what remains at the right and at the bottom is left out.
      positions: how tokens know where they are. rope: queries and keys are rotated by time, row and
        column, see `rotations`. sinusoids: those of the tokens' order are added to them.
      tap: the layer whose tokens are returned; the model has no layers after it.
      final_norm: a norm after the last layer.
      bias: biases of queries, keys and values.
      mlp, key_bias, fused_attention, remat: see `transformer.BlockConfig`.
      mean, std: pixel normalization, see `encoder.normalize_pixels`.
    """

    tubelet: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    frames: int = 0
    still: int = 0
    positions: Literal["rope", "sinusoids"] = "rope"
    mlp: MlpKind = "gelu_erf"
    tap: Literal["last", "penultimate"] = "last"
    final_norm: bool = True
    bias: bool = True
    key_bias: bool = True
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    norm_eps: float = 1e-6
    fused_attention: bool = True
    dropout: float = 0.0
    remat: Remat = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        patches_a_side(self.image_size, self.patch)  # validates
        for key in ("frames", "still"):
            if getattr(self, key) % self.tubelet:
                raise ConfigError(
                    f"{key}={getattr(self, key)} is not divisible by tubelet={self.tubelet}"
                )


class VideoViT(nn.Module):
    """Frames of `image_size` pixels a side, in 0..255, to visual tokens of time positions."""

    config: VideoViTConfig
    dtype: Dtype = jnp.float32

    @property
    def view(self) -> ImageTransform:
        return self.config.view

    @property
    def width(self) -> int:
        return self.config.width

    def tokens_per_frame(self) -> int:
        """Return N, the tokens of a time position."""
        rows, columns = self.grid()
        return rows * columns

    def grid(self) -> tuple[int, ...]:
        """Return the (rows, columns) of the tokens of a time position."""
        side = patches_a_side(self.config.image_size, self.config.patch)
        return side, side

    def time_positions(self, frames: int) -> int:
        """Return T of a clip of so many frames; of an image, which is one frame.

        Raises:
          ConfigError: a clip of another number of frames than the encoder takes.
        """
        c = self.config
        if frames == 1:
            return (c.still or c.tubelet) // c.tubelet
        if (c.frames and frames != c.frames) or frames % c.tubelet:
            taken = f"{c.frames}" if c.frames else f"a multiple of {c.tubelet}"
            raise ConfigError(
                f"a clip has {frames} frames, but the encoder takes {taken}; set data.NAME.frames"
            )
        return frames // c.tubelet

    @nn.compact
    def __call__(self, frames: Num[Array, "B F H W 3"]) -> Float[Array, "B T N D"]:
        c, times = self.config, self.time_positions(frames.shape[1])
        if frames.shape[1] == 1:
            frames = jnp.repeat(frames, times * c.tubelet, axis=1)
        x = normalize_pixels(frames, c.mean, c.std).astype(self.dtype)
        x = Tubelets(c, self.dtype, name="patches")(x)
        side, rotary = self.grid()[0], None
        if c.positions == "sinusoids":
            x = x + jnp.asarray(sinusoids(x.shape[1], c.width), x.dtype)
        else:
            rotary = rotations((times, side, side), c.width // c.heads)
        block = BlockConfig(
            c.width, c.heads, c.mlp_dim, mlp=c.mlp, norm_eps=c.norm_eps, qkv_bias=c.bias,
            key_bias=c.key_bias, dropout=c.dropout, fused_attention=c.fused_attention,
            remat=c.remat,
        )  # fmt: skip
        depth = c.depth - (c.tap == "penultimate")
        x, _ = Stack(block, depth, self.dtype, name="stack")(x, positions=rotary)
        if c.final_norm and c.tap == "last":
            x = Norm("layer", c.norm_eps, self.dtype, name="norm")(x)
        return rearrange(x, "b (t n) d -> b t n d", t=times)


class Tubelets(nn.Module):
    """Tubelets of pixels to tokens, as the matrix products that a strided convolution is."""

    config: VideoViTConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B F H W 3"]) -> Float[Array, "B S D"]:
        c = self.config
        x = without_border(x, c.image_size, c.patch)
        axes = "b (t f) (h p) (w q) c -> b (t h w) f (p q c)"
        x = rearrange(x, axes, f=c.tubelet, p=c.patch, q=c.patch)
        # One matrix for each frame of a tubelet.
        init = partitioned(default_init, None, None, "embed")
        kernel = self.param("kernel", init, (c.tubelet, x.shape[-1], c.width))
        bias = self.param("bias", partitioned(nn.initializers.zeros, "norm"), (c.width,))
        out = jnp.einsum("bsfp,fpd->bsd", x, kernel.astype(self.dtype))
        return out + bias.astype(self.dtype).reshape(1, 1, -1)


def sinusoids(tokens: int, width: int) -> Float[np.ndarray, "1 S D"]:
    """Return the sine and cosine of every token's place in the sequence, in turn (VideoMAE)."""
    exponent = np.arange(width) // 2 * 2 / width
    angle = np.arange(tokens)[:, None] / _THETA**exponent
    return np.where(np.arange(width) % 2, np.cos(angle), np.sin(angle)).astype(np.float32)[None]


def rotations(sizes: tuple[int, ...], head_dim: int) -> Angles:
    """Return the rotary factors of a grid of tokens, [1, S, 2, P], for `rope.rotate_by`.

    Each axis of the grid rotates a third of the head: A = K // 6 pairs. They turn by the
    frequencies θ^(-i/A), but the two dims of a pair by two different ones, as when V-JEPA 2 was
    trained: dim j of the axis by that of i = j mod A.
    """
    pairs = head_dim // (2 * len(sizes))
    freq = np.float32(1) / np.float32(_THETA) ** (np.arange(pairs, dtype=np.float32) / pairs)
    both = freq[np.arange(2 * pairs).reshape(pairs, 2).T % pairs]  # [2, A]
    angles = []
    for axis, size in enumerate(sizes):
        angle = np.arange(size, dtype=np.float32)[:, None, None] * both
        shape = (*(size if i == axis else 1 for i in range(len(sizes))), *both.shape)
        angles.append(jnp.broadcast_to(angle.reshape(shape), (*sizes, *both.shape)))
    angle = jnp.concatenate(angles, -1).reshape(1, -1, 2, len(sizes) * pairs)
    return jax.lax.optimization_barrier((jnp.sin(angle), jnp.cos(angle)))
