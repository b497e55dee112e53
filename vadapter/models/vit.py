"""Vision transformer encoder.

Legend: B batch, F frames, H and W pixels, N visual tokens a frame, D encoder width.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from vadapter.models.layers import Dtype, Norm, linear, partitioned
from vadapter.models.transformer import BlockConfig, Stack


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A ViT (arXiv 2010.11929), pre-norm, with learned positions.

    Attributes:
      image_size, patch: pixels; patch divides image_size (CoCa here: 288 and 18, 256 tokens).
      class_token: prepends one learned token, which is returned with the others.
      mean, std: pixel normalisation of values in 0..1.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    class_token: bool = False
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    norm_eps: float = 1e-6
    dropout: float = 0.0
    remat: str = "none"


class ViT(nn.Module):
    """frames u8|f32[B,F,H,W,3] in 0..255 -> tokens [B,F,N,D]; H = W = image_size."""

    config: ViTConfig
    dtype: Dtype = jnp.float32

    @property
    def image_size(self) -> int:
        return self.config.image_size

    @property
    def width(self) -> int:
        return self.config.width

    def tokens_per_frame(self) -> int:
        return (self.config.image_size // self.config.patch) ** 2 + self.config.class_token

    @nn.compact
    def __call__(self, frames: jax.Array) -> jax.Array:
        c = self.config
        B, F = frames.shape[:2]
        row = lambda v: jnp.asarray(v, jnp.float32).reshape(1, 1, 1, 1, 3)  # noqa: E731
        x = (frames.astype(jnp.float32) / 255 - row(c.mean)) / row(c.std)
        x = rearrange(x, "b f (h p) (w q) c -> (b f) (h w) (p q c)", p=c.patch, q=c.patch)
        x = linear(c.width, (None, "embed"), True, self.dtype, name="patches")(x.astype(self.dtype))
        if c.class_token:
            token = self.param(
                "class_token",
                partitioned(nn.initializers.zeros, None, None, "embed"),
                (1, 1, c.width),
            )
            x = jnp.concatenate(
                [jnp.broadcast_to(token, (len(x), 1, c.width)).astype(x.dtype), x], 1
            )
        positions = self.param(
            "positions",
            partitioned(nn.initializers.normal(0.02), None, None, "embed"),
            (1, x.shape[1], c.width),
        )
        x = x + positions.astype(x.dtype)
        block = BlockConfig(
            c.width, c.heads, c.mlp_dim, norm_eps=c.norm_eps, dropout=c.dropout, remat=c.remat
        )
        x, _ = Stack(block, c.depth, self.dtype, name="stack")(x)
        x = Norm("layer", c.norm_eps, self.dtype, name="norm")(x)
        return rearrange(x, "(b f) n d -> b f n d", b=B, f=F)
