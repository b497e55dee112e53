"""What a data set yields, and what the input pipeline asks of one.

Dimension legend: F frames, H height, W width.
"""

import dataclasses
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclasses.dataclass(frozen=True)
class Example:
    """One record of any source.

    Attributes:
      id: unique in its source, for example the file name.
      media: an encoded image as bytes, raw frames u8[F,H,W,3], the path of a clip or an image, or
        None where there is only text.
      captions: independent descriptions of the media.
      qa: (question, answer, question kind) triples about the media; the kind may be "".
      pieces: one language-modelling document, as the pieces that are tokenised separately and
        concatenated.
    """

    id: str
    media: bytes | np.ndarray | Path | None = None
    captions: tuple[str, ...] = ()
    qa: tuple[tuple[str, str, str], ...] = ()
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
