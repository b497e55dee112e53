"""The "scenes" data set: procedural images and clips of colored shapes, and texts about them.

It needs no download, takes less than a millisecond for an image, and has the parts of a real
benchmark: several captions of each image, questions with known answers, held-out splits, and a
split of color and shape combinations that are never painted in training.
"""

import dataclasses
import functools
import hashlib
import operator
from collections.abc import Iterator

import numpy as np

from vadapter.config import require_one_of
from vadapter.data.example import Example, Judgment, Question, Source
from vadapter.data.prompts import CAPTION, QUESTION, text_piece
from vadapter.data.scenes import facts
from vadapter.data.scenes.captions import CAPTIONS, captions, keywords, whole
from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.paint import render
from vadapter.data.scenes.questions import questions
from vadapter.data.scenes.world import PAIRS, SPLITS, Scene, draw
from vadapter.errors import ConfigError

# The random streams of an example: a change of wording does not change the pixels, and so on.
_PIXELS, _WORDS, _QUESTIONS = 0, 1, 2
MEDIA = ("image", "clip", "text")
DOCUMENTS = {"siblings": 0.35, "keywords": 0.2, "question": 0.25, "plain": 0.2}  # form: its share


@dataclasses.dataclass(frozen=True)
class ScenesSource(Source):
    """The scenes of one medium and split, each with five captions.

    Args:
      media: "image", u8[1,S,S,3] with captions and questions; "clip", u8[8,S,S,3] likewise; or
        "text", language-modeling documents about images and clips that are not rendered.
      split: "train", "val", "test", or "unseen", where every scene has a color and shape
        combination that no image or clip of the other splits has. The splits share no combination
        of attributes (see `world.split_of`). Text documents do mention the held-out combinations:
        the language model knows the words, the vision encoder has never seen what they mean.
      size: the side S in pixels, 64 to 256.
      count: the number of examples; a longer source begins with the examples of a shorter one.
      form: of text documents, the only form (a key of DOCUMENTS); "" mixes them. Of images and
        clips, "whole": captions are complete descriptions, with color, shape, size, and place or
        motion of every thing, as densely captioned training sets have; "": captions that mention
        some of it.

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
        forms = DOCUMENTS if self.media == "text" else ("whole",)
        names = {"media": MEDIA, "split": SPLITS, "form": ("", *forms)}
        for name, choices in names.items():
            value = getattr(self, name)
            require_one_of(f"scenes: {name}={value!r}", value, choices)
        for name, low, high in (("size", 64, 256), ("count", 1, 2**31 - 1), ("seed", 0, 2**63 - 1)):
            value = getattr(self, name)
            if not (isinstance(value, int) and low <= value <= high):
                raise ConfigError(f"scenes: {name}={value!r}; give an integer in {low}..{high}")

    @property
    def kind(self) -> str:
        """The medium, under the name that all sources use."""
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
        """Return the example without its pixels; nothing is rendered, and the result is cached."""
        return _words(self, self._check(index))

    def scene(self, index: int) -> Scene:
        """Return the scene of an example."""
        return self._draw(self._dice(self._check(index), _PIXELS))

    def qa(self, index: int) -> tuple[tuple[str, str, str], ...]:
        """Return the (question, answer, kind) of an example; nothing is rendered."""
        return questions(self.scene(index), self._dice(index, _QUESTIONS))

    def texts(self) -> Iterator[str]:
        """Yield all texts of the source, to train a tokenizer on; nothing is rendered."""
        for index in range(self.count):
            scene, words = self.scene(index), self._dice(index, _WORDS)
            if self.kind == "text":
                yield from document(scene, words, self.form)
                continue
            yield from self.written(scene, words)
            for question, answer, _ in self.qa(index):
                yield QUESTION.after(question)
                yield text_piece(answer)

    def written(self, scene: Scene, dice: Dice) -> tuple[str, ...]:
        """Return the captions of an image or clip, in the form of this source."""
        if self.form == "whole":
            return tuple(whole(scene, dice) for _ in range(CAPTIONS))
        return captions(scene, dice)

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the arguments and of the first examples, texts and pixels."""
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
    qa = tuple(Question(text, (answer,), kind) for text, answer, kind in source.qa(index))
    judge = functools.partial(_judge, source, index)
    return Example(id=name, captions=source.written(scene, words), qa=qa, judge=judge)


def _judge(source: ScenesSource, index: int, caption: str) -> Judgment:
    """Judge a caption of a scene, which is drawn again: examples do not keep it."""
    return facts.judge(source.scene(index), caption)


def example_digest(example: Example) -> str:
    """Return a SHA-256 (hex) of an example's texts and pixels."""
    qa = tuple((q.text, q.answer, q.kind) for q in example.qa)
    digest = hashlib.sha256(repr((example.id, example.captions, qa, example.pieces)).encode())
    if isinstance(example.media, np.ndarray):
        digest.update(example.media.tobytes())
    return digest.hexdigest()


def document(scene: Scene, dice: Dice, form: str = "") -> tuple[str, ...]:
    """Return a document, as pieces, in which text takes the place of the visual tokens.

    A language model trained on single captions does not use what precedes a caption. These
    documents have the layout of the multimodal stages: prompt, description, the rest of the prompt,
    text (see `data.documents`). A `form` of "" draws one by weight.
    """
    form = form or dice.weighted(DOCUMENTS)
    if form == "question":
        question, answer, _ = questions(scene, dice)[0]
        context = whole(scene, dice)
        if dice.chance(0.3):  # repetitions and irrelevant words teach it to select
            context = ". ".join(dice.shuffled([context, captions(scene, dice)[0]]))
        return QUESTION.before, text_piece(context), QUESTION.after(question), text_piece(answer)
    target, *others = captions(scene, dice)
    if form == "plain":
        return CAPTION.before, CAPTION.after, text_piece(target)
    if form == "siblings":
        context = ". ".join(others[: dice.pick((1, 1, 2, 3))])
    else:
        context = keywords(scene, dice)
    return CAPTION.before, text_piece(context), CAPTION.after, text_piece(target)
