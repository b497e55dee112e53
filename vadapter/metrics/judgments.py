"""Scores of captions whose source judges them, see `data.example.Judgment`.

  captions_right     share of captions that are right by the source's definition
  facts              share of all facts in the captions that are right
  facts_KIND         the same of one kind of fact
  facts_per_caption  how many facts a caption mentions: a caption of few facts is easily right

The shares are of facts, not means over captions.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from vadapter.data.example import Judgment
from vadapter.metrics.bootstrap import Sample

RIGHT, FACTS, PER_CAPTION = "captions_right", "facts", "facts_per_caption"


def is_judged(metric: str) -> bool:
    """Return whether a metric is one of this module."""
    return metric in (RIGHT, FACTS) or metric.startswith("facts_")


def row_of(judgment: Judgment) -> dict[str, Any]:
    """Return what a row of predictions.jsonl says of a judgment."""
    facts = {kind: list(numbers) for kind, numbers in judgment.facts.items()}
    return {"right": judgment.right, "facts": facts}


def samples(
    rows: Sequence[Mapping[str, Any]], items: Sequence[Hashable], clusters: Sequence[Hashable]
) -> dict[str, Sample]:
    """Return the sample of each score, of rows with what `row_of` returns.

    A kind that no caption mentions has no score. For `items` and `clusters` see `Sample`.
    """
    kinds = dict.fromkeys(kind for row in rows for kind in row["facts"])
    parts = {FACTS: [_sums(row, row["facts"]) for row in rows]}
    parts |= {f"{FACTS}_{kind}": [_sums(row, (kind,)) for row in rows] for kind in sorted(kinds)}
    return {
        RIGHT: Sample.of_means(items, clusters, [float(row["right"]) for row in rows]),
        **{name: Sample.of_shares(items, clusters, sums) for name, sums in parts.items()},
        PER_CAPTION: Sample.of_means(items, clusters, [sums[1] for sums in parts[FACTS]]),
    }


def _sums(row: Mapping[str, Any], kinds: Any) -> tuple[int, int]:
    """Return (right, mentioned) facts of some kinds."""
    numbers = [row["facts"].get(kind, (0, 0)) for kind in kinds]
    return sum(right for right, _ in numbers), sum(mentioned for _, mentioned in numbers)
