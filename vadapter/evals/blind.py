"""What scores without looking at a picture: the yardsticks that every adapter has to beat.

Both know the references of the very set they are scored on, so no model that is blind does better
by much: what a model has beyond them, it has seen.
"""

import collections
from collections.abc import Iterable, Sequence

from vadapter.evals.captioning import cider_d
from vadapter.evals.ptb import tokenize

CANDIDATES = 20


def constant_caption(
    references: Sequence[Sequence[str]], candidates: int = CANDIDATES
) -> tuple[str, float]:
    """The caption that does best when every picture is given the same one.

    Args:
      references: the human captions of each picture.
      candidates: how many of them are tried, one each of as many pictures, evenly spread.

    Returns:
      The caption and its CIDEr-D, as a fraction on the official scale.

    Raises:
      DataError: fewer than two pictures.
    """
    human = [[tokenize(caption) for caption in captions] for captions in references]
    count = min(candidates, len(human))
    tried = [i * len(human) // count for i in range(count)]
    scores = {i: cider_d([human[i][0]] * len(human), human)[0] for i in tried}
    best = max(scores, key=lambda i: scores[i])
    return references[best][0], scores[best]


def majority_answer(asked: Iterable[tuple[str, str]]) -> float:
    """Accuracy of the commonest answer to the same words, whatever the picture.

    Args:
      asked: (question, answer) pairs.
    """
    answers = collections.defaultdict(collections.Counter)
    for question, answer in asked:
        answers[question.strip().lower()][answer.strip().lower()] += 1
    right = sum(max(counts.values()) for counts in answers.values())
    return right / max(sum(counts.total() for counts in answers.values()), 1)
