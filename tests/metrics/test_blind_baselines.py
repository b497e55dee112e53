import numpy as np
import pytest

from vadapter.errors import DataError
from vadapter.metrics.blind_baselines import constant_caption, majority_answer
from vadapter.metrics.captioning import score_captions

IMAGES = [
    ["a dog runs on the beach", "a brown dog running"],
    ["two men cook in a kitchen", "men cooking"],
    ["a dog runs on the grass", "the dog plays"],
    ["two men cook outside", "the men cook"],
    ["a dog runs on the road", "a dog outside"],
    ["two men cook fish in a kitchen", "cooks in a kitchen"],
]


def test_the_constant_caption_is_chosen_on_one_half_and_scored_on_the_other():
    references = dict(enumerate(IMAGES))
    table = []
    for refs in IMAGES:
        scores = score_captions(dict.fromkeys(references, refs[0]), references).cider_of
        table.append([scores[i] for i in range(6)])
    table = np.array(table)
    expected = np.empty(6)
    for half in (0, 1):
        chosen = table[:, half::2].mean(1).argmax()
        expected[1 - half :: 2] = table[chosen, 1 - half :: 2]
    assert constant_caption(IMAGES) == pytest.approx(expected.mean(), abs=1e-12)
    best = table.mean(1).max()
    assert constant_caption(IMAGES) < best, "dogs are even and men are odd here"


def test_only_so_many_captions_are_tried_and_one_image_is_too_few():
    references = dict(enumerate(IMAGES))
    first = score_captions(dict.fromkeys(references, IMAGES[0][0]), references).cider
    assert constant_caption(IMAGES, candidates=1) == pytest.approx(first, abs=1e-12)
    with pytest.raises(DataError, match="at least 2 items"):
        constant_caption(IMAGES[:1])


def test_the_blind_answer_is_the_most_common_of_the_other_items():
    asked = [("what color?", "red"), ("What color? ", "Red"), ("what color?", "blue"),
             ("how many?", "red")]  # fmt: skip
    # red and Red see one red and one blue, the first of which wins; blue sees two reds; the last
    # was asked alone and takes the commonest answer of all.
    assert majority_answer(asked) == pytest.approx(3 / 4)
    assert majority_answer([("a", "x"), ("b", "y")]) == 0
    assert majority_answer([("a", "x")]) == 0
    assert majority_answer([]) == 0
