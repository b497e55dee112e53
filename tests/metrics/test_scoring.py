"""Results of generations: every score has an interval over images, and rows can be compared."""

import json

import numpy as np
import pytest

from vadapter.data.example import Example, Judgment, Question
from vadapter.data.scenes.source import ScenesSource
from vadapter.errors import DataError
from vadapter.metrics.bootstrap import interval, paired
from vadapter.metrics.scoring import METRICS, Generation, sample_of, score_generations


class Texts(list):
    """Items without media: examples, or pairs of example and question."""

    def text_only(self, index):
        return self[index]


def questions(images, each, answers=("red",) * 10):
    """Return `each` questions about every image, of kinds color and count in turn."""
    kinds = ("color", "count")
    return Texts(
        (Example(f"{i}.jpg", None), Question(f"{kinds[j % 2]} {j}?", answers, kinds[j % 2]))
        for i in range(images)
        for j in range(each)
    )


def answered(items, right):
    """Return generations that are right for the items in `right`."""
    return [Generation(i, "red" if i in right else "blue", True) for i in range(len(items))]


def captioned(count, seed):
    rng = np.random.default_rng(seed)
    words = ("a", "red", "dog", "runs", "on", "grass", "fast")
    caption = lambda: " ".join(rng.choice(words, rng.integers(4, 8)))  # noqa: E731
    items = Texts(Example(f"{i}.jpg", None, (caption(), caption())) for i in range(count))
    return items, [Generation(i, caption(), True) for i in range(count)]


def test_every_score_has_an_interval_around_it_and_counts_have_none():
    captions = score_generations(*captioned(60, 0), METRICS["cider"])
    items = questions(30, 4)
    rng = np.random.default_rng(0)
    right = set(rng.choice(len(items), 70, replace=False).tolist())
    answers = score_generations(items, answered(items, right), METRICS["okvqa"])
    for result in (captions, answers):
        assert result.intervals.keys() == result.scores.keys() - {"ended", "distinct", "n"}
        for name, (low, high) in result.intervals.items():
            assert low <= result.scores[name] <= high, name
    assert captions.intervals.keys() == {"cider", "bleu4", "rouge_l"}
    assert {"accuracy_color", "accuracy_count", "accuracy_lavis"} <= answers.intervals.keys()


def test_the_samples_have_the_scores_that_are_reported():
    asked = questions(5, 4)
    for metric, items, generations in (
        ("cider", *captioned(20, 1)),
        ("vqav2", asked, answered(asked, {1, 2, 7, 12})),
    ):
        result = score_generations(items, generations, METRICS[metric])
        for name, sample in result.samples.items():
            assert sample.value == pytest.approx(result.scores[name], abs=1e-12), name


def test_questions_about_one_image_share_its_id_and_are_drawn_together():
    items = questions(20, 6)
    right = set(range(60))  # all of the first ten images
    result = score_generations(items, answered(items, right), METRICS["simple"])
    assert [row["id"] for row in result.rows] == [f"{i}.jpg" for i in range(20) for _ in range(6)]
    assert [row["index"] for row in result.rows] == list(range(120))
    low, high = result.intervals["accuracy"]
    # 20 images that are right or wrong as a whole, not 120 questions, whose interval is 0.18 wide.
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20**0.5, abs=0.06)


def test_the_interval_of_a_kind_is_that_of_its_own_questions():
    items = questions(40, 2)
    right = {i for i in range(80) if i % 2 == 0 or i < 40}  # all of color, half of count
    result = score_generations(items, answered(items, right), METRICS["simple"])
    assert result.intervals["accuracy_color"] == (1.0, 1.0)
    low, high = result.intervals["accuracy_count"]
    assert (low, high) == pytest.approx((0.5 - 0.155, 0.5 + 0.155), abs=0.03)


def test_rows_can_be_compared_and_those_of_other_items_cannot():
    items = questions(25, 2)
    first = score_generations(items, answered(items, set(range(40))), METRICS["simple"])
    second = score_generations(items, answered(items, set(range(20))), METRICS["simple"])
    assert sample_of(first.rows).value == first.scores["accuracy"]
    assert interval(sample_of(first.rows)) == first.intervals["accuracy"]
    difference = paired(sample_of(first.rows), sample_of(second.rows))
    assert difference.value == pytest.approx(0.4)
    assert difference.p < 0.01
    with pytest.raises(DataError, match=r"10 \(first: \(40, '20\.jpg', 'color 0\?'\)"):
        paired(sample_of(first.rows), sample_of(second.rows[:40]))


def test_rows_without_public_answers_have_no_intervals_and_cannot_be_compared():
    items = questions(4, 1, answers=())
    result = score_generations(items, answered(items, set()), METRICS["vqav2"])
    assert result.intervals == {}
    with pytest.raises(
        DataError, match=r"4 of 4 predictions have no score, the first is of '0\.jpg'"
    ):
        sample_of(result.rows)


def test_one_image_has_scores_without_intervals():
    items = questions(1, 8)
    result = score_generations(items, answered(items, {0, 1}), METRICS["simple"])
    assert result.scores["accuracy"] == 0.25
    assert result.intervals == {}


def judged(*judgments):
    """Return one item for each {kind: (right, mentioned)}, and whether its caption is right."""
    return Texts(
        Example(f"{i}.jpg", None, ("a dog", "a cat"), judge=lambda _, each=each: Judgment(*each))
        for i, each in enumerate(judgments)
    )


def test_captions_that_are_judged_have_shares_of_facts_and_of_right_captions():
    items = judged(
        ({"color": (1, 2), "place": (1, 1)}, False),
        ({"color": (3, 3)}, True),
        ({}, False),
        ({"place": (0, 2)}, False),
    )
    said = [Generation(i, "a dog", True) for i in range(len(items))]
    result = score_generations(items, said, METRICS["cider"])
    expected = {
        "captions_right": 1 / 4, "facts": 5 / 8, "facts_color": 4 / 5, "facts_place": 1 / 3,
        "facts_per_caption": 8 / 4,
    }  # fmt: skip
    assert {name: result.scores[name] for name in expected} == pytest.approx(expected)
    assert "facts_shape" not in result.scores
    for name in expected:
        low, high = result.intervals[name]
        assert low <= result.scores[name] <= high
    json.dumps(result.rows)
    for name in ("captions_right", "facts", "facts_place"):
        assert sample_of(result.rows, name).value == result.scores[name]
        assert paired(sample_of(result.rows, name), sample_of(result.rows, name)).value == 0
    assert sample_of(result.rows, "cider").value == result.scores["cider"]


def test_captions_without_any_fact_have_no_fact_right():
    result = score_generations(
        judged(*[({}, False)] * 4), [Generation(i, None, True) for i in range(4)], METRICS["cider"]
    )
    assert (result.scores["facts"], result.scores["captions_right"]) == (0, 0)
    assert result.intervals["facts"] == (0, 0)


@pytest.mark.parametrize("media", ["image", "clip"])
def test_true_captions_of_scenes_are_all_right_and_those_of_other_scenes_are_mostly_not(media):
    items = ScenesSource(media, "val", count=60)
    for shift, expected in ((0, lambda x: x == 1), (1, lambda x: 0 < x < 0.3)):
        said = [
            Generation(i, items.text_only((i + shift) % 60).captions[0], True) for i in range(60)
        ]
        scores = score_generations(items, said, METRICS["cider"]).scores
        assert expected(scores["captions_right"])
        assert (scores["facts"] == 1) == (shift == 0)
