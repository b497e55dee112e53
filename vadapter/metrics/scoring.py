"""Scores of generated captions and answers; each metric is a row of `METRICS`.

Scores are fractions on the official scale (multiply by 100 to print them). Beside them, as counts
or shares: `n`, the scored items; `ended`, generations that ended by themselves; `distinct`,
different generations; `unreadable`, items whose image cannot be read, if there are any: they count
with an empty generation. Where the source judges captions there are more, see `judgments`.

Each score has a 95 % interval over images or clips, see `bootstrap`. That of CIDEr-D resamples the
items' scores with the idf of the evaluated set: it says how much the score depends on which of its
images were drawn, not how it would differ with another set's idf.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vadapter.errors import DataError
from vadapter.metrics import judgments
from vadapter.metrics.bootstrap import Interval, Sample, intervals


class Generation(NamedTuple):
    """What the model generated for an item."""

    index: int  # of the item
    text: str | None  # the caption or answer; None if the image cannot be read
    ended: bool  # by itself, and not at the limit of its length
    prefix: str = ""  # what the language model read of the image, if that is text


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of an evaluation, and a row per item.

    A row has id (of the image or clip: several questions about one share it), index, prediction,
    references or question, answer, kind; score; ended; prefix, if the image is read as text; right
    and facts (by kind: right, mentioned), if the source judges captions.
    """

    scores: dict[str, float]
    rows: list[dict[str, Any]]
    samples: Mapping[str, Sample] = dataclasses.field(default_factory=dict)  # of most scores

    @functools.cached_property
    def intervals(self) -> dict[str, Interval]:
        """The 95 % interval of each score that has one; computed when first used."""
        return intervals(self.samples)

    @property
    def summary(self) -> dict[str, Any]:
        """The scores and their intervals, as score.json has them."""
        return {"scores": self.scores, "intervals": self.intervals}


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
    scored = score(items, [g._replace(text=g.text or "") for g in generations], metric)
    rows = scored.rows
    scores = scored.scores | {
        "ended": float(np.mean([row["ended"] for row in rows])),
        "distinct": len({row["prediction"] for row in rows}) / len(rows),
        "n": len(rows),
    }
    if unreadable:
        scores["unreadable"] = unreadable / len(generations)
    return dataclasses.replace(scored, scores=scores)


def _score_captions(items: Any, generations: Sequence[Generation], metric: Metric) -> Result:
    from vadapter.metrics.captioning import bleu4_of, score_captions

    examples = {g.index: items.text_only(g.index) for g in generations}
    references: dict[Any, Any] = {i: example.captions for i, example in examples.items()}
    scores = score_captions({g.index: g.text or "" for g in generations}, references)
    rows = []
    for i, text, ended, prefix in generations:
        scored = {"references": list(references[i]), "score": scores.cider_of[i], "ended": ended}
        row = {"id": examples[i].id, "index": i, "prediction": text, **scored}
        if judge := examples[i].judge:
            row |= judgments.row_of(judge(text or ""))
        rows.append(row | _of_prefix(prefix))
    names = _keys(rows), _images(rows)
    judged = judgments.samples(rows, *names) if all("facts" in row for row in rows) else {}
    samples = {
        "cider": Sample.of_means(*names, [*scores.cider_of.values()]),
        "bleu4": Sample(*names, np.array([*scores.bleu_counts_of.values()]), bleu4_of),
        "rouge_l": Sample.of_means(*names, [*scores.rouge_l_of.values()]),
    }
    of_all = {name: getattr(scores, name) for name in samples}
    of_all |= {name: sample.value for name, sample in judged.items()}
    return Result(of_all, rows, samples | judged)


def _of_prefix(prefix: str) -> dict[str, str]:
    return {"prefix": prefix} if prefix else {}


def _score_answers(items: Any, generations: Sequence[Generation], metric: Metric) -> Result:
    from vadapter.metrics.vqa import RULES, score_answers

    pairs = {g.index: items.text_only(g.index) for g in generations}
    rows = []
    for i, text, ended, prefix in generations:
        example, question = pairs[i]
        row: dict[str, Any] = {"id": example.id, "index": i}
        if question.id:
            row["question_id"] = question.id
        row |= {"question": question.text, "answer": question.answer, "kind": question.kind}
        rows.append(row | {"prediction": text, "ended": ended} | _of_prefix(prefix))
    answers: dict[Any, Any] = {i: question.answers for i, (_, question) in pairs.items()}
    if not any(answers.values()):
        return Result({}, rows)
    kinds: dict[Any, str] = {i: question.kind for i, (_, question) in pairs.items()}
    predictions: dict[Any, str] = {g.index: g.text or "" for g in generations}
    official = score_answers(predictions, answers, RULES[metric.rules], kinds)
    scores = {"accuracy": official.accuracy}
    names = _keys(rows), _images(rows)
    sample = Sample.of_means(*names, [*official.accuracy_of.values()])
    samples = {"accuracy": sample}
    for kind, accuracy in sorted(official.by_kind.items()):
        if kind:
            scores[f"accuracy_{kind}"] = accuracy
            samples[f"accuracy_{kind}"] = sample.where([row["kind"] == kind for row in rows])
    for rules in metric.variants:
        variant = score_answers(predictions, answers, RULES[rules])
        scores[f"accuracy_{rules}"] = variant.accuracy
        samples[f"accuracy_{rules}"] = Sample.of_means(*names, [*variant.accuracy_of.values()])
    rows = [row | {"score": official.accuracy_of[row["index"]]} for row in rows]
    return Result(scores, rows, samples)


def sample_of(rows: Sequence[Mapping[str, Any]], metric: str = "") -> Sample:
    """Return the items of predictions.jsonl with their scores, for tests between two systems.

    Args:
      metric: one of `judgments`; any other: the mean of the rows' `score`, CIDEr-D or accuracy.

    Raises:
      DataError: rows without scores: the answers are not public.
    """
    if judgments.is_judged(metric):
        return judgments.samples(rows, _keys(rows), _images(rows))[metric]
    unscored = [row for row in rows if "score" not in row]
    if unscored:
        raise DataError(
            f"{len(unscored)} of {len(rows)} predictions have no score, the first is of "
            f"{unscored[0].get('id')!r}: sets without public answers cannot be compared"
        )
    return Sample.of_means(_keys(rows), _images(rows), [row["score"] for row in rows])


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """Return what names an item in all evaluations of the same data."""
    return [(row["index"], row["id"], row.get("question", "")) for row in rows]


def _images(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the image or clip of each item: the clusters of the bootstrap."""
    return [row["id"] for row in rows]
