"""Compiled programs that look into one trained stage.

Legend: B batch, F frames, S pixels a side, N visual tokens a frame, D encoder width, Q soft tokens,
P prompt tokens, E language model width, W whole words, K nearest ones, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vadapter.data.batch import Batch
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import filled, to_host, to_mesh, with_mesh
from vadapter.errors import ConfigError
from vadapter.evaluate.runner import Decoder
from vadapter.inspect.attention import Maps, arrange, make_attention
from vadapter.inspect.words import Words
from vadapter.models.adapter_model import AdapterModel, Params
from vadapter.models.lm import LM, LMConfig
from vadapter.models.losses import xent
from vadapter.stages.stage import Stage


class Nearest(NamedTuple):
    """The nearest whole words of vectors, best first."""

    index: Any  # i32[B,Q,K] in `Words`
    score: Any  # f32[B,Q,K]: cosine, or probability


class Look(NamedTuple):
    """What the soft tokens of a batch are near to."""

    norm: Any  # f32[B,Q]
    words: Nearest  # by cosine to the embeddings
    lens: dict[int, Nearest]  # layer -> by the probability of the head


class Probe:
    """The programs of a stage, each compiled once per shape of batch.

    Args:
      stage: restored, see `open_run`; on one host.
      words: the whole words of its tokenizer.
      layers: of the language model, 1 to its depth; (): the middle one.
      top: K.

    Raises:
      ConfigError: a layer that the language model does not have.
    """

    def __init__(self, stage: Stage, words: Words, layers: tuple[int, ...] = (), top: int = 5):
        self.stage, self.words = stage, words
        self.model, self.params = stage.adapter_model, stage.params
        self.decoder = Decoder(stage)
        period = self._lm.period
        self.layers = layers or (max(period, self.depth // 2 // period * period),)
        for layer in self.layers:
            if not 1 <= layer <= self.depth or layer % period:
                every = f", every {period} of them" if period > 1 else ""
                raise ConfigError(
                    f"--layer={layer}: {self.model.lm} of stage {stage.name} has layers 1 to "
                    f"{self.depth}{every}"
                )
        top = min(top, len(words.ids))
        self._encode = self._compile(self.model.encode)
        self._nats = self._compile(make_nats(self.model))
        self._look = self._compile(make_look(self.model, words.ids, self.layers, top))
        self._attend = self._compile(make_attention(self.model))

    def _compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        compiled = jit(with_mesh(self.stage.mesh, fn))
        return lambda rows: jax.tree.map(
            to_host, compiled(self.params, to_mesh(rows, self.stage.mesh))
        )

    @property
    def depth(self) -> int:
        """The number of layers of the language model."""
        return self._lm.depth

    @property
    def _lm(self) -> LMConfig:
        module = self.model.modules[self.model.lm]
        assert isinstance(module, LM)
        return module.config

    @property
    def without_prefix(self) -> str:
        """Why the language model reads no soft tokens; "" if it does."""
        if self.model.cross:
            return "none: the language model reads the image through gated cross-attention"
        return ""

    @property
    def encoder(self) -> Any:
        """The module of the vision encoder."""
        return self.model.modules[self.model.encoder]

    def encode(self, frames: np.ndarray) -> np.ndarray:
        """Return the visual tokens [B,F,N,D] of frames u8[B,F,S,S,3]."""
        rows = filled(len(frames), self.stage.mesh)
        padded = np.concatenate([frames, np.repeat(frames[-1:], rows - len(frames), axis=0)])
        return self._encode({"frames": padded})[: len(frames)]

    def nats(self, batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Return the loss of each row in nats and its number of targets, f32[B] each."""
        return self._nats(batch)

    def look(self, batch: Mapping[str, Any]) -> Look:
        """Return what is near the soft tokens of a batch of prompts."""
        return self._look(batch)

    def attention(self, features: np.ndarray) -> list[list[Maps]]:
        """Return the maps of each component with attention, of each row of features [B,F,N,D]."""
        rows = filled(len(features), self.stage.mesh)
        padded = np.resize(features, (rows, *features.shape[1:]))
        found = self._attend({"features": padded})
        return [
            [arrange(name, w[i], features.shape[1], self.encoder) for name, w in found.items()]
            for i in range(len(features))
        ]

    @functools.cached_property
    def word_norms(self) -> np.ndarray:
        """The norms of the words' embeddings as the language model reads them, f32[W]."""
        table = jit(functools.partial(_table, self.model))(self.params, self.words.ids)
        return to_host(jnp.linalg.norm(table, axis=-1))


def make_nats(model: AdapterModel) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Return a function (params, batch) -> nats and number of targets of each row, f32[B]."""

    def nats(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        states = model.hidden(params, model.encode(params, batch), batch)
        each = xent(model.logits(params, states), batch["targets"]) * batch["weights"]
        return each.sum(1), batch["weights"].sum(1)

    return nats


def make_look(
    model: AdapterModel, words: Int[np.ndarray, " W"], layers: tuple[int, ...], top: int
) -> Callable[[Params, Batch], Look]:
    """Return a function (params, batch of prompts) -> `Look`, of `top` words."""

    def look(params: Params, batch: Batch) -> Look:
        visual = model.encode(params, batch)
        assert visual is not None
        prefix = model.prefix(params, visual)
        of_words = _unit(_table(model, params, words))

        def near(row: Float[Array, "Q E"]) -> Nearest:
            score, index = jax.lax.top_k(_unit(row) @ of_words.T, top)
            return Nearest(index, score)

        soft = prefix.astype(jnp.float32)
        lens = {n: _lens(model, params, prefix, batch, n, words, top) for n in layers}
        norm = jnp.linalg.norm(soft, axis=-1)
        return Look(norm, jax.lax.map(near, soft), lens)

    return look


def _unit(x: Float[Array, "*n E"]) -> Float[Array, "*n E"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def _table(model: AdapterModel, params: Params, ids: np.ndarray) -> Float[Array, "W E"]:
    """Return the embeddings of tokens as the language model reads them, float32."""
    return model.apply(params, model.lm, ids[None], method="embed")[0].astype(jnp.float32)


def _lens(
    model: AdapterModel, params: Params, prefix: Float[Array, "B Q E"], batch: Batch, layer: int,
    words: Int[np.ndarray, " W"], top: int,
) -> Nearest:  # fmt: skip
    """Return the words that the head finds in the states of the soft tokens after some layers.

    The logit lens (nostalgebraist, 2020): the final norm and the head applied to the states of a
    layer. Probabilities are over the whole vocabulary; the nearest are of the whole words.
    """
    x, segments, positions = model.layout(params, prefix, batch)
    module, shallow = first_layers(model.modules[model.lm], params[model.lm], layer)
    mask = model.mask(segments, prefix, batch["tokens"].shape[1])
    states, _ = module.apply(
        {"params": shallow}, x, method="hidden", positions=positions, mask=mask
    )
    start = batch["prompt"].shape[1]

    def near(row: Float[Array, "Q E"]) -> Nearest:
        logits = model.logits(params, row).astype(jnp.float32)
        score, index = jax.lax.top_k(jax.nn.softmax(logits)[:, words], top)
        return Nearest(index, score)

    return jax.lax.map(near, states[:, start : start + prefix.shape[1]])


def first_layers(lm: Any, params: Mapping[str, Any], layers: int) -> tuple[LM, dict[str, Any]]:
    """Return a language model of the first layers of another, and its parameters."""
    module = LM(dataclasses.replace(lm.config, depth=layers), lm.dtype)
    blocks = jax.tree.map(lambda x: x[: layers // module.config.period], params["stack"]["blocks"])
    return module, {**params, "stack": {**params["stack"], "blocks": blocks}}


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of an option, `--layer=1,2,3`, each once; "": none.

    Raises:
      ConfigError: not whole numbers.
    """
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError:
        raise ConfigError(
            f"{option}={text}: whole numbers, for example {option}=2 or {option}=1,2,3"
        ) from None
