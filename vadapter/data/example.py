"""The record that every data set yields, and the interface of a data set.

Legend: M 1, or 2 with the mirror image; F frames, H height, W width, N visual tokens a frame,
D encoder width.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from vadapter.data.prompts import QUESTION


class Question(NamedTuple):
    """A question about an image or a clip.

    Attributes:
      text: the question.
      answers: one of each annotator; empty where they are not public.
      kind: the category by which scores are broken down, may be "".
      id: the benchmark's identifier, may be "".
    """

    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    id: str = ""

    @property
    def answer(self) -> str:
        """The most frequent answer, the first of equally frequent ones; "" if there is none."""
        return collections.Counter(self.answers).most_common(1)[0][0] if self.answers else ""


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Visual tokens that a frozen encoder computed before training, instead of an image.

    Attributes:
      tokens: bf16[M,F,N,D]; [0] are those of the image, [1], if present, of its mirror image.
      readable: False if the image could not be decoded; the tokens then mean nothing.
    """

    tokens: np.ndarray
    readable: bool = True


class Judgment(NamedTuple):
    """How a caption agrees with what is known of an image or a clip.

    Attributes:
      facts: (right, mentioned): numbers of facts by kind, of the kinds that are mentioned.
      right: whether the caption is right by the definition of its source.
    """

    facts: Mapping[str, tuple[int, int]]
    right: bool


Media = bytes | np.ndarray | Path | Features


@dataclasses.dataclass(frozen=True)
class Example:
    """One record of any source.

    Attributes:
      id: unique in its source, for example the file name.
      media: an encoded image or clip as bytes or the path of its file, raw frames u8[F,H,W,3],
        features, or None where there is only text.
      captions, qa: independent descriptions of the media, and questions about it.
      pieces: one language-modeling document, whose pieces are tokenized separately and joined.
      judge: judges any caption of the media, where all that is to be seen is known; picklable.
    """

    id: str
    media: Media | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()
    pieces: tuple[str, ...] = ()
    judge: Callable[[str], Judgment] | None = None


class Source(Protocol):
    """A data set with random access: picklable, and cheap to construct again in a worker.

    Implementations inherit from this class for the methods with a default.
    """

    kind: str  # "image" (one frame), "clip" (several frames) or "text"
    _digest: str  # what `fingerprint` returns, of sources that do not override it

    def __len__(self) -> int:
        """Return the number of examples, at least one."""
        ...

    def __getitem__(self, index: int) -> Example:
        """Return the example at `index`, in 0..len-1; its media is not decoded yet."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the source's content; a resumed run must find the same."""
        return self._digest

    def text_only(self, index: int) -> Example:
        """Return the example without its media, which many sources need not read for it."""
        return self[index]

    def fault(self, index: int) -> str:
        """Return why the texts of an example cannot be used; "" if they can."""
        del index
        return ""

    def texts(self) -> Iterator[str]:
        """Yield all texts of the source, to train a tokenizer on."""
        for i in range(len(self)):
            example = self.text_only(i)
            yield from example.captions
            yield from example.pieces
            for question in example.qa:
                yield QUESTION.after(question.text)
                yield from question.answers
