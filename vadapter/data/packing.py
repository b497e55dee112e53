"""Windows of documents, which `transforms.document_sample` packs into rows."""

import hashlib

import numpy as np

from vadapter.data.example import Example, Source
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError, DataError


class Windows:
    """The documents of a source in groups of `size`; item r is a tuple of documents.

    Of R windows, window r holds documents r, r + R, r + 2R, … It is therefore a function of r
    alone, each document is in exactly one window (except the few that do not fill another), and
    neighbors in the files, which describe the same photo, end up far apart.
    """

    def __init__(self, source: Source, size: int):
        if size < 1:
            raise ConfigError(f"a window needs at least one document, got size={size}")
        self.source, self.size = source, size

    @classmethod
    def to_fill(
        cls, source: Source, tokenizer: Tokenizer, text_len: int, *, sample: int = 256
    ) -> "Windows":
        """Return windows of one document more than hold 1.4 x `text_len` tokens on average.

        Smaller windows leave gaps in the rows; larger ones tokenize documents for nothing. With
        captions, rows of 128 tokens become 88 % full, of 256 92 %, of 512 97 %. The mean length is
        that of `sample` evenly spaced documents, so it depends on the arguments alone.
        """
        if not len(source):
            raise DataError("0 usable examples: the source of documents is empty")
        indices = np.linspace(0, len(source) - 1, min(sample, len(source))).astype(int)
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

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the documents' fingerprint and the size of a window."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.size}".encode()).hexdigest()
