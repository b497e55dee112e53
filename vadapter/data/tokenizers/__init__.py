"""Tokenizers, and the interface they share."""

import os
from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back; immutable, picklable, safe to share between threads.

    Implementations inherit from this class:
    `bpe.BPETokenizer` is trained on a run's own captions and answers;
    `pretrained.PretrainedTokenizer` belongs to a public language model.

    Attributes:
      bos_id, eos_id: a sequence begins with BOS and ends with EOS; the two may be one id.
      stop_ids: every id that ends a generation, EOS among them.
      vocab_size: the number of ids, special ones included; every id is below it.
      digest: SHA-256 (hex) of the saved file.
    """

    bos_id: int
    eos_id: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    digest: str

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Return the ids of a text without special ones.

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, atomically."""
        ...
