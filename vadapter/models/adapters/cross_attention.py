"""Flamingo's gated cross-attention (arXiv 2204.14198): the LLM reads the image between its layers.

Before every n-th layer of the frozen language model, its states attend to the media tokens that the
rest of the chain gives, through gates that are closed at the start:

    x += tanh(a) · attention(norm(x), media)
    x += tanh(b) · mlp(norm(x))                a = b = 0: the language model as it was, bit for bit

There is no prefix. `AdapterModel` computes the keys and values of the media once, and
`transformer.Stack` runs these layers between its own.

Legend: B batch, T tokens, Q media tokens, D their width, E width of the language model, G gated
layers, H heads, K head dim.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float

from vadapter.errors import ConfigError
from vadapter.models.layers import Dtype, Mlp, Norm, attend, linear, partitioned


@dataclasses.dataclass(frozen=True)
class CrossAttentionConfig:
    """Gated cross-attention with Flamingo's sizes.

    Attributes:
      every: a gated layer before layers every - 1, 2 · every - 1, … of the language model.
      heads, head_dim: H and K, whatever the width.
      ffn: hidden width of the feed-forward as a multiple of E.
      width, depth: E and the number of layers of the language model; 0 takes those of the one that
        follows.
    """

    every: int = 1
    heads: int = 8
    head_dim: int = 64
    ffn: int = 4
    width: int = 0
    depth: int = 0

    DERIVED: ClassVar = ("width", "depth")

    def __post_init__(self) -> None:
        if self.depth and not 1 <= self.every <= self.depth:
            raise ConfigError(
                f"every={self.every}: the language model has {self.depth} layers; give 1 to "
                f"{self.depth}"
            )

    @property
    def layers(self) -> int:
        """G."""
        return self.depth // self.every


KeysValues = tuple[Float[Array, "G B Q H K"], Float[Array, "G B Q H K"]]


class GatedLayer(nn.Module):
    """One gated cross-attention and feed-forward."""

    config: CrossAttentionConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        inner, axes = c.heads * c.head_dim, ("embed", "heads")
        self.q, self.k, self.v = (linear(inner, axes, dtype=self.dtype) for _ in range(3))
        self.o = linear(c.width, ("heads", "embed"), dtype=self.dtype)
        self.norm_attn, self.norm_mlp = (Norm("layer", dtype=self.dtype) for _ in range(2))
        self.mlp = Mlp(c.ffn * c.width, "gelu_erf", dtype=self.dtype)
        closed = partitioned(nn.initializers.zeros)
        self.gate_attn = self.param("gate_attn", closed, ())
        self.gate_mlp = self.param("gate_mlp", closed, ())

    def keys_values(
        self, media: Float[Array, "B Q D"]
    ) -> tuple[Float[Array, "B Q H K"], Float[Array, "B Q H K"]]:
        """Return the keys and values of the media tokens."""
        return self._heads(self.k(media)), self._heads(self.v(media))

    def __call__(
        self, x: Float[Array, "B T E"],
        keys_values: tuple[Float[Array, "B Q H K"], Float[Array, "B Q H K"]],
        seen: Bool[Array, "B T"],
    ) -> Float[Array, "B T E"]:  # fmt: skip
        """Return the states of the next layer; tokens that are not `seen` attend to no media."""
        y = attend(self._heads(self.q(self.norm_attn(x))), *keys_values, None)
        y = self.o(rearrange(y, "b t h k -> b t (h k)")) * seen[:, :, None].astype(x.dtype)
        x = x + jnp.tanh(self.gate_attn).astype(x.dtype) * y
        return x + jnp.tanh(self.gate_mlp).astype(x.dtype) * self.mlp(self.norm_mlp(x))

    def _heads(self, x: Float[Array, "B T _"]) -> Float[Array, "B T H K"]:
        return rearrange(x, "b t (h k) -> b t h k", h=self.config.heads)


class CrossAttention(nn.Module):
    """The gated layers of a language model, their parameters stacked on a leading `layers` axis."""

    config: CrossAttentionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, media: Float[Array, "B Q D"]) -> Float[Array, "B Q D"]:
        """Create the parameters; return the media tokens, which the language model attends to."""
        if self.is_initializing():
            self._create(media)
        return media

    def _create(self, media: Float[Array, "B Q D"]) -> None:
        c = self.config

        def run(layer: GatedLayer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            seen = jnp.ones(x.shape[:2], bool)
            return layer(x, layer.keys_values(media.astype(self.dtype)), seen), None

        layers = nn.scan(
            run,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x = jnp.zeros((len(media), 1, c.width), self.dtype)
        layers(GatedLayer(c, self.dtype, name="layers"), x, None)


@flax.struct.dataclass
class Gated:
    """The gated layers of a language model for a batch: what `transformer.Stack` runs."""

    params: dict  #: of `GatedLayer`, stacked: G first
    keys_values: KeysValues  #: of the media tokens, for every layer
    config: CrossAttentionConfig = flax.struct.field(pytree_node=False)
    dtype: Dtype = flax.struct.field(pytree_node=False)

    def __call__(self, x: Float[Array, "B T E"], seen: Bool[Array, "B T"]) -> Float[Array, "B T E"]:
        """Run one layer, given without the leading G."""
        layer = GatedLayer(self.config, self.dtype, parent=None)
        return layer.apply({"params": self.params}, x, self.keys_values, seen)  # type: ignore[return-value]


def keys_values(module: CrossAttention, params: dict, media: Float[Array, "B Q D"]) -> KeysValues:
    """Return the keys and values of the media tokens for every gated layer, computed at once."""
    layer = GatedLayer(module.config, module.dtype, parent=None)
    media = media.astype(module.dtype)

    def of_layer(params: dict) -> tuple[jax.Array, jax.Array]:
        return layer.apply({"params": params}, media, method="keys_values")  # type: ignore[return-value]

    return jax.vmap(of_layer)(jax.tree.map(jnp.asarray, params["layers"]))
