"""Scores of the final evaluations: intervals over items, and differences between arms.

The scores of an item are averaged over the seeds of an arm first. Intervals are then over the
items, drawn by image or clip: they say how far a score would move on other images, and not how far
it moves with another seed, which minimum and maximum over the seeds show.
"""

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any, NamedTuple

from vadapter.compare.comparison import Trained, evaluation_folder
from vadapter.compare.curves import Measured, MeasuredArm, Spread
from vadapter.io.json_files import lines
from vadapter.metrics import bootstrap, judgments
from vadapter.metrics.blind_baselines import blind_scores
from vadapter.metrics.bootstrap import Difference, Interval, Sample
from vadapter.metrics.scoring import sample_of

SHOWN = ("cider", judgments.RIGHT, judgments.FACTS, "accuracy")  # of the scores of an evaluation


class FinalScore(NamedTuple):
    """A score of one evaluation of one arm."""

    spread: Spread  # over seeds
    interval: Interval | None  # 95 %, over items; None for a single image
    sample: Sample  # averaged over seeds


class Evaluation(NamedTuple):
    """One score of an evaluation, of all arms that have it."""

    name: str  # of the evaluation
    metric: str
    scores: Mapping[str, FinalScore]  # by arm
    differences: Mapping[tuple[str, str], Difference]  # (arm, other arm): the first minus the other
    blind: Sample | None = None  # of a baseline that sees no image; None if it cannot be scored

    @property
    def items(self) -> int:
        """The number of items."""
        return len(next(iter(self.scores.values())).sample.items)


def evaluations(measured: Measured) -> list[Evaluation]:
    """Return the scores of `SHOWN` of the evaluations that at least one arm has finished.

    Raises:
      DataError: two arms, or two seeds of one, were evaluated on different items.
    """
    found = []
    for name in measured.comparison.test:
        for metric in SHOWN:
            read = {arm.name: s for arm in measured.arms if (s := _score(arm, name, metric))}
            differences: dict[tuple[str, str], Difference] = {}
            for a, b in combinations(read, 2):
                differences[a, b] = bootstrap.paired(read[a].sample, read[b].sample)
                differences[b, a] = _negative(differences[a, b])
            if read:
                blind = _blind(measured, name, metric)
                found.append(Evaluation(name, metric, read, differences, blind))
    return found


def _score(arm: MeasuredArm, name: str, metric: str) -> FinalScore | None:
    """Return a score of an arm over its seeds that have it; None without any."""
    read = [found for curve in arm.curves if (found := _read(curve.run, name, metric))]
    if not read:
        return None
    values = [record["scores"][metric] for record, _ in read]
    sample = bootstrap.average([sample for _, sample in read])
    stored = read[0][0].get("intervals", {}).get(metric) if len(read) == 1 else None
    interval = tuple(stored) if stored else bootstrap.interval(sample)
    spread = Spread.of(values)
    assert spread is not None
    return FinalScore(spread, interval, sample)


def _blind(measured: Measured, name: str, metric: str) -> Sample | None:
    """Return the scores of the baseline on the items of an evaluation, which all arms share."""
    runs = (curve.run for arm in measured.arms for curve in arm.curves)
    run = next(run for run in runs if _read(run, name, metric))
    rows = list(lines(evaluation_folder(run, name) / "predictions.jsonl"))
    if not (scores := blind_scores(rows, metric)):
        return None
    return sample_of([{**row, "score": x} for row, x in zip(rows, scores, strict=True)])


def _read(run: Trained, name: str, metric: str) -> tuple[dict[str, Any], Sample] | None:
    """Return score.json and items of an evaluation of a run; None if it lacks the score."""
    directory = evaluation_folder(run, name)
    path = directory / "score.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if metric not in record["scores"]:
        return None
    return record, sample_of(list(lines(directory / "predictions.jsonl")), metric)


def _negative(difference: Difference) -> Difference:
    ends = difference.interval
    return Difference(-difference.value, ends and (-ends[1], -ends[0]), difference.p)


def is_shown(difference: Difference) -> bool:
    """Return whether the interval of a difference leaves out 0."""
    return difference.interval is not None and not (
        difference.interval[0] <= 0 <= difference.interval[1]
    )
