"""CoCa pretraining of an encoder (arXiv 2205.01917): contrastive and captioning loss together.

Legend: B batch, F frames, N visual tokens, Q queries, T text tokens, M targets, E width,
V vocabulary.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vadapter.models.adapter_model import Batch, Params, component_seed
from vadapter.models.layers import Dtype, Norm, NormKind, linear, partitioned
from vadapter.models.lm import LM
from vadapter.models.transformer import BlockConfig, Remat, Stack, text_mask


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """CoCa's multimodal half of the text decoder, with its contrastive heads.

    Attributes:
      depth: layers with cross-attention to the pooled visual tokens.
      width, heads, mlp_dim: of those layers; width is the text component's.
      embed_dim: of the contrastive space.
      temperature: starting value of the learned temperature.
    """

    depth: int
    width: int
    heads: int
    mlp_dim: int
    embed_dim: int = 512
    temperature: float = 0.07
    norm: NormKind = "layer"
    remat: Remat = "none"


class Fusion(nn.Module):
    """Cross-attending layers over text states, two projections and a temperature."""

    config: FusionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, text, pooled, summary, mask):
        """Joins both sides.

        Args:
          text: [B, T, E] states of the unimodal half.
          pooled: [B, Q, ·] captioning queries.
          summary: ([B, ·] image summary, [B, E] text summary).
          mask: bool[B, T, T].

        Returns:
          [B, T, E] multimodal states, ([B, ·] image, [B, ·] text) unit vectors, f32[] temperature.
        """
        c = self.config
        block = BlockConfig(c.width, c.heads, c.mlp_dim, norm=c.norm, cross=True, remat=c.remat)
        x, _ = Stack(block, c.depth, self.dtype, name="stack")(text, mask=mask, kv=pooled)
        unit = []
        for name, v in zip(("image", "text"), summary, strict=True):
            v = linear(c.embed_dim, ("embed", None), dtype=self.dtype, name=name)(v)
            v = v.astype(jnp.float32)
            unit.append(v / (jnp.linalg.norm(v, axis=-1, keepdims=True) + 1e-6))
        init = partitioned(nn.initializers.constant(jnp.log(c.temperature)))
        log_t = self.param("log_temperature", init, ())
        return Norm(c.norm, dtype=self.dtype, name="norm")(x), tuple(unit), jnp.exp(log_t)


@dataclasses.dataclass(frozen=True)
class CoCa:
    """Four components: encoder, pooler (its first query is the image summary), text, fusion.

    The text's summary is its state at the last word, which has read the whole caption; CoCa
    appends a learned token there instead.
    """

    modules: Mapping[str, nn.Module]
    encoder: str = "encoder"
    pooler: str = "pooler"
    text: str = "text"
    fusion: str = "fusion"

    def names(self) -> tuple[str, ...]:
        return self.encoder, self.pooler, self.text, self.fusion

    def __call__(
        self, params: Params, batch: Batch, rng: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array], jax.Array]:
        """Batch -> caption logits [B, M, V], image and text unit vectors [B, ·], temperature.

        Uses one caption a row.
        """
        visual = self._apply(params, self.encoder, batch["frames"], rng=rng)
        pooled = self._apply(params, self.pooler, visual)
        mask = text_mask(batch["segments"])
        x = self._apply(params, self.text, batch["tokens"], method="embed")
        states, _ = self._apply(
            params, self.text, x, method="hidden", positions=batch["positions"], mask=mask, rng=rng
        )
        at = lambda x, i: jnp.take_along_axis(x, i[..., None], axis=1)  # noqa: E731
        last = jnp.maximum((batch["segments"] > 0).sum(1, keepdims=True) - 1, 0)
        summary = (pooled[:, 0], at(states, last)[:, 0])
        fused, unit, temperature = self._apply(
            params, self.fusion, states, pooled[:, 1:], summary, mask, rng=rng
        )
        logits = self._apply(params, self.text, at(fused, batch["target_at"]), method="logits")
        return logits, unit, temperature

    def _apply(
        self, params: Params, name: str, *args: Any, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, component_seed(name))}
        return self.modules[name].apply({"params": params[name]}, *args, rngs=rngs, **kwargs)

    def init(self, rng: jax.Array, frames: jax.ShapeDtypeStruct) -> dict[str, Any]:
        """Random parameters of all four components, in logical-axis boxes."""
        key = {n: jax.random.fold_in(rng, component_seed(n)) for n in self.names()}
        text = self.modules[self.text]
        assert isinstance(text, LM)
        visual, encoder = self.modules[self.encoder].init_with_output(
            key[self.encoder], jnp.zeros(frames.shape, frames.dtype)
        )
        pooled, pooler = self.modules[self.pooler].init_with_output(key[self.pooler], visual)
        states = jnp.zeros((len(pooled), 2, text.config.width))
        fusion = self.modules[self.fusion].init(
            key[self.fusion], states, pooled[:, 1:], (pooled[:, 0], states[:, 0]), None
        )
        return {
            self.encoder: encoder["params"],
            self.pooler: pooler["params"],
            self.text: text.init(key[self.text], jnp.zeros((1, 2), jnp.int32))["params"],
            self.fusion: fusion["params"],
        }
