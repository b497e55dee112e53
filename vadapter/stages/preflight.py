"""What would stop a stage later, found before it is paid for: by shapes and headers alone.

No tensor is read, nothing is computed on a device and nothing is written.

Legend: B batch, F frames, S pixels a side, N visual tokens a frame, D encoder width, Q queries,
E language model width, P prompt tokens, T text tokens, M targets, V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from vadapter.data.example import Example, Features, Question, Source
from vadapter.data.open import make_stream, prompt_len
from vadapter.data.pipeline import require_usable
from vadapter.data.tokenizers import Tokenizer
from vadapter.distributed import memory
from vadapter.errors import ConfigError, Problems, UserError
from vadapter.models.coca import CoCa
from vadapter.models.lm import LM
from vadapter.recipe.optim import make_optimizer
from vadapter.recipe.schema import DTYPES, Recipe, components, make_model, trained
from vadapter.stages import initialization
from vadapter.stages.abstract_state import (
    Model,
    abstract_params,
    abstract_state,
    at_rest,
    on_one,
    row_shapes,
    view_of,
)
from vadapter.stages.steps import split

Coming = dict[str, dict[str, Any]]  # stage -> component -> tree of shapes
Shapes = dict[str, jax.ShapeDtypeStruct]


class Preflight:
    """A stage, as far as its recipe, headers and sources tell.

    Args:
      recipe, name: the stage; its run directory is `workdir`.
      tokenizer: of its language model.
      mesh: that it would train on.
      exact: the tokenizer is the one it would train with; else a stand-in that makes of every text
        at least as many tokens.
      vocab_size: V, or the most it may be; 0: the tokenizer's.

    Attributes:
      model, abstract: modules, and the shapes of every component's parameters; None and {} if they
        do not fit together.
      sources: data set -> its source.
      rows: data set -> shapes of a batch of one row.
      flow: component -> shapes of what enters and leaves it, for the largest of the rows.
      starts: component -> where it starts.
    """

    def __init__(
        self,
        recipe: Recipe,
        name: str,
        workdir: Path,
        tokenizer: Tokenizer,
        mesh: jax.sharding.Mesh,
        *,
        exact: bool = True,
        vocab_size: int = 0,
    ):
        self.recipe, self.name, self.workdir = recipe, name, workdir
        self.config = recipe.stages[name]
        self.tokenizer, self.mesh, self.exact = tokenizer, mesh, exact
        self.vocab_size = vocab_size or tokenizer.vocab_size
        self.model: Model | None = None
        self.abstract: dict[str, Any] = {}
        self.sources: dict[str, Any] = {}
        self.rows: dict[str, Shapes] = {}
        self.flow: dict[str, tuple[Any, Any]] = {}
        self.starts: dict[str, initialization.Start] = {}

    def data(self) -> tuple[str, ...]:
        """The data sets that it trains on, measures losses on and evaluates on."""
        evaluated = (self.recipe.evals[name].data for name in self.config.evals)
        return tuple(dict.fromkeys((*self.config.data, *self.config.loss, *evaluated)))

    def check(
        self,
        source: Callable[[str], Source],
        coming: Coming,
        problems: Problems,
        limit: int | None = None,
    ) -> None:
        """Fills in the attributes.

        Args:
          source: opens a data set.
          coming: what stages that run before this one will have trained; this one's is added.
          problems: gathers everything that is wrong.
          limit: bytes that programs may use on a device; None: nobody knows.
        """
        gather = lambda: problems.gather(self.name)  # noqa: E731
        with gather():
            self._build()
        with gather():
            check_batch_size(self.name, self.config, self.mesh.size)
        for name in self.data():
            with gather():
                self.sources[name] = source(name)
        if self.model is None:
            with gather():
                initialization.check_sources(self.recipe, self.name, self.workdir)
            return
        for name in self.data():
            with gather():
                self.rows[name] = self._row(name)
        for name in sorted(self.rows, key=lambda name: _size(self.rows[name])):
            with gather():
                self._flow(name)
        for name in components(self.config):
            with problems.gather(f"{self.name}/{name}"):
                self.starts[name] = initialization.find(
                    self.recipe, self.config, self.workdir, name, self.abstract[name],
                    coming=coming, at_most=0 if self.exact else self.vocab_size,
                )  # fmt: skip
        with gather():
            memory.require_room(f"stages.{self.name}", self.stays(), limit)
        coming[self.name] = {name: self.abstract[name] for name in trained(self.config)}

    def stays(self) -> dict[str, int]:
        """Bytes on each device that stay there while it trains: what -> bytes.

        Of a batch, the largest that is known; without images where their tokens may be cached.
        """
        config, mesh = self.config, self.mesh
        trainable, frozen = split(self.abstract, trained(config))
        parts = trainable | at_rest(frozen, DTYPES[self.recipe.dtype])
        state = abstract_state(trainable, make_optimizer(config.optim, config.steps), mesh)
        rows = config.batch // (mesh.shape["data"] * mesh.shape["fsdp"])
        size = {"optimizer": on_one(state.opt_state), "batch": 0}
        for name in (name for name in config.data if name in self.rows):
            cached = ("frames",) if self.recipe.data[name].cache else ()
            row = {key: x for key, x in self.rows[name].items() if key not in cached}
            one = sum(x.size * x.dtype.itemsize for x in row.values())
            size["batch"] = max(size["batch"], rows * one)
        return {name: on_one(tree) for name, tree in parts.items()} | size

    def _build(self) -> None:
        model = make_model(self.recipe, self.config, self.vocab_size)
        with _sizes(f"stages.{self.name}: its model cannot be built"):
            self.abstract = abstract_params(model, self.mesh)
        self.model = model

    def _row(self, name: str) -> Shapes:
        """Shapes of a batch of one row of a data set."""
        assert self.model is not None
        data, source, view = self.recipe.data[name], self.sources.get(name), view_of(self.model)
        sizes = {"T": data.text_len, "M": data.target_len or data.text_len, "P": 0}
        kind = source.kind if source else "clip"
        if view is not None:
            if kind == "text":
                raise ConfigError(f"data {name!r} has no images, which {self.name} needs")
            sizes |= {"F": data.frames if kind == "clip" else 1, "S": data.view(view).size}
        if self.exact and source is not None:
            items, transform = make_stream(name, data, source, self.tokenizer, view)
            if name in self.config.data:
                require_usable(items, self.config.batch, name)
            if data.task != "document":
                _check_room(name, transform(_example(data.texts)))
        if data.task != "document":
            sizes["P"] = prompt_len(data.task, self.tokenizer)
        return row_shapes(sizes, visual=view is not None)

    def _flow(self, name: str) -> None:
        """Sends a row of a data set through the model."""
        assert self.model is not None
        with _sizes(f"stages.{self.name}: a row of data {name!r} does not go through its model"):
            for component, both in flow(self.model, self.abstract, self.rows[name], self.exact):
                self.flow[component] = both


def flow(
    model: Model, params: Mapping[str, Any], batch: Shapes, exact: bool = True
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Component, and the shapes that enter and leave it, in the order of the data flow.

    What enters the last language model is {prompt, prefix, tokens}: i32[B,P], [B,Q,E], i32[B,T].

    Args:
      params: shapes of every component's parameters.
      batch: shapes; exact: their P is known, not only the most that it may be.

    Raises:
      ConfigError: a row that is longer than a language model's max_len.
    """
    x: Any = batch.get("frames")
    if isinstance(model, CoCa):
        for name in (model.encoder, model.pooler):
            y = jax.eval_shape(model.modules[name].apply, {"params": params[name]}, x)
            yield name, (x, y)
            x = y
        tokens = batch["tokens"]
        _check_length(model.text, model.modules[model.text], tokens.shape[1])
        logits = jax.eval_shape(model, params, batch)[0]
        yield model.text, (tokens, logits)
        yield model.fusion, (x, logits)
        return
    if model.encoder:
        y = jax.eval_shape(model.encode, params, batch)
        yield model.encoder, (x, y)
        x = y
    for name in model.chain:
        _check_length(name, model.modules[name], x.shape[1])
        y = jax.eval_shape(dataclasses.replace(model, chain=(name,)).prefix, params, x)
        yield name, (x, y)
        x = y
    prompt, prefix = batch["prompt"].shape[1], 0 if x is None else x.shape[1]
    text = batch["tokens"].shape[1]
    _check_length(model.lm, model.modules[model.lm], (prompt if exact else 0) + prefix + text)
    states = jax.eval_shape(model.read, params, x, batch)
    logits = jax.eval_shape(model.logits, params, states)
    yield model.lm, ({"prompt": batch["prompt"], "prefix": x, "tokens": batch["tokens"]}, logits)


def check_batch_size(name: str, stage: Any, devices: int) -> None:
    """The rows of every micro-batch divide over the devices.

    Raises:
      ConfigError: they do not.
    """
    if stage.batch % (stage.accumulate * devices):
        raise ConfigError(
            f"stages.{name}.batch={stage.batch} does not divide over {devices} devices times "
            f"accumulate={stage.accumulate}; make it a multiple of {stage.accumulate * devices}"
        )


def _check_length(name: str, module: Any, length: int) -> None:
    """ConfigError if a row is longer than a language model is made for; others take any."""
    if isinstance(module, LM) and length > module.config.max_len:
        raise ConfigError(
            f"{length} tokens in a row (prompt, visual tokens, texts), but components.{name} has "
            f"max_len={module.config.max_len}; lower text_len or the number of visual tokens, or "
            "set max_len where its positions are not learned"
        )


def _example(texts: int) -> Example:
    """Words that are as short as any, with cached visual tokens."""
    asked = (Question("a", ("a",)),) * texts
    return Example("", Features(np.zeros((1, 1, 1, 1), ml_dtypes.bfloat16)), ("a",) * texts, asked)


def _check_room(name: str, row: Mapping[str, np.ndarray]) -> None:
    if row["bad"]:
        raise ConfigError(f"data.{name}.text_len={len(row['tokens'])}: no room for a question")


def _size(batch: Shapes) -> int:
    return sum(leaf.size for leaf in batch.values())


@contextlib.contextmanager
def _sizes(where: str) -> Iterator[None]:
    """Sizes that do not go together are told as a ConfigError, wherever they show."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from error
