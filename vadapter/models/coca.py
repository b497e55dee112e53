"""CoCa pretraining of an encoder (arXiv 2205.01917): contrastive and captioning loss together.

The encoder is trained here once and frozen in all later stages. The text half that goes with it is
not used again.

Legend: B batch, Q captioning queries, T text tokens, M targets, E width of the text, W width of the
pooler, U contrastive width, V vocabulary.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vadapter.data.batch import Batch
from vadapter.models.adapter_model import Components, Params, Training, component_key
from vadapter.models.layers import Dtype, Norm, NormKind, linear, partitioned
from vadapter.models.lm import LM
from vadapter.models.transformer import BlockConfig, Remat, Stack, text_mask


@dataclasses.dataclass(frozen=True)
class FusionConfig:
    """CoCa's multimodal half of the text decoder, with its contrastive heads.

    Attributes:
      depth: layers with cross-attention to the pooled visual tokens.
      width, heads, mlp_dim: of those layers; width is the text component's.
      embed_dim: U.
      temperature: of the contrastive loss at initialization; it is trained.
    """

    depth: int
    width: int
    heads: int
    mlp_dim: int
    embed_dim: int = 512
    temperature: float = 0.07
    norm: NormKind = "layer"
    remat: Remat = "none"


Unit = tuple[Float[Array, "B U"], Float[Array, "B U"]]  # vectors of length 1: image, text


class Fusion(nn.Module):
    """Cross-attending layers over text states, two projections and a temperature."""

    config: FusionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        text: Float[Array, "B T E"],
        pooled: Float[Array, "B Q W"],
        summary: tuple[Float[Array, "B W"], Float[Array, "B E"]],
        mask: Bool[Array, "B T T"] | None,
    ) -> tuple[Float[Array, "B T E"], Unit, Float[Array, ""]]:
        """Return multimodal states, unit vectors of image and text, and the temperature.

        `text` has the states of the unimodal half, `pooled` the captioning queries, and `summary`
        the vectors of image and text that are contrasted.
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
class CoCa(Components):
    """Four components: encoder, pooler (its first query is the image summary), text, fusion.

    The text's summary is its state at the last word, which attends to the whole caption; CoCa
    appends a trainable token there instead.
    """

    encoder: str = "encoder"
    pooler: str = "pooler"
    text: str = "text"
    fusion: str = "fusion"

    def names(self) -> tuple[str, ...]:
        """Return the name of every component."""
        return self.encoder, self.pooler, self.text, self.fusion

    def __call__(
        self, params: Params, batch: Batch, training: Training | None = None
    ) -> tuple[Float[Array, "B M V"], Unit, Float[Array, ""]]:
        """Return caption logits, unit vectors, and the temperature; one caption a row."""
        assert "frames" in batch
        visual = self.apply(params, self.encoder, batch["frames"], training=training)
        pooled = self.apply(params, self.pooler, visual)
        mask = text_mask(batch["segments"])
        x = self.apply(params, self.text, batch["tokens"], method="embed")
        states, _ = self.apply(
            params, self.text, x, training=training, method="hidden",
            positions=batch["positions"], mask=mask,
        )  # fmt: skip
        last = jnp.maximum((batch["segments"] > 0).sum(1, keepdims=True) - 1, 0)
        summary = (pooled[:, 0], _select(states, last)[:, 0])
        fused, unit, temperature = self.apply(
            params, self.fusion, states, pooled[:, 1:], summary, mask, training=training
        )
        targets = _select(fused, batch["target_at"])
        logits = self.apply(params, self.text, targets, method="logits")
        return logits, unit, temperature

    def init(self, rng: jax.Array, frames: jax.ShapeDtypeStruct) -> dict[str, Any]:
        """Return random parameters of all four components, in logical-axis boxes."""
        encoder, pooler, text, fusion = (self.modules[name] for name in self.names())
        keys = [component_key(rng, name) for name in self.names()]
        assert isinstance(text, LM)
        pixels = jnp.zeros(frames.shape, frames.dtype)
        visual, of_encoder = encoder.init_with_output(keys[0], pixels)
        pooled, of_pooler = pooler.init_with_output(keys[1], visual)
        of_text = text.init(keys[2], jnp.zeros((1, 2), jnp.int32))
        states = jnp.zeros((len(pooled), 2, text.config.width))
        summary = (pooled[:, 0], states[:, 0])
        of_fusion = fusion.init(keys[3], states, pooled[:, 1:], summary, None)
        variables = (of_encoder, of_pooler, of_text, of_fusion)
        return {name: v["params"] for name, v in zip(self.names(), variables, strict=True)}


def _select(x: Float[Array, "B T E"], index: Any) -> Float[Array, "B _ E"]:
    """Return the states at the indices [B, _] of each row."""
    return jnp.take_along_axis(x, index[..., None], axis=1)
