"""A data set whose images are blank, for a blind control: a model with nothing to see."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vadapter.data.example import Example, Source

GRAY = 127  # level of all three channels, 0..255; about zero after normalization


class BlankSource(Source):
    """The examples of a source with uniform mid-gray, u8[1,1,1,3], in place of images and clips.

    They have the ids and texts of the source, and its fingerprint, so that scores of a model and of
    its blind control are compared example by example.
    """

    _digest = ""  # has its own `fingerprint`

    def __init__(self, source: Source):
        self._source, self.kind = source, source.kind

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        blank = np.full((1, 1, 1, 3), GRAY, np.uint8)
        return dataclasses.replace(self._source.text_only(index), media=blank)

    def text_only(self, index: int) -> Example:
        """Return the example without an image."""
        return self._source.text_only(index)

    def fault(self, index: int) -> str:
        """Return why the texts of an example cannot be used; "" if they can."""
        return self._source.fault(index)

    def texts(self) -> Iterator[str]:
        """Yield all texts of the source."""
        return self._source.texts()

    def fingerprint(self) -> str:
        """Return the fingerprint of the source with its images."""
        return self._source.fingerprint()
