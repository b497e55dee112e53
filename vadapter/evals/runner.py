"""Evaluation: greedy texts, official scores, and honest signs that the picture is used.

Legend: B batch, Q queries, E language model width.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from vadapter.data.example import Question, words_of
from vadapter.data.images import View
from vadapter.data.pipeline import eval_batches
from vadapter.data.tokenizer import Tokenizer
from vadapter.data.transforms import prompt_sample
from vadapter.evals.captioning import score_captions
from vadapter.evals.vqa import EXACT, score_answers
from vadapter.models.generate import greedy
from vadapter.models.losses import token_xent
from vadapter.models.vadapter import Batch, Params, VAdapter
from vadapter.parallel.compile import jit
from vadapter.parallel.mesh import to_mesh

MAX_QUESTION = 40  # tokens of a question with its prompt; longer ones count as wrong


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
      scores: metric -> value; CIDEr, BLEU and accuracies as fractions (×100 as published).
      rows: one dict an item: id, prediction, references or question, answer, kind; score; ended.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]]


class Questions:
    """A source's (example, question) pairs, one item each."""

    def __init__(self, source: Any, limit: int = 0):
        self._source = source
        self._pairs = []
        for i in range(len(source)):
            if limit and len(self._pairs) >= limit:
                break
            self._pairs += [(i, j) for j in range(len(words_of(source, i).qa))]
        self._pairs = self._pairs[: limit or None]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Any, Question]:
        i, j = self._pairs[index]
        example = self._source[i]
        return example, example.qa[j]

    def words(self, index: int) -> tuple[Any, Question]:
        """The pair without the example's media."""
        i, j = self._pairs[index]
        example = words_of(self._source, i)
        return example, example.qa[j]


class First:
    """The first `limit` items of a source."""

    def __init__(self, source: Any, limit: int):
        self._source, self._limit = source, min(limit, len(source))

    def __len__(self) -> int:
        return self._limit

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def words(self, index: int) -> Any:
        """The item without its media."""
        return words_of(self._source, index)


class Decoder:
    """Compiled greedy decoding of one model; one program a batch shape."""

    def __init__(self, model: VAdapter, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        self.model, self.tokenizer, self.mesh = model, tokenizer, mesh
        decode = functools.partial(
            greedy, model, stop=tokenizer.stop_ids, vocab=tokenizer.vocab_size
        )
        self._greedy = jit(decode, static_argnames="max_new")

    def texts(
        self, params: Params, batches: Iterator[Batch], max_new: int
    ) -> Iterator[tuple[int, str, bool]]:
        """(id, text, ended) of every real row; the next batch is read meanwhile."""
        pending: tuple[Batch, Any] | None = None
        for batch in batches:
            arrays = to_mesh(batch, self.mesh)
            out = self._greedy(params, arrays, max_new=max_new)
            if pending is not None:
                yield from self._read(*pending)
            pending = (arrays, out)
        if pending is not None:
            yield from self._read(*pending)

    def _read(self, arrays: Batch, out: Any) -> Iterator[tuple[int, str, bool]]:
        """What could not be read is not guessed at: its text is empty."""
        columns = (arrays["id"], arrays["bad"], out["tokens"], out["ended"])
        for i, bad, row, end in zip(*map(_on_host, columns), strict=True):
            if i >= 0:
                text = "" if bad else self.tokenizer.decode([int(t) for t in row]).strip()
                yield int(i), text, bool(end)


def _on_host(x: jax.Array) -> np.ndarray:
    """The whole array, on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def evaluate(
    decoder: Decoder,
    params: Params,
    source: Any,
    *,
    task: str,
    max_new: int,
    batch: int,
    view: View,
    frames: int = 1,
    limit: int = 0,
) -> Result:
    """Captions or answers for a source, and their scores.

    Args:
      decoder: of the model; params: of every component.
      source: examples with captions (task caption) or questions (task question).
      task: caption | question.
      max_new: longest text in tokens; batch: rows at a time; limit: first examples only, 0: all.
      view, frames: of the pictures, see `transforms.caption_sample`.
    """
    tokenizer = decoder.tokenizer
    items: Any = source
    if task == "question":
        items = Questions(source, limit)
    elif limit:
        items = First(source, limit)
    row = functools.partial(
        prompt_sample, tokenizer=tokenizer, view=view, frames=frames,
        text_len=MAX_QUESTION if task == "question" else len(tokenizer.encode(" :")),
    )  # fmt: skip
    batches = eval_batches(
        items,
        row,
        _round_up(min(batch, len(items)), decoder.mesh.size),
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )
    texts = sorted(decoder.texts(params, batches, max_new))
    return _score_questions(items, texts) if task == "question" else _score_captions(items, texts)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _score_captions(items: Any, texts: list[tuple[int, str, bool]]) -> Result:
    examples = {i: words_of(items, i) for i, _, _ in texts}
    scores = score_captions(
        {i: text for i, text, _ in texts}, {i: e.captions for i, e in examples.items()}
    )
    rows = [
        {
            "id": examples[i].id,
            "index": i,
            "prediction": text,
            "references": list(examples[i].captions),
            "score": scores.cider_of[i],
            "ended": ended,
        }
        for i, text, ended in texts
    ]
    named = {"cider": scores.cider, "bleu4": scores.bleu4, "rouge_l": scores.rouge_l}
    return Result(named | _shares(rows), rows)


def _score_questions(items: Questions, texts: list[tuple[int, str, bool]]) -> Result:
    asked = {i: items.words(i) for i, _, _ in texts}
    scores = score_answers(
        {i: text for i, text, _ in texts},
        {i: question.answers for i, (_, question) in asked.items()},
        EXACT,
        {i: question.kind for i, (_, question) in asked.items()},
    )
    rows = [
        {
            "id": asked[i][0].id,
            "index": i,
            "question": asked[i][1].text,
            "answer": asked[i][1].answer,
            "kind": asked[i][1].kind,
            "prediction": text,
            "score": scores.accuracy_of[i],
            "ended": ended,
        }
        for i, text, ended in texts
    ]
    kinds = {f"accuracy_{k}": v for k, v in sorted(scores.by_kind.items()) if k}
    return Result({"accuracy": scores.accuracy, **kinds} | _shares(rows), rows)


def _shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many of the texts ended by themselves, how many differ, and their number."""
    ended = float(np.mean([row["ended"] for row in rows]))
    distinct = len({row["prediction"] for row in rows}) / len(rows)
    return {"ended": ended, "distinct": distinct, "n": len(rows)}


def make_control(model: VAdapter) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """Sums that tell whether the picture is used: compile once, add over batches.

    Returns:
      A function (params, batch) -> sums: `targets`, and nats with the right picture's prefix
      (`right`), with another picture's (`wrong`: the row before), with the batch's mean prefix
      (`mean`); and `between`/`power`, the image-specific power of the prefix that differs between
      queries, and all of it. For text-only models just `right` and `targets`.
    """

    def nats(params: Params, prefix: jax.Array | None, batch: Batch) -> jax.Array:
        logits = model.logits(params, model.read(params, prefix, batch))
        return token_xent(logits, batch["targets"], batch["weights"])[0]

    def control(params: Params, batch: Batch) -> dict[str, jax.Array]:
        visual = model.encode(params, batch)
        sums = {"targets": batch["weights"].sum()}
        if visual is None:
            return sums | {"right": nats(params, None, batch)}
        prefix = model.prefix(params, visual)
        mean = jnp.broadcast_to(prefix.mean(0, keepdims=True), prefix.shape)
        own = (prefix - mean).astype(jnp.float32)
        return sums | {
            "right": nats(params, prefix, batch),
            "wrong": nats(params, jnp.roll(prefix, 1, axis=0), batch),
            "mean": nats(params, mean, batch),
            "between": jnp.square(own - own.mean(1, keepdims=True)).sum(),
            "power": jnp.square(own).sum(),
        }

    return control


def control_scores(sums: list[Mapping[str, Any]]) -> dict[str, float]:
    """Means over batches: loss (nats a target), loss_wrong, loss_mean, query_share."""
    total = {k: float(sum(float(s[k]) for s in sums)) for k in sums[0]}
    count = max(total["targets"], 1.0)
    out = {"loss": total["right"] / count}
    if "wrong" in total:
        out["loss_wrong"] = total["wrong"] / count
        out["loss_mean"] = total["mean"] / count
        out["query_share"] = total["between"] / max(total["power"], 1e-30)
    return out
