"""Baselines that see no image; a model that does not beat them does not use its images.

Both are fitted to the evaluated set itself, but never to the item that they are scored on.
"""

import collections
from collections.abc import Sequence

import numpy as np

from vadapter.metrics.captioning import cider_of_constants
from vadapter.metrics.ptb import tokenize

CANDIDATES = 20


def constant_caption(references: Sequence[Sequence[str]], candidates: int = CANDIDATES) -> float:
    """Return the CIDEr-D of giving every image the same caption, a fraction on the official scale.

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
    best_of_other_half = odd[even.mean(1).argmax()], even[odd.mean(1).argmax()]
    return float(np.concatenate(best_of_other_half).mean())


def majority_answer(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the accuracy of answering with the most common answer to the same question elsewhere.

    A question that occurs only once gets the most common answer to all other questions.
    """
    pairs = [(question.strip().lower(), answer.strip().lower()) for question, answer in pairs]
    by_question, total = collections.defaultdict(collections.Counter), collections.Counter()
    for question, answer in pairs:
        by_question[question][answer] += 1
        total[answer] += 1
    correct = 0
    for question, answer in pairs:
        same = by_question[question]
        others = (same if same.total() > 1 else total) - collections.Counter({answer: 1})
        correct += bool(others) and max(others, key=lambda a: others[a]) == answer
    return correct / max(len(pairs), 1)
