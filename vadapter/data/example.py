"""What every data set yields, and what the input pipeline asks of one.

Dimension legend: F frames, H height, W width.
"""

import collections
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np


class Question(NamedTuple):
    """A question about an image or a clip.

    Attributes:
      text: the question.
      answers: of the annotators, one each; none where they are not public.
      kind: for the breakdown of scores, may be "".
      id: of the benchmark, may be "".
    """

    text: str
    answers: tuple[str, ...] = ()
    kind: str = ""
    id: str = ""

    @property
    def answer(self) -> str:
        """What most annotators say, the first of them where several say as often; "" if none."""
        return collections.Counter(self.answers).most_common(1)[0][0] if self.answers else ""


@dataclasses.dataclass(frozen=True)
class Example:
    """One record of any source.

    Attributes:
      id: unique in its source, for example the file name.
      media: an encoded image or clip as bytes, raw frames u8[F,H,W,3], the path of a clip or an
        image, or None where there is only text.
      captions: independent descriptions of the media.
      qa: questions about the media.
      pieces: one language-modeling document, as the pieces that are tokenized separately and
        concatenated.
    """

    id: str
    media: bytes | np.ndarray | Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[Question, ...] = ()
    pieces: tuple[str, ...] = ()


class Source(Protocol):
    """A data set with random access: picklable, and cheap to construct again in a worker.

    Attributes:
      kind: "image" (one frame), "clip" (several frames) or "text".
    """

    kind: str

    def __len__(self) -> int:
        """The number of examples, at least one."""
        ...

    def __getitem__(self, index: int) -> Example:
        """The example at `index`, in 0..len-1; its media is not decoded yet."""
        ...

    def fingerprint(self) -> str:
        """A sha256 in hex of what the source yields, so that a resumed run can compare."""
        ...


def words_of(source: Any, index: int) -> Example:
    """The example, without its media where the source can leave them out: its `words` method."""
    return source.words(index) if hasattr(source, "words") else source[index]
