"""Question answering scores equal the official scripts, quirks included."""

import gzip
import json
from pathlib import Path

import pytest
from support.odd_text import SPACES

from vadapter.errors import DataError
from vadapter.metrics import vqa
from vadapter.metrics.vqa import EXACT, IVQA, TEXTVQA, VIZWIZ, VQAV2, accuracy, score_answers


def votes(text: str) -> list[str]:
    """`3*cat 7*x` -> ten answers."""
    return [
        answer
        for vote in text.split()
        for count, answer in [vote.split("*")]
        for _ in range(int(count))
    ]


@pytest.mark.parametrize(
    ("count", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
@pytest.mark.parametrize("rules", [VQAV2, TEXTVQA, VIZWIZ], ids=lambda rules: rules.name)
def test_leave_one_out_credit(rules: vqa.Rules, count: int, score: float):
    answers = ["cat"] * count + [f"x{i}" for i in range(10 - count)]
    assert accuracy("cat", answers, rules) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answers", "prediction", "official", "textvqa"),
    [
        ("10*black", "Black.", 0, 1),
        ("9*the_cat 1*cat", "the cat", 1, 1),
        ("10*none", "none", 1, 1),
        ("3*cat 7*x", "cat", 0.9, 0.9),
        ("2*a1 2*b 2*c 2*d 2*e", "a1", 0.6, 0.6),
        ("2*a 2*b 2*c 2*d 2*e", "a", 0.6, 0.6),  # an article: all ten become the empty answer
    ],
)
def test_probes_of_the_divergence_between_implementations(answers, prediction, official, textvqa):
    truth = [answer.replace("_", " ") for answer in votes(answers)]
    assert accuracy(prediction, truth, VQAV2) == pytest.approx(official)
    assert accuracy(prediction, truth, TEXTVQA) == pytest.approx(textvqa)


@pytest.mark.parametrize(
    ("raw", "vqa_form", "evalai_form"),
    [
        ("The Two dogs, and a cat", "2 dogs and cat", "2 dogs and cat"),
        ("none", "0", "0"),
        ("dont know", "don't know", "don't know"),
        ("couldntve couldnt've", "couldntve couldn't've", "couldntve couldn't've"),
        ("Im", "im", "im"),
        ("somebody'd", "somebodyd", "somebodyd"),
        ("cat's", "cat's", "cat 's"),
        ("red/blue", "red blue", "red blue"),
        ("red/ blue", "red blue", "red blue"),
        ("apple,grape", "apple grape", "applegrape"),
        ("1,000-year", "1000year", "1000 year"),
        ("3.5", "3.5", "3.5"),
        ("5. u.s.", "5 us", "5 us"),
        ("a" + "." * 40, "a" + "." * 8, "a" + "." * 8),
    ],
)
def test_normal_forms(raw: str, vqa_form: str, evalai_form: str):
    assert vqa.normalize_vqa(raw) == vqa_form
    assert vqa.normalize_evalai(raw) == evalai_form


@pytest.mark.parametrize("form", [vqa.normalize_vqa, vqa.normalize_vizwiz, vqa.normalize_evalai])
def test_normal_forms_split_words_at_white_space_of_every_kind_and_at_nothing_else(form):
    # The scripts call str.split(), which knows no zero-width characters.
    for gap in (*SPACES, "\n", "\r", "\u2028"):
        assert form(f"red{gap}dog") == " ".join(f"red{gap}dog".split())
    assert form("red\u2003dog") == "red dog"
    assert form("red\u200bdog") == "red\u200bdog"


@pytest.mark.parametrize("gap", ["\u00a0", "\u2003", "\r"])
def test_only_line_feeds_and_tabs_are_spaces_where_answers_are_compared_raw(gap: str):
    unanimous, mixed = ["red dog"] * 10, ["red dog"] * 9 + ["dog"]
    assert accuracy(f"red{gap}dog", unanimous, VQAV2) == 0
    assert accuracy(f"red{gap}dog", mixed, VQAV2) == 1
    assert accuracy("red\ndog", unanimous, VQAV2) == accuracy("red\tdog", unanimous, VQAV2) == 1


def test_vizwiz_normalizes_predictions_but_never_annotators():
    assert accuracy("Unanswerable.", ["unanswerable"] * 10, VIZWIZ) == 1
    assert accuracy("the cat", ["the cat"] * 10, VIZWIZ) == 0
    assert accuracy("cat", ["Cat"] * 5 + ["cat "] * 5, VIZWIZ) == 0
    assert vqa.normalize_vizwiz("dont cant") == "don’t can't"
    assert accuracy("dont know", ["don't know"] * 10, VIZWIZ) == 0


@pytest.mark.parametrize(("count", "score"), [(0, 0), (1, 0.5), (2, 1), (5, 1)])
def test_ivqa_counts_two_annotators_as_enough(count: int, score: float):
    answers = ["spoon"] * count + [f"x{i}" for i in range(5 - count)]
    assert accuracy(" Spoon\n", answers, IVQA) == score


def test_exact_is_equality_after_case_and_blanks():
    assert accuracy(" Guitar\n", ["guitar"], EXACT) == 1
    assert accuracy("a guitar", ["guitar"], EXACT) == 0
    assert accuracy("guitar.", ["guitar"], EXACT) == 0


def test_a_set_is_averaged_and_broken_down():
    scores = score_answers(
        {1: "yes", 2: "red", 3: "no"},
        {1: ["yes"], 2: ["blue"], 3: ["no"]},
        EXACT,
        kinds={1: "yes/no", 2: "other", 3: "yes/no"},
    )
    assert scores.n == 3
    assert scores.accuracy == pytest.approx(2 / 3)
    assert scores.accuracy_of == {1: 1, 2: 0, 3: 1}
    assert scores.by_kind == {"yes/no": 1, "other": 0}


def test_unanswered_questions_and_invalid_annotations_are_refused():
    with pytest.raises(DataError, match=r"same question ids.*\[2\]"):
        score_answers({1: "a"}, {1: ["a"], 2: ["b"]}, EXACT)
    with pytest.raises(DataError, match="kinds"):
        score_answers({1: "a"}, {1: ["a"]}, EXACT, kinds={})
    with pytest.raises(DataError, match="no questions"):
        score_answers({}, {}, EXACT)
    with pytest.raises(DataError, match="needs 10"):
        accuracy("a", ["a"] * 9, TEXTVQA)
    with pytest.raises(DataError, match="at least 1"):
        accuracy("a", [], VQAV2)


@pytest.mark.data
def test_golden_normal_forms(data_root: Path):
    path = data_root / "metrics/vqa/answer_normalisation.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 35425
    assert [row[0] for row in rows if vqa.normalize_vqa(row[0]) != row[1]] == []
    assert [row[0] for row in rows if vqa.normalize_evalai(row[0]) != row[2]] == []


@pytest.mark.data
@pytest.mark.parametrize("name", ["vqav2_subset_test2962", "textvqa_val5000", "vizwiz_val4319"])
def test_golden_scores_per_question(data_root: Path, name: str):
    with gzip.open(data_root / f"metrics/vqa/{name}.json.gz") as file:
        golden = json.load(file)
    questions = golden["questions"]
    answers = {question["question_id"]: question["answers"] for question in questions}
    kinds = {question["question_id"]: question["answer_type"] for question in questions}
    for run, result in golden["results"].items():
        predictions = {key: prediction for key, prediction, _ in result["predictions"]}
        official = {key: percent for key, _, percent in result["predictions"]}
        scores = score_answers(predictions, answers, VQAV2, kinds)
        percents = {key: round(100 * score, 2) for key, score in scores.accuracy_of.items()}
        assert percents == official, run
        assert round(100 * scores.accuracy, 2) == result["overall"], run
        by_kind = {kind: round(100 * score, 2) for kind, score in scores.by_kind.items()}
        assert by_kind == result["perAnswerType"], run
        evalai = score_answers(predictions, answers, TEXTVQA)
        assert evalai.accuracy == pytest.approx(result["mmf_textvqa_accuracy"], abs=1e-12), run
