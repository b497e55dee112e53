"""Composition: encoder → chain of adapter parts → language model.

Stage 1, stage 2 and every baseline are this one model with other parts in the chain:

    stage 1     resampler, fc_in                → tlm
    stage 2     resampler, fc_in, tlm, fc_out   → llm
    baseline    resampler, fc_out               → llm
    LLaVA       mlp                             → llm
    text only   (no encoder, empty chain)       → tlm or llm

A language model inside the chain is used through its hidden states, one per query; the last
one predicts the text. Parameters are a dict keyed by component name.

Legend: B batch, F frames, N visual tokens a frame, Q queries, P prompt tokens, T text tokens,
M targets, D encoder width, E language model width, V vocabulary.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vadapter.models.layers import Dtype, default_init, linear
from vadapter.models.lm import LM
from vadapter.models.transformer import text_mask

Params = Mapping[str, Any]
Batch = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ProjectionConfig:
    """One fully connected layer that matches dimensions (paper, section 3).

    Attributes:
      width: output width; 0 takes the width of the language model that follows in the chain.
      scale: standard deviation of the output at initialization, for unit-variance input.
    """

    width: int = 0
    scale: float = 1.0


class Projection(nn.Module):
    """[..., in] -> [..., width]."""

    config: ProjectionConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = lambda *args: default_init(*args) * self.config.scale  # noqa: E731
        return linear(self.config.width, (None, "embed"), True, self.dtype, init, name="out")(x)


@dataclasses.dataclass(frozen=True)
class AdapterModel:
    """The model of one stage: modules by component name, and how they are joined.

    Attributes:
      modules: component name -> Flax module, forevery component in `encoder`, `chain`, `lm`.
      lm: the component that predicts the text.
      chain: components between encoder and `lm`, in order.
      encoder: the vision encoder's component; "" for text only.
      bidirectional: queries see each other both ways inside a language model of the chain.
      frozen_lm: no parameters of `lm` are trained. Its last block then runs for the text alone,
        which changes no state of the text.
    """

    modules: Mapping[str, nn.Module]
    lm: str
    chain: tuple[str, ...] = ()
    encoder: str = ""
    bidirectional: bool = False
    frozen_lm: bool = False

    def names(self) -> tuple[str, ...]:
        """Every component, in the order of the data flow."""
        return (*((self.encoder,) if self.encoder else ()), *self.chain, self.lm)

    # -- forward -------------------------------------------------------------------------------

    def encode(self, params: Params, batch: Batch) -> jax.Array | None:
        """Visual tokens [B,F,N,D] of `frames`, or the cached `features`; None for text only."""
        if not self.encoder:
            return None
        if "features" in batch:
            return jnp.asarray(batch["features"])
        tokens = self._apply(params, self.encoder, batch["frames"])
        return jax.lax.stop_gradient(tokens)

    def prefix(self, params: Params, visual: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        """Visual tokens [B,F,N,D] -> the prefix [B,Q,E] of the language model."""
        x = visual
        for name in self.chain:
            if isinstance(self.modules[name], LM):
                x = self._states(params, name, x, rng)
            else:
                x = self._apply(params, name, x)
        return x

    def hidden(
        self, params: Params, visual: jax.Array | None, batch: Batch, rng: jax.Array | None = None
    ) -> jax.Array:
        """The language model's states that predict the targets, [B, M, E].

        Args:
          params: of every component but the encoder.
          visual: [B,F,N,D] from `encode`.
          batch: see `vadapter.data.batch`.
          rng: turns dropout on.
        """
        prefix = None if visual is None else self.prefix(params, visual, rng)
        return self.read(params, prefix, batch, rng)

    def read(
        self, params: Params, prefix: jax.Array | None, batch: Batch, rng: jax.Array | None = None
    ) -> jax.Array:
        """As `hidden`, from a prefix [B,Q,E] that is already there."""
        x, segments, positions = self.layout(params, prefix, batch)
        text_len = batch["tokens"].shape[1]
        states, _ = self._apply(
            params,
            self.lm,
            x,
            rng=rng,
            method="hidden",
            positions=positions,
            mask=text_mask(segments),
            last=text_len if self.frozen_lm else 0,
        )
        text = states[:, -text_len:]
        return jnp.take_along_axis(text, batch["target_at"][:, :, None], axis=1)

    def logits(self, params: Params, states: jax.Array) -> jax.Array:
        """[B, M, E] -> [B, M, V], see `LM.logits`."""
        return self._apply(params, self.lm, states, method="logits")

    def layout(
        self, params: Params, prefix: jax.Array | None, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Joins [prompt][visual prefix][text]: embeddings [B,S,E], segments and positions i32[B,S].

        Padding, wherever it is, takes no position; a text starts where the prefix ends.
        """
        prompt, tokens = batch["prompt"], batch["tokens"]
        # One lookup: the gradient of each is as large as the vocabulary.
        ids = jnp.concatenate([jnp.maximum(prompt, 0), tokens], axis=1)
        words = self._apply(params, self.lm, ids, method="embed")
        parts = jnp.split(words, [prompt.shape[1]], axis=1)
        front = [jnp.where(prompt >= 0, -1, 0)]
        if prefix is not None:
            parts.insert(1, prefix.astype(words.dtype))
            front.append(jnp.full(prefix.shape[:2], -1, jnp.int32))
        front = jnp.concatenate(front, axis=1)
        used = jnp.cumsum(front != 0, axis=1)
        start = used[:, -1:] if front.shape[1] else jnp.zeros((len(tokens), 1), jnp.int32)
        positions = jnp.concatenate([jnp.maximum(used - 1, 0), start + batch["positions"]], axis=1)
        segments = jnp.concatenate([front, batch["segments"]], axis=1)
        return jnp.concatenate(parts, axis=1), segments, positions

    def _states(self, params: Params, name: str, x: jax.Array, rng: jax.Array | None) -> jax.Array:
        """Hidden states of a language model of the chain, one per query: [B,Q,·] -> [B,Q,·]."""
        B, Q, _ = x.shape
        positions = jnp.broadcast_to(jnp.arange(Q), (B, Q))
        mask = None
        if not self.bidirectional:
            mask = jnp.broadcast_to(jnp.tril(jnp.ones((Q, Q), bool)), (B, Q, Q))
        return self._apply(
            params, name, x, rng=rng, method="hidden", positions=positions, mask=mask
        )[0]

    def _apply(
        self, params: Params, name: str, *args: Any, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        rngs = {} if rng is None else {"dropout": jax.random.fold_in(rng, component_seed(name))}
        return self.modules[name].apply({"params": params[name]}, *args, rngs=rngs, **kwargs)

    # -- parameters ----------------------------------------------------------------------------

    def init(self, rng: jax.Array, visual: jax.ShapeDtypeStruct | None) -> dict[str, Any]:
        """Random parameters of every component but the encoder, in logical-axis boxes.

        Each component's randomness depends on its name alone, not on what else is in the model.

        Args:
          rng: key.
          visual: shape of the encoder's tokens, [B,F,N,D]; None for text only.
        """
        params: dict[str, Any] = {}
        x = visual
        for name in self.chain:
            module = self.modules[name]
            key = jax.random.fold_in(rng, component_seed(name))
            if isinstance(module, LM):
                call = lambda m, x: m.hidden(x, positions=jnp.zeros(x.shape[:2], jnp.int32))[0]  # noqa: E731
            else:
                call = lambda m, x: m(x)  # noqa: E731
            assert x is not None
            zeros = jnp.zeros(x.shape, x.dtype)
            out, variables = nn.init_with_output(call, module)(key, zeros)
            params[name] = variables["params"]
            x = jax.ShapeDtypeStruct(out.shape, out.dtype)
        key = jax.random.fold_in(rng, component_seed(self.lm))
        params[self.lm] = self.modules[self.lm].init(key, jnp.zeros((1, 2), jnp.int32))["params"]
        return params


def component_seed(name: str) -> int:
    """A stable 32-bit number for a component's name."""
    return int(np.uint32(zlib.crc32(name.encode())))
