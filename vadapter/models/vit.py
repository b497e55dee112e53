"""Vision transformer encoder.

Legend: B batch, F frames, H and W pixels, N visual tokens a frame, D encoder width.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vadapter.data.media.images import ImageTransform
from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.resampler import Pooler, PoolerConfig
from vadapter.models.encoder import EncoderConfig
from vadapter.models.layers import Dtype, MlpKind, Norm, linear, partitioned
from vadapter.models.transformer import BlockConfig, Remat, Stack


@dataclasses.dataclass(frozen=True)
class ViTConfig(EncoderConfig):
    """A ViT (arXiv 2010.11929), pre-norm, with learned positions.

    Attributes:
      patch: pixels; divides image_size (CoCa here: 288 and 18, 256 tokens).
      class_token: prepends one learned token; registers: so many more, without positions (DINOv2).
      patches_only: these are computed with, but not returned.
      tap: last | penultimate, the layer whose tokens are returned (LLaVA takes CLIP's penultimate);
        layers behind it do not exist. Or queries: those of the pooler behind the last layer, all
        but its first, which CoCa contrasts with the text: the captioning decoder reads the others.
      pooler: read with tap="queries" alone.
      patch_bias, pre_norm, final_norm: a bias of the patch projection, a norm in front of the first
        layer (CLIP), a norm on what is returned; the penultimate layer has no norm.
      mlp, layer_scale: see `transformer.BlockConfig`.
      mean, std: pixel normalization of values in 0..1.
    """

    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    mlp: MlpKind = "gelu"
    class_token: bool = False
    registers: int = 0
    patches_only: bool = False
    tap: Literal["last", "penultimate", "queries"] = "last"
    pooler: PoolerConfig | None = None
    patch_bias: bool = True
    pre_norm: bool = False
    final_norm: bool = True
    layer_scale: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm_eps: float = 1e-6
    dropout: float = 0.0
    remat: Remat = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tap == "queries" and self.pooler is None:
            raise ConfigError("tap='queries': this encoder has no pooler; take last or penultimate")

    @property
    def pooled(self) -> PoolerConfig | None:
        """The pooler whose queries are returned; None: a layer's tokens are."""
        return self.pooler if self.tap == "queries" else None


class ViT(nn.Module):
    """frames u8|f32[B,F,H,W,3] in 0..255 -> tokens [B,F,N,D]; H = W = image_size."""

    config: ViTConfig
    dtype: Dtype = jnp.float32

    @property
    def view(self) -> ImageTransform:
        return self.config.view

    @property
    def width(self) -> int:
        return (self.config.pooled or self.config).width

    def tokens_per_frame(self) -> int:
        c = self.config
        if c.pooled:
            return c.pooled.queries - 1
        extra = 0 if c.patches_only else c.class_token + c.registers
        return (c.image_size // c.patch) ** 2 + extra

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        c = self.config
        if c.image_size % c.patch:
            raise ConfigError(f"image_size={c.image_size} does not divide into patch={c.patch}")
        B, F = frames.shape[:2]
        row = lambda v: jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 1, 3)  # noqa: E731
        norm = lambda name: Norm("layer", c.norm_eps, self.dtype, name=name)  # noqa: E731
        x = (frames.astype(jnp.float32) / 255 - row(c.mean)) / row(c.std)
        x = rearrange(x, "b f (h p) (w q) c -> (b f) (h w) (p q c)", p=c.patch, q=c.patch)
        patches = linear(c.width, (None, "embed"), c.patch_bias, self.dtype, name="patches")
        x = patches(x.astype(self.dtype))
        if c.class_token:
            x = jnp.concatenate([self._tokens("class_token", 1, nn.initializers.zeros, x), x], 1)
        x = x + self._tokens("positions", x.shape[1], nn.initializers.normal(0.02), x)
        if c.registers:
            extra = self._tokens("registers", c.registers, nn.initializers.normal(0.02), x)
            at = int(c.class_token)
            x = jnp.concatenate([x[:, :at], extra, x[:, at:]], 1)
        if c.pre_norm:
            x = norm("pre_norm")(x)
        block = BlockConfig(
            c.width, c.heads, c.mlp_dim, mlp=c.mlp, norm_eps=c.norm_eps, dropout=c.dropout,
            layer_scale=c.layer_scale, remat=c.remat,
        )  # fmt: skip
        x, _ = Stack(block, c.depth - (c.tap == "penultimate"), self.dtype, name="stack")(x)
        if c.final_norm and c.tap == "last":
            x = norm("norm")(x)
        if c.pooled:
            x = Pooler(c.pooled, self.dtype, name="pooler")(x[:, None])[:, 1:]
        elif c.patches_only:
            x = x[:, c.class_token + c.registers :]
        return rearrange(x, "(b f) n d -> b f n d", b=B, f=F)

    def _tokens(self, name: str, count: int, init: Callable, like: jax.Array) -> jax.Array:
        """`count` learned vectors forevery row of `like`: [n, count, D]."""
        D = like.shape[-1]
        tokens = self.param(name, partitioned(init, None, None, "embed"), (1, count, D))
        tokens = constrain(tokens)
        return jnp.broadcast_to(tokens, (len(like), count, D)).astype(like.dtype)
