"""A byte-level BPE tokenizer in one JSON file, whose special ids no text can produce.

The library's ids are shifted by three: 0, 1 and 2 are reserved, and text such as "</s>" or "<eos>"
is encoded as its characters. All 256 bytes are in the vocabulary, so nothing is unknown and
`decode(encode(text)) == text` for any text that UTF-8 can represent (except for lower-casing).

Source: byte-level BPE of GPT-2 (Radford et al., 2019), as in the `tokenizers` library.
"""

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence

import tokenizers

from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

PAD, BOS, EOS = 0, 1, 2
NUM_SPECIALS = 3
MIN_VOCAB_SIZE = NUM_SPECIALS + 256

# Training time is quadratic in the length of a word: 46 seconds for 200,000 letters.
_LONG = re.compile(r"\S{100}(?=\S)")
_HEADER = {"format": "vadapter-tokenizer", "version": 1, "specials": NUM_SPECIALS}


class BPETokenizer(Tokenizer):
    """A tokenizer trained on a run's own texts.

    Attributes:
      lowercase: whether text is lower-cased before it is encoded.
    """

    bos_id, eos_id = BOS, EOS
    stop_ids = (EOS,)

    def __init__(self, bpe: tokenizers.Tokenizer, *, lowercase: bool):
        self._bpe = bpe
        self.lowercase = lowercase

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, lowercase: bool = False
    ) -> "BPETokenizer":
        """Return a tokenizer trained on texts; their order does not matter.

        Args:
          texts: the training text; words of more than 100 characters are split.
          vocab_size: the most ids, special ones included. A small text may have fewer merges; see
            `vocab_size` of the result.
          lowercase: encode lower-cased text.

        Raises:
          ConfigError: `vocab_size` is too small for the special ids and the 256 bytes.
          DataError: there is no text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small: special ids and bytes alone need "
                f"{MIN_VOCAB_SIZE}"
            )
        cleaned = [_LONG.sub(r"\g<0> ", t) for t in (_clean(t, lowercase) for t in texts) if t]
        if not cleaned:
            raise DataError("no text to train a tokenizer on: all texts are empty")
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - NUM_SPECIALS,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(cleaned, trainer)
        return cls(bpe, lowercase=lowercase)

    @property
    def vocab_size(self) -> int:
        """The number of ids, special ones included."""
        return self._bpe.get_vocab_size() + NUM_SPECIALS

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 (hex) of the saved file."""
        return hashlib.sha256(self._dump()).hexdigest()

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Return the ids of a text; a lone surrogate is read as "?" and `start` has no effect."""
        del start
        ids = self._bpe.encode(_clean(text, self.lowercase), add_special_tokens=False).ids
        return [i + NUM_SPECIALS for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` up to the first EOS, without PAD and BOS.

        Raises:
          DataError: an id is not in the vocabulary; the library would drop it silently.
        """
        plain = []
        for i in map(int, ids):
            if i == EOS:
                break
            if not 0 <= i < self.vocab_size:
                raise DataError(
                    f"token id {i} is outside the vocabulary of {self.vocab_size}: the ids are "
                    "those of another tokenizer"
                )
            if i >= NUM_SPECIALS:
                plain.append(i - NUM_SPECIALS)
        return self._bpe.decode(plain, skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file, atomically."""
        storage.write_bytes(storage.as_path(path), self._dump())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BPETokenizer":
        """Read the file that `save` wrote.

        Raises:
          DataError: no such file, or not a tokenizer in this format.
        """
        path = storage.as_path(path)
        try:
            record = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise DataError(f"No tokenizer at {path}: train one, or correct the path.") from None
        except (OSError, ValueError) as error:
            raise DataError(f"Cannot read the tokenizer {path}: {error}.") from None
        if not isinstance(record, dict) or any(record.get(k) != v for k, v in _HEADER.items()):
            raise DataError(
                f"{path} is not a vadapter tokenizer: its header must contain {_HEADER}. Train one "
                "with BPETokenizer.train and save it"
            )
        try:
            bpe = tokenizers.Tokenizer.from_str(json.dumps(record["bpe"]))
            lowercase = record["lowercase"]
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {path} is corrupt: {error}. Save it again") from None
        if not isinstance(lowercase, bool) or bpe.get_added_tokens_decoder():
            raise DataError(
                f"tokenizer {path} is corrupt: 'lowercase' must be true or false, and added "
                "tokens, which text could produce, are not allowed. Save it again"
            )
        return cls(bpe, lowercase=lowercase)

    def _dump(self) -> bytes:
        record = {**_HEADER, "lowercase": self.lowercase, "bpe": json.loads(self._bpe.to_str())}
        return json.dumps(record, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()


def _clean(text: str, lowercase: bool) -> str:
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.lower() if lowercase else text
