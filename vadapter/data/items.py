"""What is read one by one: examples, questions about them, or windows of documents."""

from typing import Any

import numpy as np

from vadapter.data.example import Example, Question, Source
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError, DataError


class Questions:
    """The first `limit` (example, question) pairs of a source; 0: all."""

    def __init__(self, source: Source, limit: int = 0):
        self._source = source
        self._pairs: list[tuple[int, int]] = []
        for i in range(len(source)):
            if limit and len(self._pairs) >= limit:
                break
            self._pairs += [(i, j) for j in range(len(source.text_only(i).qa))]
        self._pairs = self._pairs[: limit or None]

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Example, Question]:
        i, j = self._pairs[index]
        example = self._source[i]
        return example, example.qa[j]

    def text_only(self, index: int) -> tuple[Example, Question]:
        """Return the pair without the media of its example."""
        i, j = self._pairs[index]
        example = self._source.text_only(i)
        return example, example.qa[j]


class Slice:
    """The items `start` to `stop` of a source; `stop` may exceed its length."""

    def __init__(self, source: Source, start: int, stop: int):
        self._source, self._start = source, start
        self._length = max(min(stop, len(source)) - start, 0)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return self._source[self._start + index]

    def text_only(self, index: int) -> Any:
        """Return the item without its media."""
        return self._source.text_only(self._start + index)


def items_of(source: Source, task: str, limit: int = 0) -> Any:
    """Return what is predicted one by one, the first `limit` of them; 0: all.

    These are (example, question) pairs if the task is "question", and examples if it is "caption".
    """
    if task == "question":
        return Questions(source, limit)
    return Slice(source, 0, limit) if limit else source


class Windows:
    """The documents of a source in groups of `size`, which `transforms.document_sample` packs.

    Of R windows, window r holds documents r, r + R, r + 2R, … It is therefore a function of r
    alone, each document is in exactly one window (except the few that do not fill another), and
    neighbors in the files, which describe the same photo, end up far apart.
    """

    def __init__(self, source: Source, size: int):
        if size < 1:
            raise ConfigError(f"a window needs at least one document, got size={size}")
        self.source, self.size = source, size

    @classmethod
    def to_fill(cls, source: Source, tokenizer: Tokenizer, text_len: int) -> "Windows":
        """Return windows of one document more than hold 1.4 x `text_len` tokens on average.

        Smaller windows leave gaps in the rows; larger ones tokenize documents for nothing. With
        captions, rows of 128 tokens become 88 % full, of 256 92 %, of 512 97 %. The mean length is
        that of 256 evenly spaced documents, so it depends on the arguments alone.
        """
        if not len(source):
            raise DataError("0 usable examples: the source of documents is empty")
        indices = np.linspace(0, len(source) - 1, min(256, len(source))).astype(int)
        lengths = [
            1 + sum(len(tokenizer.encode(piece)) for piece in source[int(i)].pieces)
            for i in indices
        ]
        size = 1 + round(1.4 * text_len / np.mean(np.minimum(lengths, text_len)))
        return cls(source, min(size, len(source)))

    def __len__(self) -> int:
        return len(self.source) // self.size

    def __getitem__(self, index: int) -> tuple[Example, ...]:
        return tuple(self.source[index + i * len(self)] for i in range(self.size))
