"""Baselines that see no image; a model that does not beat them does not use its images.

Both are fitted to the evaluated set itself, but never to the item that they are scored on.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vadapter.metrics.captioning import cider_of_constants
from vadapter.metrics.ptb import tokenize

CANDIDATES = 20
NAMES = {"cider": "a constant caption", "accuracy": "the most common answer"}  # by metric


def blind_scores(rows: Sequence[Mapping[str, Any]], metric: str) -> list[float]:
    """Return the score of the baseline on each row of predictions.jsonl, on the scale of `metric`.

    Empty without a baseline: another metric than those of `NAMES`, no rows, rows without what is
    right, or a single image.
    """
    if metric == "accuracy" and rows and "answer" in rows[0]:
        return majority_answer_scores([(row["question"], row["answer"]) for row in rows])
    if metric == "cider" and len(rows) > 1 and "references" in rows[0]:
        return constant_caption_scores([row["references"] for row in rows]).tolist()
    return []


def constant_caption(references: Sequence[Sequence[str]], candidates: int = CANDIDATES) -> float:
    """Return the CIDEr-D of giving every image the same caption, see `constant_caption_scores`."""
    return float(constant_caption_scores(references, candidates).mean())


def constant_caption_scores(
    references: Sequence[Sequence[str]], candidates: int = CANDIDATES
) -> np.ndarray:
    """Return the CIDEr-D of every image, f64[I] on the official scale, with the same caption.

    Cross-validated: the images with even indices get the candidate that scores best on those with
    odd indices, and vice versa. The candidates are the first captions of evenly spaced images.

    Raises:
      DataError: fewer than two images.
    """
    tokens = [[tokenize(caption) for caption in captions] for captions in references]
    n = len(tokens)
    sampled = sorted({i * n // candidates for i in range(candidates)})
    scores = cider_of_constants([tokens[i][0] for i in sampled], tokens)
    even, odd = scores[:, 0::2], scores[:, 1::2]
    best = np.empty(n)
    best[0::2], best[1::2] = even[odd.mean(1).argmax()], odd[even.mean(1).argmax()]
    return best


def majority_answer(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the share of questions that the most common answer is right for; 0 without questions.

    See `majority_answer_scores`.
    """
    return float(np.mean(majority_answer_scores(pairs))) if pairs else 0.0


def majority_answer_scores(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Return 1 where the most common answer to the same question elsewhere is right, else 0.

    A question that occurs only once gets the most common answer to all other questions. The pairs
    are of a question and its answer.
    """
    pairs = [(question.strip().lower(), answer.strip().lower()) for question, answer in pairs]
    by_question, total = collections.defaultdict(collections.Counter), collections.Counter()
    for question, answer in pairs:
        by_question[question][answer] += 1
        total[answer] += 1
    correct = []
    for question, answer in pairs:
        same = by_question[question]
        others = (same if same.total() > 1 else total) - collections.Counter({answer: 1})
        right = bool(others) and max(others, key=lambda a: others[a]) == answer
        correct.append(float(right))
    return correct
