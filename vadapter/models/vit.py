"""Vision transformer encoder.

Legend: B batch, F frames, n = B · F images, H and W pixels, N visual tokens a frame, T tokens with
class token and registers, D encoder width.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Num

from vadapter.data.image_transform import ImageTransform
from vadapter.errors import ConfigError
from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.encoder import (
    HALF,
    EncoderConfig,
    normalize_pixels,
    patches_a_side,
    without_border,
)
from vadapter.models.grid_rope import GridRopeConfig, grid_rotary
from vadapter.models.layers import (
    Dtype,
    MlpKind,
    Norm,
    NormKind,
    NormOver,
    linear,
    trainable_tokens,
)
from vadapter.models.rope import Angles
from vadapter.models.stem import ConvStem
from vadapter.models.transformer import BlockConfig, InnerNorms, PerLayer, Remat, Stack


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """A ViT (arXiv 2010.11929), pre-norm, with trainable positions.

    Attributes:
      patch: pixels a side (CoCa here: 288 and 18, 256 tokens). Rows and columns of pixels that are
        left at the bottom and on the right belong to no patch, as behind a convolution without
        padding (SigLIP at 384 and 14: 27 · 27 tokens).
      stem: how patches become tokens. linear: one projection of each. convolutions: a few of stride
        2, see `stem.ConvStem`.
      patch_norm: a norm on what is projected, before positions are added (AIMv2).
      class_token: prepend one trainable token.
      registers: number of further trainable tokens, without positions (DINOv2).
      positions: what is added to tokens. trained: a vector each, except registers; patches: those
        of the class token have none; waves: sine and cosine of row and column (AIMv2, at any
        resolution); none: nothing.
      rope: rotary positions of the patches, beside those or alone (EVA-02, DINOv3).
      window: patches a side of the square windows within which patches attend; 0: to all. Only
        without class token and registers (Qwen2.5-VL).
      whole: the layers, from 0, that attend to all in spite of a window.
      patches_only: do not return class token and registers.
      tap: the tokens that are returned. last | penultimate: those of that layer (LLaVA takes CLIP's
        penultimate); the model has no layers after it. queries: the pooler's, except its first,
        which CoCa contrasts with the text; its captioning decoder reads the others.
      pooler: after the last layer; used only with tap="queries".
      patch_bias: a bias of the patch projection.
      pre_norm: a norm before the first layer (CLIP).
      final_norm: a norm after the last layer.
      norm: of all layers; norm_eps: of these and of the other norms.
      mlp, bias, qkv_bias, key_bias, mlp_bias, qk_norm, qk_norm_over, inner_norms, layer_scale,
        fused_attention: see `transformer.BlockConfig`.
      mean, std: pixel normalization, see `encoder.normalize_pixels`.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    mlp: MlpKind = "gelu"
    stem: Literal["linear", "convolutions"] = "linear"
    patch_norm: bool = False
    class_token: bool = False
    registers: int = 0
    positions: Literal["trained", "patches", "waves", "none"] = "trained"
    rope: GridRopeConfig | None = None
    window: int = 0
    whole: tuple[int, ...] = ()
    patches_only: bool = False
    tap: Literal["last", "penultimate", "queries"] = "last"
    pooler: PoolerConfig | None = None
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    norm: NormKind = "layer"
    bias: bool = True
    qkv_bias: bool | None = None
    key_bias: bool = True
    mlp_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_over: NormOver = "head"
    inner_norms: InnerNorms = "none"
    layer_scale: bool = False
    mean: tuple[float, ...] = HALF
    std: tuple[float, ...] = HALF
    norm_eps: float = 1e-6
    fused_attention: bool = True
    dropout: float = 0.0
    remat: Remat = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tap == "queries" and self.pooler is None:
            raise ConfigError("tap='queries': this encoder has no pooler; set last or penultimate")
        if self.window and (self.class_token or self.registers):
            raise ConfigError("window: only of an encoder without class token and registers")

    @property
    def pooled(self) -> PoolerConfig | None:
        """The pooler whose queries are returned; None if the tokens of a layer are."""
        return self.pooler if self.tap == "queries" else None


class ViT(nn.Module):
    """Frames of `image_size` pixels a side, in 0..255, to visual tokens."""

    config: ViTConfig
    dtype: Dtype = jnp.float32

    @property
    def view(self) -> ImageTransform:
        return self.config.view

    @property
    def width(self) -> int:
        return (self.config.pooled or self.config).width

    def tokens_per_frame(self) -> int:
        """Return N."""
        c = self.config
        if c.pooled:
            return c.pooled.queries - 1
        extra = 0 if c.patches_only else c.class_token + c.registers
        return self._side**2 + extra

    def grid(self) -> tuple[int, ...]:
        """Return the (rows, columns) of the tokens of a frame; () if they are no grid."""
        side = self._side
        return (side, side) if not self.config.pooled and self.tokens_per_frame() == side**2 else ()

    def time_positions(self, frames: int) -> int:
        """Return the number of a clip's time positions: each frame is encoded on its own."""
        return frames

    @property
    def _side(self) -> int:
        """The number of patches a side; ConfigError if there is none."""
        return patches_a_side(self.config.image_size, self.config.patch)

    @nn.compact
    def __call__(self, frames: Num[Array, "B F H W 3"]) -> Float[Array, "B F N D"]:
        c = self.config
        # Frames are images: the encoder does not know time.
        x = rearrange(normalize_pixels(frames, c.mean, c.std), "b f h w c -> (b f) h w c")
        x = self._patches(x.astype(self.dtype))
        normal = nn.initializers.normal(0.02)

        def tokens(name: str, count: int, init: Any = normal) -> jax.Array:
            return trainable_tokens(self, name, (len(x), count, c.width), init, self.dtype)

        if c.patch_norm:
            x = self._norm("patch_norm")(x)
        if c.positions == "patches":
            x = x + tokens("positions", x.shape[1])
        if c.positions == "waves":
            x = x + jnp.asarray(waves(self._side, c.width)[None], self.dtype)
        if c.class_token:
            x = jnp.concatenate([tokens("class_token", 1, nn.initializers.zeros), x], 1)
        if c.positions == "trained":
            x = x + tokens("positions", x.shape[1])
        if c.registers:
            # After the class token, whose place is the first, and after positions were added.
            first, patches = jnp.split(x, [int(c.class_token)], axis=1)
            x = jnp.concatenate([first, tokens("registers", c.registers), patches], 1)
        if c.pre_norm:
            x = self._norm("pre_norm")(x)
        block = BlockConfig(
            c.width, c.heads, c.mlp_dim, mlp=c.mlp, norm=c.norm, norm_eps=c.norm_eps,
            bias=c.bias, qkv_bias=c.qkv_bias, key_bias=c.key_bias, mlp_bias=c.mlp_bias,
            qk_norm=c.qk_norm, qk_norm_over=c.qk_norm_over, inner_norms=c.inner_norms,
            layer_scale=c.layer_scale, fused_attention=c.fused_attention, dropout=c.dropout,
            remat=c.remat,
        )  # fmt: skip
        depth = c.depth - (c.tap == "penultimate")
        layers, distance = self._windows(depth, len(x))
        stack = Stack(block, depth, self.dtype, name="stack")
        x, _ = stack(x, positions=self._rotary(len(x)), layers=layers, distance=distance)
        if c.final_norm and c.tap == "last":
            x = self._norm("norm")(x)
        if c.pooled:
            x = Pooler(c.pooled, self.dtype, name="pooler")(x[:, None])[:, 1:]
        elif c.patches_only:
            x = x[:, c.class_token + c.registers :]
        return rearrange(x, "(b f) n d -> b f n d", b=len(frames))

    def _patches(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n N D"]:
        c = self.config
        x = without_border(x, c.image_size, c.patch)
        if c.stem == "convolutions":
            x = ConvStem(c.width, c.patch, self.dtype, name="stem")(x)
            return rearrange(x, "n h w d -> n (h w) d")
        # A strided convolution over patches, as the matrix product that it is.
        x = rearrange(x, "n (h p) (w q) c -> n (h w) (p q c)", p=c.patch, q=c.patch)
        return linear(c.width, (None, "embed"), c.patch_bias, self.dtype, name="patches")(x)

    def _rotary(self, images: int) -> Angles | None:
        c = self.config
        if c.rope is None:
            return None
        leading = c.class_token + c.registers
        sin, cos = grid_rotary(c.rope, self._side, leading, c.width // c.heads)
        shape = (images, *sin.shape[1:])
        return jnp.broadcast_to(sin, shape), jnp.broadcast_to(cos, shape)

    def _windows(self, depth: int, images: int) -> tuple[PerLayer | None, jax.Array | None]:
        """Return the reach of every layer, and 1 between patches of different windows, else 0."""
        c = self.config
        if not c.window:
            return None, None
        along = np.arange(self._side) // c.window
        of = (along[:, None] * self._side + along).reshape(-1)
        distance = jnp.asarray(of[:, None] != of, jnp.int32)[None]
        reach = jnp.asarray([1 + (i in c.whole) for i in range(depth)], jnp.int32)
        return PerLayer(window=reach), jnp.broadcast_to(distance, (images, *distance.shape[1:]))

    def _norm(self, name: str) -> Norm:
        return Norm(self.config.norm, self.config.norm_eps, self.dtype, name=name)


def waves(side: int, width: int) -> Float[np.ndarray, "N D"]:
    """Return sine and cosine of every patch's column, then of its row, each a quarter of D.

    Raises:
      ConfigError: D is not divisible by 4.

    Source: arXiv 2411.14402 (AIMv2), as transformers computes them, in float64.
    """
    if width % 4:
        raise ConfigError(f"positions='waves': width={width} is not divisible by 4")
    freq = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    angles = np.arange(side)[:, None] * freq
    along = np.concatenate([np.sin(angles), np.cos(angles)], -1)
    both = [np.tile(along, (side, 1)), np.repeat(along, side, 0)]
    return np.concatenate(both, -1).astype(np.float32)
