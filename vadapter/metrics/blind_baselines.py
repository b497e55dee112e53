"""What scores without looking at an image: the yardsticks that every adapter has to beat.

Both are taken from the evaluated set itself, but never from the item that they are scored on: what
a model has beyond them, it has seen.
"""

import collections
from collections.abc import Sequence

import numpy as np

from vadapter.metrics.captioning import cider_of_constants
from vadapter.metrics.ptb import tokenize

CANDIDATES = 20


def constant_caption(references: Sequence[Sequence[str]], candidates: int = CANDIDATES) -> float:
    """CIDEr-D of giving every image the same caption, as a fraction on the official scale.

    The caption for the even images is the one that does best on the odd ones, and the other way
    round.

    Args:
      references: the human captions of each image.
      candidates: how many of them are tried, one each of as many images, evenly spread.

    Raises:
      DataError: fewer than two images.
    """
    human = [[tokenize(caption) for caption in captions] for captions in references]
    n = len(human)
    tried = {i * n // candidates for i in range(candidates)}
    scores = cider_of_constants([human[i][0] for i in sorted(tried)], human)
    halves = scores[:, 0::2], scores[:, 1::2]
    chosen = [other[half.mean(1).argmax()] for half, other in (halves, halves[::-1])]
    return float(np.concatenate(chosen).mean())


def majority_answer(asked: Sequence[tuple[str, str]]) -> float:
    """Accuracy of the commonest answer that the others who were asked the same words gave.

    Where nobody else was, the commonest answer of all others.

    Args:
      asked: (question, answer) pairs.
    """
    pairs = [(q.strip().lower(), a.strip().lower()) for q, a in asked]
    alike, total = collections.defaultdict(collections.Counter), collections.Counter()
    for question, answer in pairs:
        alike[question][answer] += 1
        total[answer] += 1
    right = 0
    for question, answer in pairs:
        others = alike[question] if alike[question].total() > 1 else total
        left = others - collections.Counter({answer: 1})
        right += bool(left) and max(left, key=lambda a: left[a]) == answer
    return right / max(len(pairs), 1)
