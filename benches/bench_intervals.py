"""How long intervals take beside the scores themselves: `python -m benches.bench_intervals`.

Captions and answers are random words; each image has five reference captions, or five questions of
three kinds with ten annotators. Prints seconds as a JSON line per test set.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from vadapter.data.example import Example, Question
from vadapter.metrics.bootstrap import paired
from vadapter.metrics.scoring import METRICS, Generation, sample_of, score_generations

_EACH = 5  # references or questions of an image
_KINDS = ("yes/no", "number", "other")
_ANSWERS = ("yes", "no", "2", "red", "dog")
_WORDS, _LENGTH = 3000, 10  # of captions; the frequencies of the words follow Zipf's law


class Items(list):
    """A list of examples or of (example, question), all without media."""

    def text_only(self, index: int) -> Any:
        """Return an item."""
        return self[index]


def captions(images: int) -> tuple[Items, list[Generation]]:
    """Return images with references, and a caption of each."""
    random = np.random.default_rng(0)
    weights = 1 / np.arange(1, _WORDS + 1)
    shape = (images, _EACH + 1, _LENGTH)
    drawn = random.choice(_WORDS, shape, p=weights / weights.sum())
    texts = [[" ".join(f"w{word}" for word in text) for text in group] for group in drawn]
    items = Items(Example(str(i), None, tuple(group[1:])) for i, group in enumerate(texts))
    return items, [Generation(i, group[0], True) for i, group in enumerate(texts)]


def answers(images: int) -> tuple[Items, list[Generation]]:
    """Return questions about images, and an answer to each."""
    random = np.random.default_rng(0)
    items = Items(
        (Example(str(i)), Question(f"{j}?", tuple(random.choice(_ANSWERS, 10)), _KINDS[j % 3]))
        for i in range(images)
        for j in range(_EACH)
    )
    chosen = random.choice(_ANSWERS, len(items))
    return items, [Generation(i, str(text), True) for i, text in enumerate(chosen)]


def bench(items: Items, generations: list[Generation], metric: str) -> dict[str, Any]:
    """Return the seconds of the scores, of their intervals and of a paired test of two systems."""
    scores, result = _timed(lambda: score_generations(items, generations, METRICS[metric]))
    intervals, found = _timed(lambda: result.intervals)
    sample = sample_of(result.rows)
    test, _ = _timed(lambda: paired(sample, sample))
    seconds = {"scores": scores, "intervals": intervals, "paired": test}
    return {"items": len(items), "metric": metric, "with_interval": sorted(found), **seconds}


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return round(time.perf_counter() - start, 3), value


def main(arguments: list[str] | None = None) -> None:
    """Measure both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", type=int, default=5000, help="images with captions")
    parser.add_argument("--answers", type=int, default=40_000, help="images with questions")
    args = parser.parse_args(arguments)
    print(json.dumps(bench(*captions(args.captions), "cider")))
    print(json.dumps(bench(*answers(args.answers), "vqav2")))


if __name__ == "__main__":
    main()
