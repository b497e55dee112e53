"""Evaluation: a text of every item of a source, on all devices and hosts, and its score."""

import functools
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vadapter.console import Progress
from vadapter.data.example import Source
from vadapter.data.media.images import ImageTransform
from vadapter.data.pipeline import Transform, eval_batches, require_usable
from vadapter.data.prompts import CAPTION
from vadapter.data.tokenizers import Tokenizer
from vadapter.data.transforms import prompt_sample
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import filled, to_mesh, with_mesh
from vadapter.evaluate.partial_results import PartialResults
from vadapter.metrics.scoring import METRICS, Result, Text, items_of, score_texts
from vadapter.models.adapter_model import AdapterModel, Batch, Params
from vadapter.models.beam import decode
from vadapter.models.generate import Decode

MAX_QUESTION = 40  # tokens of a question with its prompt; longer ones count as wrong


class Rest:
    """The items of a source from `start` on."""

    def __init__(self, items: Any, start: int):
        self._items, self._start = items, start

    def __len__(self) -> int:
        return len(self._items) - self._start

    def __getitem__(self, index: int) -> Any:
        return self._items[self._start + index]


class Decoder:
    """Compiled decoding of one model; one program a batch shape."""

    def __init__(self, model: AdapterModel, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        run = functools.partial(decode, model, stop=tokenizer.stop_ids, vocab=tokenizer.vocab_size)
        self._decode = jit(with_mesh(mesh, run), static_argnames="how")

    def batches(
        self, params: Params, batches: Iterator[Batch], how: Decode, shown: jax.Array | None = None
    ) -> Iterator[list[Text]]:
        """The texts of the real rows of each batch; the next batch is read meanwhile.

        Args:
          shown: see `generate.prefill`.
        """
        pending: tuple[Batch, Any] | None = None
        for batch in batches:
            arrays = to_mesh(batch, self.mesh)
            out = self._decode(params, arrays, how=how, shown=shown)
            if pending is not None:
                yield self._read(*pending)
            pending = (arrays, out)
        if pending is not None:
            yield self._read(*pending)

    def texts(self, params: Params, batches: Iterator[Batch], max_new: int) -> Iterator[Text]:
        """The greedy text of every real row."""
        for texts in self.batches(params, batches, Decode(max_new)):
            yield from texts

    def _read(self, arrays: Batch, out: Any) -> list[Text]:
        """What cannot be read is not guessed at: it has no text."""
        columns = (arrays["id"], arrays["bad"], out["tokens"], out["ended"])
        texts = []
        for i, bad, row, end in zip(*map(_on_host, columns), strict=True):
            if i >= 0:
                text = None if bad else self.tokenizer.decode([int(t) for t in row]).strip()
                texts.append((int(i), text, bool(end)))
        return texts


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def predict(
    decoder: Decoder,
    params: Params,
    items: Any,
    row: Transform,
    *,
    batch: int,
    how: Decode,
    shown: jax.Array | None = None,
    part: PartialResults | None = None,
    title: str = "",
) -> list[Text]:
    """A text of every item, in order; what `part` has of them is not predicted again.

    Batches are spread over the hosts and the mesh; the last one is filled up, so that all hosts
    take as many steps.

    Args:
      decoder: of the model; params: of every component.
      items: from `scoring.items_of`; row: makes a row of one of them.
      batch: rows at a time, in all; rounded up to the devices.
      how, shown: see `beam.decode`.
      part: where texts are kept as they come; None: nowhere.
      title: of the line on stderr that tells how long it will take; "": none.

    Returns:
      The texts; on other hosts than the first only those that were not in `part`.

    Raises:
      DataError: no items.
      RuntimeError: the texts gathered are not one of each item.
    """
    require_usable(items, 1)
    batch = filled(min(batch, len(items)), decoder.mesh)
    texts = part.read(batch) if part is not None else []
    start = everywhere(min(len(texts), len(items)))
    texts = texts[:start]
    progress = Progress("" if jax.process_index() else title, len(items), start, file=sys.stderr)
    if start < len(items):
        batches = eval_batches(
            Rest(items, start), row, batch,
            host_index=jax.process_index(), host_count=jax.process_count(),
        )  # fmt: skip
        for found in decoder.batches(params, batches, how, shown):
            found = [(start + i, text, ended) for i, text, ended in sorted(found)]
            if part is not None:
                part.append(found)
            texts += found
            progress.advance(len(found))
    progress.close()
    first = 0 if jax.process_index() == 0 else start
    if [i for i, _, _ in texts] != list(range(first, len(items))):
        raise RuntimeError(
            f"{len(texts)} texts of {len({i for i, _, _ in texts})} items came back, but there are "
            f"{len(items) - first}: each must have one"
        )
    return texts


def everywhere(count: int) -> int:
    """The first host's number, on every host; all of them must call it."""
    if jax.process_count() == 1:
        return count
    return int(multihost_utils.broadcast_one_to_all(np.int32(count)))


def evaluate(
    decoder: Decoder,
    params: Params,
    source: Source,
    *,
    task: str,
    batch: int,
    view: ImageTransform,
    how: Decode,
    frames: int = 1,
    limit: int = 0,
    part: PartialResults | None = None,
    title: str = "",
) -> Result:
    """Captions or answers for a source, and their scores.

    Args:
      decoder: of the model; params: of every component.
      source: examples with captions (task caption) or questions (task question).
      task: caption | question.
      batch: rows at a time; limit: first examples only, 0: all.
      view, frames: of the pictures, see `transforms.caption_sample`.
      how, part, title: see `predict`.
    """
    tokenizer = decoder.tokenizer
    items = items_of(source, task, limit)
    row = functools.partial(
        prompt_sample, tokenizer=tokenizer, view=view, frames=frames,
        text_len=MAX_QUESTION if task == "question" else len(tokenizer.encode(CAPTION.after)),
    )  # fmt: skip
    texts = predict(decoder, params, items, row, batch=batch, how=how, part=part, title=title)
    if part is not None and jax.process_index():  # the first host has the texts of before
        return Result({}, [])
    return score_texts(items, texts, METRICS["cider" if task == "caption" else "simple"])
