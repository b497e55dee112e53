"""The method: vision encoder → chain of adapter parts → language model.

Stage 1, stage 2 and every baseline are this one model with other parts in the chain:

    stage 1     resampler, fc_in                → tlm
    stage 2     resampler, fc_in, tlm, fc_out   → llm
    baseline    resampler, fc_out               → llm
    LLaVA       mlp                             → llm
    Flamingo    perceiver, cross_attention      → llm, between its layers
    text only   (no encoder, empty chain)       → tlm or llm

Stage 1 teaches the tiny LM to caption from visual tokens. Stage 2 moves it into the chain, in front
of a frozen LLM: there it is used through its hidden states, one per query, and no longer predicts
words. The last language model predicts the text. Parameters are a dict keyed by component name.

Legend: B batch, F frames, N visual tokens a frame, Q queries, P prompt tokens, T text tokens,
S = P + Q + T, M targets, D encoder width, E width of a language model, V vocabulary.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from vadapter.data.batch import Batch
from vadapter.errors import ConfigError
from vadapter.models.adapters import cross_attention, words
from vadapter.models.adapters.cross_attention import CrossAttention, Gated, KeysValues
from vadapter.models.adapters.words import Words
from vadapter.models.delta import BOTH_WAYS
from vadapter.models.layers import ATTENTION
from vadapter.models.lm import LM
from vadapter.models.transformer import text_mask, unpadded_rows

Params = Mapping[str, Any]  # component name -> tree of arrays


def component_key(rng: jax.Array, name: str) -> jax.Array:
    """Return a component's own key, which does not depend on what else is in the model."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


@flax.struct.dataclass
class Training:
    """What a training step knows beyond its arguments; evaluations have none of it.

    Attributes:
      key: of everything random, a function of seed and step.
      step: i32[], number of steps before this one, for schedules inside the model.
      dropout: draw dropout masks.
    """

    key: jax.Array
    step: jax.Array
    dropout: bool = flax.struct.field(pytree_node=False, default=True)


@dataclasses.dataclass(frozen=True)
class Components:
    """Flax modules by name, each trained, frozen, stored and initialized on its own.

    Attributes:
      sown: component -> list that receives what its attentions sow in each of its calls, see
        `layers.ATTENTION`; for components that are not in it they sow nothing.
    """

    modules: Mapping[str, nn.Module]
    sown: Mapping[str, list[Any]] = dataclasses.field(default_factory=dict, kw_only=True)

    def apply(
        self, params: Params, name: str, *args: Any, training: Training | None = None, **kwargs: Any
    ) -> Any:
        """Call `Module.apply` of a component with its parameters; dropout needs `training`."""
        rngs = {}
        if training is not None and training.dropout:
            rngs["dropout"] = component_key(training.key, name)
        module, variables = self.modules[name], {"params": params[name]}
        if name not in self.sown:
            return module.apply(variables, *args, rngs=rngs, **kwargs)
        out, sown = module.apply(variables, *args, rngs=rngs, mutable=[ATTENTION], **kwargs)
        self.sown[name].append(sown)
        return out


def merge_frames(x: Float[Array, "B ..."]) -> Float[Array, "B Q E"]:
    """Return visual tokens [B, F, N, E] as one sequence [B, F·N, E]; a sequence as it is."""
    return rearrange(x, "b f n e -> b (f n) e") if x.ndim == 4 else x


@dataclasses.dataclass(frozen=True)
class AdapterModel(Components):
    """The model of one stage: modules by component name, and how they are joined.

    Attributes:
      lm: the component that predicts the text.
      chain: components between encoder and `lm`, in order.
      encoder: the vision encoder's component; "" for text only.
      bidirectional: the queries attend to each other in both directions inside the language models
        that are trained: those of the chain, and `lm` unless it is frozen. Texts remain causal.
      frozen_lm: no parameters of `lm` are trained. Its last block then computes the states of the
        text alone, as nothing reads those of the prefix.
    """

    lm: str
    chain: tuple[str, ...] = ()
    encoder: str = ""
    bidirectional: bool = False
    frozen_lm: bool = False

    def names(self) -> tuple[str, ...]:
        """Return the name of every component, in the order of the data flow."""
        return (*((self.encoder,) if self.encoder else ()), *self.chain, self.lm)

    # -- forward: encode → prefix → layout → hidden → logits ------------------------------------

    def encode(self, params: Params, batch: Mapping[str, Any]) -> Float[Array, "B F N D"] | None:
        """Return the visual tokens of `frames`, or the cached `features`; None for text only."""
        if not self.encoder:
            return None
        if "features" in batch:  # a frozen encoder's tokens, computed once before training
            return jnp.asarray(batch["features"])
        assert "frames" in batch
        tokens = self.apply(params, self.encoder, batch["frames"])
        # The encoder is never trained here: without this, its activations would be kept.
        return jax.lax.stop_gradient(tokens)

    def prefix(
        self, params: Params, visual: Float[Array, "B F N D"], training: Training | None = None
    ) -> Float[Array, "B Q E"]:
        """Return the prefix of the language model: visual tokens passed through the chain.

        If the chain ends in gated cross-attention, there is no prefix: these are the media tokens.
        """
        x: Any = visual
        for name in self.chain:
            if isinstance(self.modules[name], Words):
                x = self._words(params, name, merge_frames(x), training)
            elif isinstance(self.modules[name], LM):  # as an adapter: its states, one per query
                x = merge_frames(x)
                positions, causal = unpadded_rows(*x.shape[:2])
                mask = None if self.bidirectional else causal
                x, _ = self.apply(
                    params, name, x, training=training, method="hidden", positions=positions,
                    mask=mask,
                )  # fmt: skip
            else:
                x = self.apply(params, name, x, training=training)
        return merge_frames(x)

    def hidden(
        self, params: Params, visual: Float[Array, "B F N D"] | None, batch: Batch,
        training: Training | None = None,
    ) -> Float[Array, "B M E"]:  # fmt: skip
        """Return the language model's states that predict the targets."""
        prefix = None if visual is None else self.prefix(params, visual, training)
        return self.read(params, prefix, batch, training)

    def read(
        self, params: Params, prefix: Float[Array, "B Q E"] | None, batch: Batch,
        training: Training | None = None,
    ) -> Float[Array, "B M E"]:  # fmt: skip
        """Return the same as `hidden`, given the prefix instead of the visual tokens."""
        return self.at_targets(self.states(params, prefix, batch, training), batch)

    def states(
        self, params: Params, prefix: Float[Array, "B Q E"] | None, batch: Batch,
        training: Training | None = None,
    ) -> Float[Array, "B _ E"]:  # fmt: skip
        """Return the language model's states of `layout`'s tokens; of the text if it is frozen.

        The last T are those of the text, and the last Q before it those of the queries.
        """
        x, segments, positions = self.layout(params, prefix, batch)
        text_len = batch["tokens"].shape[1]
        states, _ = self.apply(
            params, self.lm, x, training=training, method="hidden", positions=positions,
            mask=self.mask(segments, prefix, text_len), last=text_len if self.frozen_lm else 0,
            **self.between(params, self.media(params, prefix), segments > 0),
        )  # fmt: skip
        return states

    def at_targets(self, states: Float[Array, "B _ E"], batch: Batch) -> Float[Array, "B M E"]:
        """Return those of `states` that predict the targets.

        They alone go on to the output head, whose logits are the largest array of a step.
        """
        text = states[:, -batch["tokens"].shape[1] :]
        return jnp.take_along_axis(text, batch["target_at"][:, :, None], axis=1)

    # -- gated cross-attention and words --------------------------------------------------------

    @property
    def cross(self) -> str:
        """The component of gated cross-attention; "" without."""
        return self._last(CrossAttention)

    def _last(self, kind: type[nn.Module]) -> str:
        """Return the last component of the chain if it is of a kind, else ""."""
        return next((n for n in self.chain[-1:] if isinstance(self.modules[n], kind)), "")

    def media(self, params: Params, prefix: Float[Array, "B Q D"] | None) -> KeysValues | None:
        """Return the keys and values of the media tokens; None without gated cross-attention."""
        if not self.cross or prefix is None:
            return None
        module: Any = self.modules[self.cross]
        return cross_attention.keys_values(module, params[self.cross], prefix)

    def between(
        self, params: Params, media: KeysValues | None, seen: Bool[Array, "B T"]
    ) -> dict[str, Any]:
        """Return the arguments of `LM.hidden` for gated cross-attention from the tokens `seen`."""
        if media is None:
            return {}
        module: Any = self.modules[self.cross]
        gated = Gated(params[self.cross]["layers"], media, module.config, module.dtype)
        return {"gated": gated, "seen": seen}

    def word_ids(self, params: Params, x: Float[Array, "B Q E"], name: str) -> Int[Array, "B Q"]:
        """Return the words that component `name` makes of soft tokens outside training."""
        config: Any = self.modules[name].config  # type: ignore[attr-defined]
        return words.nearest(config, lambda x: self.logits(params, x), x)

    def _words(
        self, params: Params, name: str, x: Float[Array, "B Q E"], training: Training | None
    ) -> Float[Array, "B Q E"]:
        """Return the embeddings of the words that soft tokens are turned into."""
        if training is None:
            return self.apply(params, self.lm, self.word_ids(params, x, name), method="embed")
        config: Any = self.modules[name].config  # type: ignore[attr-defined]
        return words.sample(
            config, lambda x: self.logits(params, x),
            lambda weights: self.apply(params, self.lm, weights, method="mix"),
            x, component_key(training.key, name), training.step,
        )  # fmt: skip

    def prefix_words(
        self, params: Params, visual: Float[Array, "B F N D"]
    ) -> Int[Array, "B Q"] | None:
        """Return the ids of a prefix that consists of words; None if it does not."""
        if not (last := self._last(Words)):
            return None
        before = dataclasses.replace(self, chain=self.chain[:-1])
        return self.word_ids(params, before.prefix(params, visual), last)

    # -- the language model's sequence ----------------------------------------------------------

    def logits(self, params: Params, states: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """Return the scores of the next token, see `LM.logits`."""
        return self.apply(params, self.lm, states, method="logits")

    def layout(
        self, params: Params, prefix: Float[Array, "B Q E"] | None, batch: Batch
    ) -> tuple[Float[Array, "B S E"], Int[Array, "B S"], Int[Array, "B S"]]:
        """Join [prompt][visual prefix][text] into the sequence that the language model reads.

        Padding, wherever it is, takes no position, so that a short prompt reads as it would alone;
        every text of a row starts at the position after the prefix. With gated cross-attention
        `prefix` are media tokens, which are not part of the sequence.

        Returns:
          Embeddings, segments (-1 prompt and prefix, 0 padding, 1… texts) and positions.
        """
        prompt, tokens = batch["prompt"], batch["tokens"]
        prefix = None if self.cross else prefix
        # One lookup for both: the gradient of each is as large as the vocabulary.
        ids = jnp.concatenate([jnp.maximum(prompt, 0), tokens], axis=1)
        words = self.apply(params, self.lm, ids, method="embed")
        parts = jnp.split(words, [prompt.shape[1]], axis=1)
        shared = [jnp.where(prompt >= 0, -1, 0)]
        if prefix is not None:
            parts.insert(1, prefix.astype(words.dtype))
            shared.append(jnp.full(prefix.shape[:2], -1, jnp.int32))
        shared = jnp.concatenate(shared, axis=1)
        used = jnp.cumsum(shared != 0, axis=1)
        start = used[:, -1:] if shared.shape[1] else jnp.zeros((len(tokens), 1), jnp.int32)
        positions = jnp.concatenate([jnp.maximum(used - 1, 0), start + batch["positions"]], axis=1)
        segments = jnp.concatenate([shared, batch["segments"]], axis=1)
        return jnp.concatenate(parts, axis=1), segments, positions

    def mask(
        self, segments: Int[Array, "B S"], prefix: Float[Array, "B Q E"] | None, text_len: int
    ) -> Bool[Array, "B S S"]:
        """Return where the tokens of `layout` attend, whose last `text_len` are the text.

        As `text_mask` says, and the queries to each other if the model is bidirectional.
        """
        mask = text_mask(segments)
        if not self.bidirectional or self.frozen_lm or prefix is None:
            return mask
        lm = self.modules[self.lm]
        if isinstance(lm, LM) and lm.config.delta is not None:
            raise ConfigError(BOTH_WAYS)
        end = segments.shape[1] - text_len
        at = jnp.arange(segments.shape[1])
        query = (at >= end - prefix.shape[1]) & (at < end)
        return mask | (query[None, :, None] & query[None, None, :])

    # -- parameters ----------------------------------------------------------------------------

    def init(self, rng: jax.Array, visual: jax.ShapeDtypeStruct | None) -> dict[str, Any]:
        """Return random parameters of every component but the encoder, in logical-axis boxes.

        Each component's randomness depends on its name alone, not on what else is in the model:
        a part starts the same in every stage and baseline. `visual` has the shape of the encoder's
        tokens, [B, F, N, D]; None for text only.
        """
        params: dict[str, Any] = {}
        x = visual
        for name in self.chain:
            assert x is not None
            init, key = self.modules[name].init_with_output, component_key(rng, name)
            zeros = jnp.zeros(x.shape, x.dtype)
            if isinstance(self.modules[name], LM):
                # Through `hidden` alone: in the chain it needs neither embedding nor head.
                zeros = merge_frames(zeros)
                positions = jnp.zeros(zeros.shape[:2], jnp.int32)
                (out, _), variables = init(key, zeros, method="hidden", positions=positions)
            else:
                out, variables = init(key, zeros)
            params[name] = variables.get("params", {})
            x = jax.ShapeDtypeStruct(out.shape, out.dtype)
        tokens = jnp.zeros((1, 2), jnp.int32)
        params[self.lm] = self.modules[self.lm].init(component_key(rng, self.lm), tokens)["params"]
        return params
