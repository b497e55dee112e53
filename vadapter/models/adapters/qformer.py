"""BLIP-2's Q-Former (arXiv 2301.12597): trainable queries that read the visual tokens.

A BERT whose only inputs are the queries; every second layer also attends to the visual tokens. It
is what BLIP-2 trains against a frozen LLM: the text branch, which shares the self-attention and is
trained in an earlier stage, is left out.

Legend: B batch, F frames, N visual tokens a frame, S = F · N visual tokens a row, Q queries,
D encoder width, E width of the queries.

Source: Blip2QFormerModel of transformers.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.resampler import add_time_embedding
from vadapter.models.layers import (
    Attention,
    Dtype,
    Mlp,
    MlpKind,
    Norm,
    linear,
    trainable_tokens,
)
from vadapter.models.transformer import Remat, scan_layers

_init = nn.initializers.normal(0.02)  # of everything but norms and biases, as in BERT
_linear = functools.partial(linear, kernel_init=_init)


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Sizes of the Q-Former; the defaults are those of BLIP-2's, a BERT-base.

    Attributes:
      queries: Q.
      width: E, divisible by `heads`.
      cross_every: layers 0, `cross_every`, 2 · `cross_every`, … attend to the visual tokens. It
        divides `depth`.
      norm_eps: of the norms of layers and queries.
      dropout: at the entry and on every residual branch (not on attention weights), active only
        where a `dropout` rng is given.
      norm_visual: a LayerNorm on the visual tokens, with epsilon `visual_eps`.
      time_embed: a trainable embedding for each of `frames`, added to the visual tokens. Without
        it, the Q-Former does not see the order of frames.
      remat: what the backward pass recomputes, see `BlockConfig`.
    """

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_dim: int = 3072
    cross_every: int = 2
    mlp: MlpKind = "gelu_erf"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    norm_visual: bool = True
    visual_eps: float = 1e-6
    time_embed: bool = False
    frames: int = 8
    remat: Remat = "none"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} is not divisible by heads={self.heads}")
        if self.cross_every < 1 or self.depth % self.cross_every:
            raise ConfigError(
                f"depth={self.depth} is not divisible by cross_every={self.cross_every}"
            )


class QFormerLayer(nn.Module):
    """x = norm(x + f(x)), with f self-attention, then cross-attention, then feed-forward."""

    config: QFormerConfig
    cross: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q E"], visual: Float[Array, "B S D"]
    ) -> Float[Array, "B Q E"]:
        c = self.config
        attention = functools.partial(
            Attention, c.heads, c.heads, c.width // c.heads, True, dtype=self.dtype, linear=_linear
        )
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))

        def add(name: str, y: Float[Array, "B Q E"]) -> Float[Array, "B Q E"]:
            return Norm("layer", c.norm_eps, self.dtype, name=name)(x + drop(y))

        x = add("norm_attn", attention(name="attn")(x)[0])
        if self.cross:
            x = add("norm_cross", attention(name="cross")(x, visual)[0])
        return add("norm_mlp", Mlp(c.mlp_dim, c.mlp, True, self.dtype, _linear, name="mlp")(x))


class QFormerGroup(nn.Module):
    """`cross_every` layers, of which the first attends to the visual tokens."""

    config: QFormerConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B Q E"], visual: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B Q E"], None]:
        x = constrain(x, "batch")
        for i in range(self.config.cross_every):
            x = QFormerLayer(self.config, i == 0, self.dtype, name=f"layer_{i}")(x, visual)
        return x, None  # what `nn.scan` expects: the carry, and nothing to stack


class QFormer(nn.Module):
    """Scanned groups of layers: parameters of `groups` have a leading axis, one for each group."""

    config: QFormerConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c = self.config
        visual = visual.astype(self.dtype)
        if c.norm_visual:
            visual = Norm("layer", c.visual_eps, self.dtype, name="norm_visual")(visual)
        if c.time_embed:
            visual = add_time_embedding(self, visual, c.frames)
        visual = constrain(rearrange(visual, "b f n d -> b (f n) d"), "batch")
        shape = (len(visual), c.queries, c.width)
        x = trainable_tokens(self, "queries", shape, _init, self.dtype)
        x = Norm("layer", c.norm_eps, self.dtype, name="norm")(x)
        x = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))(x)
        count = c.depth // c.cross_every
        groups = scan_layers(QFormerGroup, count, c.remat, nn.broadcast, (x, visual))
        return groups(c, self.dtype, name="groups")(x, visual)[0]
