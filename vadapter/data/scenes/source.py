"""The "scenes" data set: procedural images and clips of colored shapes, and texts about them.

It needs no download, costs less than a millisecond an image, and has what a real benchmark has:
several references an image, questions with a known answer, held-out splits, and a split of
color and shape combinations never painted in training.
"""

import collections
import dataclasses
import functools
import hashlib
import operator
from collections.abc import Callable, Iterator

import numpy as np

from vadapter.data.example import Example, Question, Source
from vadapter.data.prompts import CAPTION, QUESTION, text_piece
from vadapter.data.scenes.captions import captions, keywords, whole
from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.paint import render
from vadapter.data.scenes.questions import questions
from vadapter.data.scenes.world import PAIRS, SPLITS, Scene, draw
from vadapter.errors import ConfigError

# The streams of an example: other wording leaves the pixels as they are, and so on.
_PIXELS, _WORDS, _QUESTIONS = 0, 1, 2
MEDIA = ("image", "clip", "text")


@dataclasses.dataclass(frozen=True)
class ScenesSource(Source):
    """Random access to the scenes of one medium and split.

    Args:
      media: "image", u8[1,S,S,3] with captions and questions; "clip", u8[8,S,S,3] likewise; or
        "text", language-modeling documents about images and clips that are not rendered.
      split: "train", "val", "test", or "unseen": every scene holds a color and shape combination
        that no image or clip of the other splits holds. The splits share no combination of
        attributes (see `world.split_of`). Text documents do speak of the held-out combinations:
        the language model knows the words, the vision side has never seen what they mean.
      size: the side S in pixels, 64 to 256.
      count: the number of examples; a longer source begins with the shorter one.
      seed: another seed, other scenes.
      form: of text, one form of document alone (a key of DOCUMENTS); "" mixes them.

    Every example has five captions; those who want fewer take the first ones.

    Raises:
      ConfigError: an unknown medium or split, or a number out of range.
    """

    media: str = "image"
    split: str = "train"
    size: int = 64
    count: int = 10_000
    seed: int = 0
    form: str = ""

    def __post_init__(self):
        choices = (("media", MEDIA), ("split", SPLITS), ("form", ("", *DOCUMENTS)))
        for name, known in choices:
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ConfigError(f"scenes: {name}={value!r}; choose one of {', '.join(known)}")
        for name, low, high in (("size", 64, 256), ("count", 1, 2**31 - 1), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and low <= value <= high):
                raise ConfigError(f"scenes: {name}={value!r}; give an integer in {low}..{high}")

    @property
    def kind(self) -> str:
        """The medium, by the name that all sources use."""
        return self.media

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        example = self.text_only(index)
        if self.kind == "text":
            return example
        dice = self._dice(index, _PIXELS)
        return dataclasses.replace(example, media=render(self._draw(dice), self.size, dice))

    def text_only(self, index: int) -> Example:
        """The example at `index` without its pixels: nothing is rendered, and it is remembered."""
        return _words(self, self._check(index))

    def scene(self, index: int) -> Scene:
        """The structure behind the example at `index`."""
        return self._draw(self._dice(self._check(index), _PIXELS))

    def qa(self, index: int) -> tuple[tuple[str, str, str], ...]:
        """The (question, answer, kind) of the example at `index`; nothing is rendered."""
        return questions(self.scene(index), self._dice(index, _QUESTIONS))

    def texts(self) -> Iterator[str]:
        """All that the source says, for training a tokenizer; nothing is rendered."""
        for index in range(self.count):
            scene, words = self.scene(index), self._dice(index, _WORDS)
            if self.kind == "text":
                yield from document(scene, words, self.form)
                continue
            yield from captions(scene, words)
            for question, answer, _ in self.qa(index):
                yield QUESTION.after(question)
                yield text_piece(answer)

    def fingerprint(self) -> str:
        """A sha256 in hex of the arguments and of the first examples, words and pixels."""
        digest = hashlib.sha256(repr(dataclasses.astuple(self)).encode())
        for index in range(min(self.count, 16)):
            digest.update(example_digest(self[index]).encode())
        return digest.hexdigest()

    def _check(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self.count:
            raise IndexError(f"scenes: index {index} is not in 0..{self.count - 1}")
        return index

    def _dice(self, index: int, stream: int) -> Dice:
        space = SPLITS.index(self.split) * len(MEDIA) + MEDIA.index(self.media)
        return Dice(self.seed, space, index, stream)

    def _draw(self, dice: Dice) -> Scene:
        if self.kind == "text":
            return draw(dice, dice.pick(("image", "clip")), self.split, PAIRS)
        return draw(dice, self.kind, self.split)


@functools.lru_cache(maxsize=2**16)
def _words(source: ScenesSource, index: int) -> Example:
    scene, words = source.scene(index), source._dice(index, _WORDS)
    name = f"scenes-{source.kind}-{source.split}-{source.seed}-{index}"
    if source.kind == "text":
        return Example(id=name, pieces=document(scene, words, source.form))
    asked = questions(scene, source._dice(index, _QUESTIONS))
    qa = tuple(Question(text, (answer,), kind) for text, answer, kind in asked)
    return Example(id=name, captions=captions(scene, words), qa=qa)


def example_digest(example: Example) -> str:
    """A sha256 in hex of an example's words and pixels."""
    qa = tuple((q.text, q.answer, q.kind) for q in example.qa)
    digest = hashlib.sha256(repr((example.id, example.captions, qa, example.pieces)).encode())
    if isinstance(example.media, np.ndarray):
        digest.update(example.media.tobytes())
    return digest.hexdigest()


def _siblings(scene: Scene, dice: Dice) -> tuple[str, ...]:
    target, *others = captions(scene, dice)
    context = ". ".join(others[: dice.pick((1, 1, 2, 3))])
    return CAPTION.before, text_piece(context), CAPTION.after, text_piece(target)


def _keywords(scene: Scene, dice: Dice) -> tuple[str, ...]:
    target = captions(scene, dice)[0]
    return CAPTION.before, text_piece(keywords(scene, dice)), CAPTION.after, text_piece(target)


def _question(scene: Scene, dice: Dice) -> tuple[str, ...]:
    question, answer, _ = questions(scene, dice)[0]
    context = whole(scene, dice)
    if dice.chance(0.3):  # some of it said twice, and not all of what is said matters
        context = ". ".join(dice.shuffled([context, captions(scene, dice)[0]]))
    return QUESTION.before, text_piece(context), QUESTION.after(question), text_piece(answer)


def _plain(scene: Scene, dice: Dice) -> tuple[str, ...]:
    return CAPTION.before, CAPTION.after, text_piece(captions(scene, dice)[0])


DOCUMENTS: dict[str, tuple[float, Callable[[Scene, Dice], tuple[str, ...]]]] = {
    "siblings": (0.35, _siblings),
    "keywords": (0.2, _keywords),
    "question": (0.25, _question),
    "plain": (0.2, _plain),
}


def document(scene: Scene, dice: Dice, form: str = "") -> tuple[str, ...]:
    """A document whose text stands where the visual tokens will stand, as pieces.

    A language model that has only read single captions cannot be steered by what stands in front
    of it. These documents have the exact layout of the multimodal stages: prompt, description,
    the rest of the prompt, text.

    Args:
      scene: what it is about.
      dice: where its form and words come from.
      form: a key of DOCUMENTS, or "" to draw one with its weight.
    """
    form = form or dice.weighted({name: weight for name, (weight, _) in DOCUMENTS.items()})
    return DOCUMENTS[form][1](scene, dice)


def blind_baselines(
    source: ScenesSource, fit: ScenesSource | None = None, limit: int = 2000
) -> dict[str, dict[str, float]]:
    """The accuracy of answering without looking: what a model must beat to have seen anything.

    Args:
      source: the questions to answer.
      fit: where the majority answers come from; by default the train split of the same medium.
      limit: examples of each to use, at most.

    Returns:
      By question kind, and for "all": `count`, `kind_majority`, the accuracy of the most frequent
      answer of the kind, and `question_majority`, that of the most frequent answer to the same
      question, word by word, falling back on the kind.
    """
    fit = fit or dataclasses.replace(source, split="train", count=max(source.count, limit))
    by_kind, by_text = (collections.defaultdict(collections.Counter) for _ in range(2))
    for question, answer, kind in _asked(fit, limit):
        by_kind[kind][answer] += 1
        by_text[question][answer] += 1
    total: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for question, answer, kind in _asked(source, limit):
        frequent = _best(by_kind[kind])
        for key in (kind, "all"):
            total[key]["count"] += 1
            total[key]["kind_majority"] += answer == frequent
            total[key]["question_majority"] += answer == (_best(by_text[question]) or frequent)
    return {
        key: {
            "count": float(t["count"]),
            "kind_majority": t["kind_majority"] / t["count"],
            "question_majority": t["question_majority"] / t["count"],
        }
        for key, t in total.items()
    }


def _asked(source: ScenesSource, limit: int) -> Iterator[tuple[str, str, str]]:
    for index in range(min(len(source), limit)):
        yield from source.qa(index)


def _best(answers: collections.Counter) -> str:
    return answers.most_common(1)[0][0] if answers else ""
