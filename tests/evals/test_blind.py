import pytest

from vadapter.evals.blind import constant_caption, majority_answer
from vadapter.evals.captioning import score_captions

PICTURES = [
    ["a dog runs on the beach", "a brown dog running"],
    ["a dog runs on the grass", "the dog plays"],
    ["two men cook in a kitchen", "men cooking"],
    ["a dog runs on the road", "a dog outside"],
]


def test_the_best_constant_caption_is_found_and_scored_officially():
    caption, score = constant_caption(PICTURES)
    everywhere = {
        refs[0]: score_captions(dict.fromkeys(range(4), refs[0]), dict(enumerate(PICTURES))).cider
        for refs in PICTURES
    }
    assert caption == max(everywhere, key=lambda text: everywhere[text])
    assert score == pytest.approx(everywhere[caption], abs=1e-12)
    assert len(set(everywhere.values())) > 1


def test_only_so_many_captions_are_tried():
    assert constant_caption(PICTURES, candidates=1)[0] == PICTURES[0][0]


def test_the_majority_answers_each_question_text_by_itself():
    asked = [("what colour?", "red"), ("What colour? ", "Red"), ("what colour?", "blue"),
             ("how many?", "two"), ("how many?", "one")]  # fmt: skip
    assert majority_answer(asked) == 3 / 5
    assert majority_answer([]) == 0
