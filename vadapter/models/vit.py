"""Vision transformer encoder.

Legend: B batch, F frames, n = B · F images, H and W pixels, N visual tokens a frame, T tokens with
class token and registers, D encoder width.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Num

from vadapter.data.image_transform import ImageTransform
from vadapter.errors import ConfigError
from vadapter.models.adapters.pooler import Pooler, PoolerConfig
from vadapter.models.encoder import HALF, EncoderConfig, normalize_pixels
from vadapter.models.layers import Dtype, MlpKind, Norm, linear, trainable_tokens
from vadapter.models.stem import ConvStem
from vadapter.models.transformer import BlockConfig, Remat, Stack


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """A ViT (arXiv 2010.11929), pre-norm, with trainable positions.

    Attributes:
      patch: pixels a side (CoCa here: 288 and 18, 256 tokens). Rows and columns of pixels that are
        left at the bottom and on the right belong to no patch, as behind a convolution without
        padding (SigLIP at 384 and 14: 27 · 27 tokens).
      stem: how patches become tokens. linear: one projection of each. convolutions: a few of stride
        2, see `stem.ConvStem`.
      class_token: prepend one trainable token.
      registers: number of further trainable tokens, without positions (DINOv2).
      patches_only: do not return class token and registers.
      tap: the tokens that are returned. last | penultimate: those of that layer (LLaVA takes CLIP's
        penultimate); the model has no layers after it. queries: the pooler's, except its first,
        which CoCa contrasts with the text; its captioning decoder reads the others.
      pooler: after the last layer; used only with tap="queries".
      patch_bias: a bias of the patch projection.
      pre_norm: a norm before the first layer (CLIP).
      final_norm: a norm after the last layer.
      mlp, layer_scale, fused_attention: see `transformer.BlockConfig`.
      mean, std: pixel normalization, see `encoder.normalize_pixels`.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    mlp: MlpKind = "gelu"
    stem: Literal["linear", "convolutions"] = "linear"
    class_token: bool = False
    registers: int = 0
    patches_only: bool = False
    tap: Literal["last", "penultimate", "queries"] = "last"
    pooler: PoolerConfig | None = None
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
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

    @property
    def _side(self) -> int:
        """The number of patches a side; ConfigError if there is none."""
        c = self.config
        if c.image_size < c.patch:
            raise ConfigError(f"image_size={c.image_size} is less than one patch={c.patch}")
        return c.image_size // c.patch

    @nn.compact
    def __call__(self, frames: Num[Array, "B F H W 3"]) -> Float[Array, "B F N D"]:
        c = self.config
        # Frames are images: the encoder does not know time.
        x = rearrange(normalize_pixels(frames, c.mean, c.std), "b f h w c -> (b f) h w c")
        x = self._patches(x.astype(self.dtype))
        normal = nn.initializers.normal(0.02)

        def tokens(name: str, count: int, init: Any = normal) -> jax.Array:
            return trainable_tokens(self, name, (len(x), count, c.width), init, self.dtype)

        if c.class_token:
            x = jnp.concatenate([tokens("class_token", 1, nn.initializers.zeros), x], 1)
        x = x + tokens("positions", x.shape[1])
        if c.registers:
            # After the class token, whose place is the first, and after positions were added.
            first, patches = jnp.split(x, [int(c.class_token)], axis=1)
            x = jnp.concatenate([first, tokens("registers", c.registers), patches], 1)
        if c.pre_norm:
            x = self._norm("pre_norm")(x)
        block = BlockConfig(
            c.width, c.heads, c.mlp_dim, mlp=c.mlp, norm_eps=c.norm_eps, dropout=c.dropout,
            layer_scale=c.layer_scale, fused_attention=c.fused_attention, remat=c.remat,
        )  # fmt: skip
        x, _ = Stack(block, c.depth - (c.tap == "penultimate"), self.dtype, name="stack")(x)
        if c.final_norm and c.tap == "last":
            x = self._norm("norm")(x)
        if c.pooled:
            x = Pooler(c.pooled, self.dtype, name="pooler")(x[:, None])[:, 1:]
        elif c.patches_only:
            x = x[:, c.class_token + c.registers :]
        return rearrange(x, "(b f) n d -> b f n d", b=len(frames))

    def _patches(self, x: Float[Array, "n H W 3"]) -> Float[Array, "n N D"]:
        c = self.config
        used = self._side * c.patch
        x = x[:, :used, :used]
        if c.stem == "convolutions":
            x = ConvStem(c.width, c.patch, self.dtype, name="stem")(x)
            return rearrange(x, "n h w d -> n (h w) d")
        # A strided convolution over patches, as the matrix product that it is.
        x = rearrange(x, "n (h p) (w q) c -> n (h w) (p q c)", p=c.patch, q=c.patch)
        return linear(c.width, (None, "embed"), c.patch_bias, self.dtype, name="patches")(x)

    def _norm(self, name: str) -> Norm:
        return Norm("layer", self.config.norm_eps, self.dtype, name=name)
