"""Visual question answering accuracy by the official rules of each benchmark.

One function scores an answer; the differences between benchmarks are data, `Rules` records:

  VQAV2    GT-Vision-Lab/VQA vqaEval.py (VQAv2; OK-VQA, whose annotations are already stemmed)
  TEXTVQA  EvalAI processor of mmf (TextVQA)
  VIZWIZ   vqaEval.py as distributed by vizwiz.org
  IVQA     just-ask / FrozenBiLM (iVQA): half a point per agreeing annotator, at most one point
  EXACT    top-1 string equality (MSRVTT-QA, MSVD-QA); the denominator is every test question

and the rules by which other papers publish numbers under the same benchmark names: OPENFLAMINGO,
LAVIS, BIG_VISION, EXACT_EVALAI.

Quirks of the official scripts are reproduced, since published numbers contain them; each is marked
where it is implemented. Scores are fractions in 0..1: multiply by 100 to print them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

from vadapter.errors import DataError

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# Quirk: the scripts intend to keep periods after a digit, but keep only those before a digit.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # Quirk: the scripts pass a regex flag as the count, which limits the replacements.
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_WORDS.split())}
_ARTICLES = {"a", "an", "the"}

# Ending -> the stems whose apostrophe the scripts restore. The official tables omit ambiguous words
# (its, well, were, shed); their capitalized entries (Im, Ive) never match lower-cased answers.
_CONTRACTED = {
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'s": "he how somebody someone that there what when where who why",
    "'ll": "how it somebody someone something they what who why you",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
    "": "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at",
}


def _restored(forms: Sequence[str]) -> dict[str, str]:
    """Return a map from each form without one of its apostrophes to the form."""
    marks = [(form, i) for form in forms for i, sign in enumerate(form) if sign == "'"]
    return {form[:i] + form[i + 1 :]: form for form, i in marks}


_FORMS = [stem + end for end, stems in _CONTRACTED.items() for stem in stems.split()]
# Quirk: this entry removes the apostrophe.
_CONTRACTIONS = _restored(_FORMS) | {"somebody'd": "somebodyd"}

# Quirk: most apostrophes in VizWiz's table are typographic, so that `dont` becomes `don’t`, which
# no annotator wrote.
_STRAIGHT = ["ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"]
_VIZWIZ_CONTRACTIONS = {
    key.replace("'", "’"): form.replace("'", "’") for key, form in _CONTRACTIONS.items()
}
_VIZWIZ_CONTRACTIONS |= _restored(_STRAIGHT)
for _key in ("couldn'tve", "hadn'tve"):
    _VIZWIZ_CONTRACTIONS[_key] = _VIZWIZ_CONTRACTIONS.pop(_key.replace("'", "’"))


def _single_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _strip_punctuation(text: str) -> str:
    """Delete punctuation next to a space, replace the rest by spaces, drop full stops.

    Quirk: one comma between digits anywhere makes all punctuation vanish without a space.
    """
    delete_all = _DIGIT_COMMA.search(text) is not None
    out = text
    for sign in _SIGNS:
        beside_space = sign + " " in text or " " + sign in text
        out = out.replace(sign, "" if delete_all or beside_space else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _plain_words(text: str, contractions: Mapping[str, str]) -> str:
    """Return the text in lower case, with digits for number words, without articles."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_vqa(answer: str) -> str:
    """Return the normal form of the VQAv2 script; idempotent on most, not all, answers."""
    return _plain_words(_strip_punctuation(answer), _CONTRACTIONS)


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_evalai(answer: str) -> str:
    """Return the normal form of TextVQA's server: commas are removed first, `'s` is a word."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(_single_line(text.strip()))


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_vizwiz(answer: str) -> str:
    """Return VQAv2's normal form with VizWiz's own table of contractions."""
    return _plain_words(_strip_punctuation(answer), _VIZWIZ_CONTRACTIONS)


When = Literal["never", "unless unanimous", "always"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a benchmark compares an answer with those of its annotators.

    With `leave_one_out` the score is the average over all subsets that leave out one annotator, as
    VQA does to make human accuracy comparable: 3 agreeing of 10 then score 0.9.
    """

    name: str  # key in `RULES`
    normalize: Callable[[str], str]
    truth: When  # are the annotators' answers normalized; with "never" even their spaces count
    prediction: When  # is the prediction normalized
    enough: int  # number of agreeing annotators for the full point
    leave_one_out: bool
    annotators: int = 0  # number of answers per question, 0 if it may vary
    normalize_truth: Callable[[str], str] | None = None  # if it differs from `normalize`


# Quirk: unanimous answers are compared raw, so that `Black.` does not equal ten `black`.
VQAV2 = Rules("vqav2", normalize_vqa, "unless unanimous", "unless unanimous", 3, True)
TEXTVQA = Rules("textvqa", normalize_evalai, "always", "always", 3, True, annotators=10)
VIZWIZ = Rules("vizwiz", normalize_vizwiz, "never", "always", 3, True)
IVQA = Rules("ivqa", str.lower, "always", "always", 2, False)
EXACT = Rules("exact", str.lower, "always", "always", 1, False)

# Not official: never report one of these as the score of the benchmark.
OPENFLAMINGO = Rules("openflamingo", normalize_vqa, "always", "always", 3, True)
# LAVIS only strips punctuation from the annotators' answers: a prediction `none` becomes `0` and
# never matches.
LAVIS = Rules(
    "lavis", normalize_vqa, "unless unanimous", "always", 3, True,
    normalize_truth=_strip_punctuation,
)  # fmt: skip
BIG_VISION = Rules("big_vision", str, "never", "never", 3, False)  # for OK-VQA
EXACT_EVALAI = Rules("evalai", normalize_evalai, "always", "always", 1, False)

_OTHERS = (OPENFLAMINGO, LAVIS, BIG_VISION, EXACT_EVALAI)
RULES = {rules.name: rules for rules in (VQAV2, TEXTVQA, VIZWIZ, IVQA, EXACT, *_OTHERS)}


def accuracy(prediction: str, answers: Sequence[str], rules: Rules) -> float:
    """Return the score of one answer given those of the annotators, a fraction in 0..1.

    Line breaks and tabs in the prediction count as spaces, outer ones are stripped.

    Raises:
      DataError: no answers, or not as many as the benchmark requires.
    """
    if not answers or len(answers) != (rules.annotators or len(answers)):
        raise DataError(
            f"{rules.name} needs {rules.annotators or 'at least 1'} annotators' answers per "
            f"question, but one question has {len(answers)}: {list(answers)[:3]}. Check the "
            "annotation file."
        )
    truth = [_single_line(text) for text in answers] if rules.truth != "never" else list(answers)
    answer = _single_line(prediction)
    unanimous = len(set(truth)) == 1

    def applies(when: When) -> bool:
        return when == "always" or (when == "unless unanimous" and not unanimous)

    if applies(rules.prediction):
        answer = rules.normalize(answer)
    if applies(rules.truth):
        truth = [(rules.normalize_truth or rules.normalize)(text) for text in truth]
    agree, total = truth.count(answer), len(truth)
    if not rules.leave_one_out:
        return min(1.0, agree / rules.enough)
    # Leaving out an agreeing annotator leaves `agree - 1`; equal answers count one by one.
    inside, outside = min(1.0, (agree - 1) / rules.enough), min(1.0, agree / rules.enough)
    return (agree * inside + (total - agree) * outside) / total


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Scores of a VQA test set."""

    accuracy: float  # mean over all questions, 0..1
    n: int  # questions
    accuracy_of: Mapping[Hashable, float]  # by the question's id
    by_kind: Mapping[str, float]  # mean of each kind (`yes/no`, `number`, `other`), if known


def score_answers(
    predictions: Mapping[Hashable, str],
    answers: Mapping[Hashable, Sequence[str]],
    rules: Rules,
    kinds: Mapping[Hashable, str] | None = None,
) -> AnswerScores:
    """Score a test set; an unanswered question is an error, not a smaller denominator.

    Keys are the questions' ids; `kinds` are those of the questions, for the breakdown.

    Raises:
      DataError: no questions, the ids differ, or a question lacks answers or a kind.
    """
    for name, other in (("predictions", predictions), ("kinds", kinds)):
        if other is not None and other.keys() != answers.keys():
            differing = list(other.keys() ^ answers.keys())
            raise DataError(
                f"{name} and answers must have the same question ids, but {len(differing)} are in "
                f"only one of them, e.g. {differing[:3]}. Answer every question of the split."
            )
    if not answers:
        raise DataError("Nothing to score: there are no questions.")
    scores = {key: accuracy(predictions[key], answers[key], rules) for key in answers}
    groups: dict[str, list[float]] = {}
    for key, kind in (kinds or {}).items():
        groups.setdefault(kind, []).append(scores[key])
    by_kind = {kind: sum(group) / len(group) for kind, group in groups.items()}
    return AnswerScores(sum(scores.values()) / len(scores), len(scores), scores, by_kind)
