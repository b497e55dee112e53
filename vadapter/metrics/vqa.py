"""Visual question answering accuracy by the official rules of each benchmark.

One function scores an answer; what differs between the benchmarks is data, a `Rules` record:

  VQAV2    GT-Vision-Lab/VQA vqaEval.py (VQAv2; OK-VQA on its own, already stemmed annotations)
  TEXTVQA  mmf's EvalAI processor (TextVQA)
  VIZWIZ   vqaEval.py as distributed by vizwiz.org
  IVQA     just-ask / FrozenBiLM (iVQA): half a point per annotator who agrees, at most one
  EXACT    top-1 string equality (MSRVTT-QA, MSVD-QA); the denominator is every test question

and what others publish under the same names: OPENFLAMINGO, LAVIS, BIG_VISION, EXACT_EVALAI.

Quirks of the official scripts are kept, since published numbers contain them; each is named where
it is implemented. Scores are fractions in 0..1: multiply by 100 to print them.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

from vadapter.errors import DataError

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r"\d,\d")
# Quirk: the scripts mean to spare periods behind a digit, but only those before a digit are spared.
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # Quirk: a regex flag passed in the place of the count limits how many go.
_WORDS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(i) for i, word in enumerate(_WORDS.split())}
_ARTICLES = {"a", "an", "the"}

# Ending -> the words that the scripts repair. Where plain English is ambiguous (its, well, were,
# shed) the official tables have no entry, and their capital ones (Im, Ive) can never be met.
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


def _repairs(forms: Sequence[str]) -> dict[str, str]:
    """Each form without any one of its apostrophes -> the form."""
    return {
        form[:i] + form[i + 1 :]: form for form in forms for i, c in enumerate(form) if c == "'"
    }


_FORMS = [stem + end for end, stems in _CONTRACTED.items() for stem in stems.split()]
# Quirk: this entry takes the apostrophe away.
_CONTRACTIONS = _repairs(_FORMS) | {"somebody'd": "somebodyd"}

# Quirk: an editor turned most apostrophes of VizWiz's table into typographic ones, so that `dont`
# becomes `don’t`, which no annotator wrote.
_STRAIGHT = ["ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"]
_VIZWIZ_CONTRACTIONS = {
    key.replace("'", "’"): form.replace("'", "’") for key, form in _CONTRACTIONS.items()
}
_VIZWIZ_CONTRACTIONS |= _repairs(_STRAIGHT)
for _key in ("couldn'tve", "hadn'tve"):
    _VIZWIZ_CONTRACTIONS[_key] = _VIZWIZ_CONTRACTIONS.pop(_key.replace("'", "’"))


def _blank(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_signs(text: str) -> str:
    """Deletes punctuation that touches a blank, turns the rest into blanks, drops full stops.

    Quirk: one comma between digits anywhere makes all punctuation vanish without a blank.
    """
    delete_all = _DIGIT_COMMA.search(text) is not None
    out = text
    for sign in _SIGNS:
        touches = sign + " " in text or " " + sign in text
        out = out.replace(sign, "" if delete_all or touches else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _plain_words(text: str, contractions: Mapping[str, str]) -> str:
    """Lower case, digits for number words, no articles, apostrophes restored."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_vqa(answer: str) -> str:
    """The normal form of the VQAv2 script; idempotent on most, not all, answers."""
    return _plain_words(_without_signs(answer), _CONTRACTIONS)


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_evalai(answer: str) -> str:
    """The normal form of TextVQA's evaluation server: commas go first, `'s` is a word."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalize_vqa(_blank(text.strip()))


@functools.lru_cache(maxsize=1 << 16)  # answers repeat
def normalize_vizwiz(answer: str) -> str:
    """VQAv2's normal form with VizWiz's own table of contractions."""
    return _plain_words(_without_signs(answer), _VIZWIZ_CONTRACTIONS)


When = Literal["never", "unless unanimous", "always"]


@dataclasses.dataclass(frozen=True)
class Rules:
    """How a benchmark compares an answer with those of its annotators.

    Attributes:
      name: the benchmark, for tables.
      normalize: the normal form of an answer.
      normalize_truth: that of the annotators', where it is another.
      truth: when the annotators' answers are normalized; with never even their blanks count.
      prediction: when the prediction is.
      enough: how many agreeing annotators earn the full point.
      leave_one_out: average over the sets of all annotators but one, as VQA does to make human
        accuracy comparable: 3 of 10 agreeing then earn 0.9.
      annotators: the number of answers per question, 0 if it may vary.
    """

    name: str
    normalize: Callable[[str], str]
    truth: When
    prediction: When
    enough: int
    leave_one_out: bool
    annotators: int = 0
    normalize_truth: Callable[[str], str] | None = None


# Quirk of VQAv2: answers on which all agree are compared raw, `Black.` never equals ten `black`.
VQAV2 = Rules("vqav2", normalize_vqa, "unless unanimous", "unless unanimous", 3, True)
TEXTVQA = Rules("textvqa", normalize_evalai, "always", "always", 3, True, annotators=10)
VIZWIZ = Rules("vizwiz", normalize_vizwiz, "never", "always", 3, True)
IVQA = Rules("ivqa", str.lower, "always", "always", 2, False)
EXACT = Rules("exact", str.lower, "always", "always", 1, False)

# Not official; none of them may stand for the official score.
OPENFLAMINGO = Rules("openflamingo", normalize_vqa, "always", "always", 3, True)
# LAVIS clears the annotators' answers of punctuation alone: `none` is never right, it became `0`.
LAVIS = Rules(
    "lavis", normalize_vqa, "unless unanimous", "always", 3, True, normalize_truth=_without_signs
)
BIG_VISION = Rules("big_vision", str, "never", "never", 3, False)  # of OK-VQA
EXACT_EVALAI = Rules("evalai", normalize_evalai, "always", "always", 1, False)


def accuracy(prediction: str, answers: Sequence[str], rules: Rules) -> float:
    """The score of one answer.

    Args:
      prediction: the model's answer; line breaks and tabs count as blanks, outer ones are cut.
      answers: the annotators' answers to this question.
      rules: the benchmark's.

    Returns:
      A fraction in 0..1.

    Raises:
      DataError: no answers, or not the number the benchmark demands.
    """
    if not answers or len(answers) != (rules.annotators or len(answers)):
        raise DataError(
            f"{rules.name} needs {rules.annotators or 'at least 1'} annotators' answers per "
            f"question, this one has {len(answers)}: {list(answers)[:3]}. Check the annotations."
        )
    truth = [_blank(answer) for answer in answers] if rules.truth != "never" else list(answers)
    guess = _blank(prediction)
    unanimous = len(set(truth)) == 1

    def applies(when: When) -> bool:
        return when == "always" or (when == "unless unanimous" and not unanimous)

    if applies(rules.prediction):
        guess = rules.normalize(guess)
    if applies(rules.truth):
        truth = [(rules.normalize_truth or rules.normalize)(answer) for answer in truth]
    agree, total = truth.count(guess), len(truth)
    if not rules.leave_one_out:
        return min(1.0, agree / rules.enough)
    # Leaving out one who agrees leaves `agree - 1`; by place, so that equal answers stay apart.
    inside, outside = min(1.0, (agree - 1) / rules.enough), min(1.0, agree / rules.enough)
    return (agree * inside + (total - agree) * outside) / total


@dataclasses.dataclass(frozen=True)
class AnswerScores:
    """Scores of a question answering test set.

    Attributes:
      accuracy: mean over all questions, 0..1.
      n: the number of questions.
      accuracy_of: the score of each question, by its id.
      by_kind: mean per kind of question (`yes/no`, `number`, `other`), where kinds were given.
    """

    accuracy: float
    n: int
    accuracy_of: Mapping[Hashable, float]
    by_kind: Mapping[str, float]


def score_answers(
    predictions: Mapping[Hashable, str],
    answers: Mapping[Hashable, Sequence[str]],
    rules: Rules,
    kinds: Mapping[Hashable, str] | None = None,
) -> AnswerScores:
    """Scores a whole test set; an unanswered question is an error, not a smaller denominator.

    Args:
      predictions: one answer per question id.
      answers: the annotators' answers of the same ids.
      rules: the benchmark's.
      kinds: optionally the kind of each question, for the breakdown.

    Raises:
      DataError: no questions, the ids differ, or a question lacks answers or a kind.
    """
    for name, other in (("predictions", predictions), ("kinds", kinds)):
        if other is not None and other.keys() != answers.keys():
            differing = list(other.keys() ^ answers.keys())
            raise DataError(
                f"{name} and answers must have the same question ids: {len(differing)} are in only "
                f"one of them, e.g. {differing[:3]}. Answer every question of the split."
            )
    if not answers:
        raise DataError("Nothing to score: there are no questions.")
    of = {key: accuracy(predictions[key], answers[key], rules) for key in answers}
    groups: dict[str, list[float]] = {}
    for key, kind in (kinds or {}).items():
        groups.setdefault(kind, []).append(of[key])
    return AnswerScores(
        accuracy=sum(of.values()) / len(of),
        n=len(of),
        accuracy_of=of,
        by_kind={kind: sum(scores) / len(scores) for kind, scores in groups.items()},
    )
