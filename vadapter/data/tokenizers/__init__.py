"""Tokenizers, and what they share."""

import functools
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from vadapter.errors import DataError
from vadapter.io import storage


class Tokenizer(Protocol):
    """Text to token ids and back; immutable, picklable, safe to share between threads.

    `bpe.BPETokenizer` is trained on a run's own captions and answers;
    `pretrained.PretrainedTokenizer` belongs to a public language model.

    Attributes:
      bos_id, eos_id: a sequence begins with BOS and ends with EOS; the two may be one id.
      stop_ids: every id that ends a generation, EOS among them.
      vocab_size: the number of ids, special ones included; every id is below it.
    """

    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    vocab_size: int

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Return the ids of a text without special ones; a lone surrogate is read as "?".

        Args:
          text: a piece of a prompt (see `vadapter.data.prompts`), or a complete text.
          start: only special ids come before it. A SentencePiece tokenizer then adds its prefix.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids up to the first of `stop_ids`, skipping special ones.

        Raises:
          DataError: an id is not in the vocabulary.
        """
        ...

    def dump(self) -> bytes:
        """Return the tokenizer as JSON."""
        ...

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) of the saved file."""
        return hashlib.sha256(self.dump()).hexdigest()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, atomically."""
        storage.write_bytes(storage.as_path(path), self.dump())


def until_stop(ids: Iterable[int], stop_ids: Sequence[int], size: int) -> Iterator[int]:
    """Yield ids up to the first of `stop_ids`; raise DataError for one that is not in 0..size-1."""
    for i in map(int, ids):
        if i in stop_ids:
            return
        if not 0 <= i < size:
            raise DataError(
                f"token id {i} is outside the vocabulary of {size}: the ids are those of another "
                "tokenizer"
            )
        yield i


def clean(text: str) -> str:
    """Return the text with "?" for lone surrogates, which UTF-8 cannot represent."""
    return text.encode("utf-8", "replace").decode("utf-8")
