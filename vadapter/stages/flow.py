"""Shapes on their way through a stage's model, and the sizes that do not fit together.

Legend: B batch, F frames, S pixels per side, N visual tokens per frame, D encoder width, Q queries,
E language model width, P prompt tokens, T text tokens, M targets, V vocabulary.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vadapter.data.example import Example, Features, Question
from vadapter.errors import ConfigError, UserError
from vadapter.models.coca import CoCa
from vadapter.models.lm import LM
from vadapter.recipe.schema import StageConfig
from vadapter.stages.abstract_state import Model

Shapes = dict[str, jax.ShapeDtypeStruct]


def flow(
    model: Model, params: Mapping[str, Any], batch: Shapes, exact: bool = True,
    memo: dict[Any, Any] | None = None,
) -> Iterator[tuple[str, tuple[Any, Any]]]:  # fmt: skip
    """Yield each component with the shapes of its input and output, in the order of the data flow.

    The input of the last language model is {prompt, prefix, tokens}: i32[B,P], [B,Q,E], i32[B,T];
    with gated cross-attention, prefix are the media tokens, which are not part of its sequence.
    A row longer than a language model's max_len is a ConfigError; P counts only if it is `exact`,
    not an upper bound. `memo` keeps outputs of components for further batches, most of which differ
    in the length of texts alone.
    """
    memo = {} if memo is None else memo

    def output(name: str, inputs: Any, fn: Callable[..., Any], *args: Any) -> Any:
        key = (name, *jax.tree.leaves(inputs))
        if key not in memo:
            memo[key] = jax.eval_shape(fn, *args)
        return memo[key]

    x: Any = batch.get("frames")
    if isinstance(model, CoCa):
        for name in (model.encoder, model.pooler):
            y = output(name, x, model.modules[name].apply, {"params": params[name]}, x)
            yield name, (x, y)
            x = y
        tokens = batch["tokens"]
        _check_length(model.text, model.modules[model.text], tokens.shape[1])
        logits, *_ = output(model.text, batch, model, params, batch)
        yield model.text, (tokens, logits)
        yield model.fusion, (x, logits)
        return
    if model.encoder:
        y = output(model.encoder, x, model.encode, params, batch)
        yield model.encoder, (x, y)
        x = y
    for name in model.chain:
        _check_length(name, model.modules[name], math.prod(x.shape[1:-1]))
        y = output(name, x, dataclasses.replace(model, chain=(name,)).prefix, params, x)
        yield name, (x, y)
        x = y
    prompt, prefix = batch["prompt"].shape[1], 0 if x is None or model.cross else x.shape[1]
    text = batch["tokens"].shape[1]
    _check_length(model.lm, model.modules[model.lm], (prompt if exact else 0) + prefix + text)
    states = output(model.lm, (x, batch), model.read, params, x, batch)
    logits = output(model.lm, states, model.logits, params, states)
    yield model.lm, ({"prompt": batch["prompt"], "prefix": x, "tokens": batch["tokens"]}, logits)


def check_batch_size(name: str, stage: StageConfig, devices: int) -> None:
    """Raise ConfigError unless the rows of every micro-batch divide over the devices."""
    if stage.batch % (stage.accumulate * devices):
        raise ConfigError(
            f"stages.{name}.batch={stage.batch} does not divide over {devices} devices times "
            f"accumulate={stage.accumulate}; make it a multiple of {stage.accumulate * devices}"
        )


def check_room(name: str, texts: int, transform: Callable[..., Any]) -> None:
    """Raise ConfigError if the shortest possible texts do not fit into a row of a data set.

    A row has `texts` captions or questions; `transform` makes it of an example.
    """
    # Features need no decoding, and no words are shorter than these.
    media = Features(np.zeros((1, 1, 1, 1), ml_dtypes.bfloat16))
    questions = (Question("a", ("a",)),) * texts
    row: Any = transform(Example("", media, ("a",) * texts, questions))
    if row["bad"]:
        raise ConfigError(f"data.{name}.text_len={len(row['tokens'])}: no room for a question")


@contextlib.contextmanager
def shape_errors(problem: str) -> Iterator[None]:
    """Turn any error about sizes that do not fit together into a ConfigError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Flax, jax and numpy each raise their own
        raise ConfigError(f"{problem}: {' '.join(str(error).split())}") from error


def _check_length(name: str, module: Any, length: int) -> None:
    """Raise ConfigError if a row is longer than a language model's max_len."""
    if isinstance(module, LM) and length > module.config.max_len:
        raise ConfigError(
            f"{length} tokens in a row (prompt, visual tokens, texts), but components.{name} has "
            f"max_len={module.config.max_len}; lower text_len or the number of visual tokens, or "
            "set max_len where its positions are not learned"
        )
