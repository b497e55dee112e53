"""Scores of generated captions and answers; each metric is a row of `METRICS`.

Scores are fractions on the official scale (multiply by 100 to print them). Beside them, as counts
or shares: `n`, the scored items; `ended`, generations that ended by themselves; `distinct`,
different generations; `unreadable`, items whose image cannot be read, if there are any: they count
with an empty generation.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Generation(NamedTuple):
    """What the model generated for an item."""

    index: int  # of the item
    text: str | None  # the caption or answer; None if the image cannot be read
    ended: bool  # by itself, and not at the limit of its length


class Result(NamedTuple):
    """Scores of an evaluation, and a row per item.

    A row has id, prediction, references or question, answer, kind; score; ended.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]]


class Metric(NamedTuple):
    """How a benchmark is scored."""

    task: str  # "caption" or "question"
    primary: str  # the score that is reported for the benchmark, a key of `Result.scores`
    rules: str = ""  # for answers the official rules, a name in `vqa.RULES`
    variants: tuple[str, ...] = ()  # other rules in use, reported beside them as `accuracy_NAME`


def _accuracy(rules: str, *variants: str) -> Metric:
    return Metric("question", "accuracy", rules, variants)


METRICS: dict[str, Metric] = {
    "cider": Metric("caption", "cider"),
    "vqav2": _accuracy("vqav2", "openflamingo", "lavis"),
    "okvqa": _accuracy("vqav2", "openflamingo", "lavis", "big_vision"),
    "textvqa": _accuracy("textvqa"),
    "vizwiz": _accuracy("vizwiz", "openflamingo"),
    "ivqa": _accuracy("ivqa"),
    "exact": _accuracy("exact", "evalai"),
    "simple": _accuracy("exact"),  # for the user's own data sets
}


def score_generations(items: Any, generations: Sequence[Generation], metric: Metric) -> Result:
    """Score one generation for each of the items (see `items_of`).

    Where no answers are public nothing is scored, and the rows have no `score`.

    Raises:
      DataError: fewer than two captions, or some questions have answers and others have none.
    """
    unreadable = sum(g.text is None for g in generations)
    score = _score_captions if metric.task == "caption" else _score_answers
    scores, rows = score(items, [g._replace(text=g.text or "") for g in generations], metric)
    scores |= {
        "ended": float(np.mean([row["ended"] for row in rows])),
        "distinct": len({row["prediction"] for row in rows}) / len(rows),
        "n": len(rows),
    }
    if unreadable:
        scores["unreadable"] = unreadable / len(generations)
    return Result(scores, rows)


def _score_captions(items: Any, generations: Sequence[Generation], metric: Metric) -> Result:
    from vadapter.metrics.captioning import score_captions

    examples = {g.index: items.text_only(g.index) for g in generations}
    references: dict[Any, Any] = {i: example.captions for i, example in examples.items()}
    scores = score_captions({g.index: g.text or "" for g in generations}, references)
    rows = []
    for i, text, ended in generations:
        scored = {"references": list(references[i]), "score": scores.cider_of[i], "ended": ended}
        rows.append({"id": examples[i].id, "index": i, "prediction": text, **scored})
    return Result({"cider": scores.cider, "bleu4": scores.bleu4, "rouge_l": scores.rouge_l}, rows)


def _score_answers(items: Any, generations: Sequence[Generation], metric: Metric) -> Result:
    from vadapter.metrics.vqa import RULES, score_answers

    pairs = {g.index: items.text_only(g.index) for g in generations}
    rows = []
    for i, text, ended in generations:
        example, question = pairs[i]
        row: dict[str, Any] = {"id": example.id, "index": i}
        if question.id:
            row["question_id"] = question.id
        row |= {"question": question.text, "answer": question.answer, "kind": question.kind}
        rows.append(row | {"prediction": text, "ended": ended})
    answers: dict[Any, Any] = {i: question.answers for i, (_, question) in pairs.items()}
    if not any(answers.values()):
        return Result({}, rows)
    kinds: dict[Any, str] = {i: question.kind for i, (_, question) in pairs.items()}
    predictions: dict[Any, str] = {g.index: g.text or "" for g in generations}
    official = score_answers(predictions, answers, RULES[metric.rules], kinds)
    scores = {"accuracy": official.accuracy}
    scores |= {f"accuracy_{k}": v for k, v in sorted(official.by_kind.items()) if k}
    for name in metric.variants:
        scores[f"accuracy_{name}"] = score_answers(predictions, answers, RULES[name]).accuracy
    return Result(scores, [row | {"score": official.accuracy_of[row["index"]]} for row in rows])
