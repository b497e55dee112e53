"""From predictions to scores: each metric is a row of `METRICS`.

Scores are fractions on the official scale (multiply by 100 to print them) and, as counts or shares:
`n`, the items scored; `ended`, texts that ended by themselves; `distinct`, different texts;
`unreadable`, items whose image cannot be read, where there are any: their text is empty.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vadapter.data.example import Question, Source
from vadapter.metrics import vqa
from vadapter.metrics.captioning import score_captions
from vadapter.metrics.vqa import Rules, score_answers

# Index of the item, the text (None: its image cannot be read), whether it ended by itself.
Text = tuple[int, str | None, bool]
_Said = tuple[int, str, bool]


@dataclasses.dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
      scores: metric -> value; CIDEr, BLEU and accuracies as fractions (×100 as published).
      rows: one dict an item: id, prediction, references or question, answer, kind; score; ended.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a benchmark is scored.

    Attributes:
      task: caption | question.
      primary: the score that stands for the whole, a key of `Result.scores`.
      rules: of answers; None for captions.
      variants: other rules in use, reported beside the official ones as `accuracy_NAME`.
    """

    task: str
    primary: str
    rules: Rules | None = None
    variants: tuple[Rules, ...] = ()


def _accuracy(rules: Rules, *variants: Rules) -> Metric:
    return Metric("question", "accuracy", rules, variants)


METRICS: dict[str, Metric] = {
    "cider": Metric("caption", "cider"),
    "vqav2": _accuracy(vqa.VQAV2, vqa.OPENFLAMINGO, vqa.LAVIS),
    "okvqa": _accuracy(vqa.VQAV2, vqa.OPENFLAMINGO, vqa.LAVIS, vqa.BIG_VISION),
    "textvqa": _accuracy(vqa.TEXTVQA),
    "vizwiz": _accuracy(vqa.VIZWIZ, vqa.OPENFLAMINGO),
    "ivqa": _accuracy(vqa.IVQA),
    "exact": _accuracy(vqa.EXACT, vqa.EXACT_EVALAI),
    "simple": _accuracy(vqa.EXACT),  # of data sets of one's own
}


class Questions:
    """A source's (example, question) pairs, one item each."""

    def __init__(self, source: Source, limit: int = 0):
        self._source = source
        self._pairs = []
        for i in range(len(source)):
            if limit and len(self._pairs) >= limit:
                break
            self._pairs += [(i, j) for j in range(len(source.text_only(i).qa))]
        self._pairs = self._pairs[: limit or None]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Any, Question]:
        i, j = self._pairs[index]
        example = self._source[i]
        return example, example.qa[j]

    def text_only(self, index: int) -> tuple[Any, Question]:
        """The pair without the example's media."""
        i, j = self._pairs[index]
        example = self._source.text_only(i)
        return example, example.qa[j]


class First:
    """The first `limit` items of a source."""

    def __init__(self, source: Source, limit: int):
        self._source, self._limit = source, min(limit, len(source))

    def __len__(self) -> int:
        return self._limit

    def __getitem__(self, index: int) -> Any:
        return self._source[index]

    def text_only(self, index: int) -> Any:
        """The item without its media."""
        return self._source.text_only(index)


def items_of(source: Source, task: str, limit: int = 0) -> Any:
    """What is predicted one by one: examples, or questions; the first `limit` of them, 0: all."""
    if task == "question":
        return Questions(source, limit)
    return First(source, limit) if limit else source


def score_texts(items: Any, texts: Sequence[Text], metric: Metric) -> Result:
    """Scores a text of every item.

    Args:
      items: from `items_of`.
      texts: one of each item.
      metric: where no answers are public nothing is scored, and the rows have no `score`.

    Raises:
      DataError: fewer than two captions, or a question without answers among others with some.
    """
    score = _captions if metric.task == "caption" else _answers
    bad = sum(text is None for _, text, _ in texts)
    named, rows = score(items, [(i, text or "", ended) for i, text, ended in texts], metric)
    unreadable = {"unreadable": bad / len(texts)} if bad else {}
    return Result(named | _shares(rows) | unreadable, rows)


def _captions(items: Any, texts: Sequence[_Said], metric: Metric) -> tuple[dict, list]:
    examples = {i: items.text_only(i) for i, _, _ in texts}
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
    return {"cider": scores.cider, "bleu4": scores.bleu4, "rouge_l": scores.rouge_l}, rows


def _answers(items: Any, texts: Sequence[_Said], metric: Metric) -> tuple[dict, list]:
    asked = {i: items.text_only(i) for i, _, _ in texts}
    rows = [
        {
            "id": asked[i][0].id,
            "index": i,
            **({"question_id": asked[i][1].id} if asked[i][1].id else {}),
            "question": asked[i][1].text,
            "answer": asked[i][1].answer,
            "kind": asked[i][1].kind,
            "prediction": text,
            "ended": ended,
        }
        for i, text, ended in texts
    ]
    answers: dict[Any, Any] = {i: question.answers for i, (_, question) in asked.items()}
    if not any(answers.values()):
        return {}, rows
    assert metric.rules is not None
    kinds: dict[Any, str] = {i: question.kind for i, (_, question) in asked.items()}
    said: dict[Any, str] = {i: text for i, text, _ in texts}
    scores = score_answers(said, answers, metric.rules, kinds)
    named = {"accuracy": scores.accuracy}
    named |= {f"accuracy_{k}": v for k, v in sorted(scores.by_kind.items()) if k}
    for rules in metric.variants:
        named |= {f"accuracy_{rules.name}": score_answers(said, answers, rules).accuracy}
    rows = [row | {"score": scores.accuracy_of[row["index"]]} for row in rows]
    return named, rows


def _shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How many of the texts ended by themselves, how many differ, and their number."""
    ended = float(np.mean([row["ended"] for row in rows]))
    distinct = len({row["prediction"] for row in rows}) / len(rows)
    return {"ended": ended, "distinct": distinct, "n": len(rows)}
