"""A byte-level BPE tokenizer in one JSON file, whose special ids no text can produce.

The library's ids are shifted by three: 0, 1 and 2 are reserved, and text such as "</s>" or "<eos>"
is encoded as its characters. All 256 bytes are in the vocabulary, so nothing is unknown and
`decode(encode(text)) == text` for any text that UTF-8 can represent (except for lower-casing).

Source: byte-level BPE of GPT-2 (Radford et al., 2019), as in the `tokenizers` library.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence

import tokenizers

from vadapter.data.batch import BOS, EOS
from vadapter.data.tokenizers import Tokenizer, clean, until_stop
from vadapter.data.tokenizers.files import read_json
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

NUM_SPECIALS = 3  # PAD, BOS and EOS
MIN_VOCAB_SIZE = NUM_SPECIALS + 256

# Training time is quadratic in the length of a word: 46 seconds for 200,000 letters.
_LONG = re.compile(r"\S{100}(?=\S)")
_HEADER = {"format": "vadapter-tokenizer", "version": 1, "specials": NUM_SPECIALS}


class BPETokenizer(Tokenizer):
    """A tokenizer trained on a run's own texts, which it lower-cases if `lowercase`."""

    bos_id, eos_id = BOS, EOS
    stop_ids = (EOS,)

    def __init__(self, bpe: tokenizers.Tokenizer, *, lowercase: bool):
        self._bpe = bpe
        self.lowercase = lowercase

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, lowercase: bool = False
    ) -> "BPETokenizer":
        """Return a tokenizer trained on texts, in any order.

        Words of more than 100 characters are split. Small texts may give fewer than `vocab_size`
        ids, special ones included.

        Raises:
          ConfigError: `vocab_size` is too small for the special ids and the 256 bytes.
          DataError: there is no text.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small: special ids and bytes alone need "
                f"{MIN_VOCAB_SIZE}"
            )
        cleaned = [_LONG.sub(r"\g<0> ", _clean(text, lowercase)) for text in texts if text]
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

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        """Return the ids of a text; `start` has no effect."""
        del start
        ids = self._bpe.encode(_clean(text, self.lowercase), add_special_tokens=False).ids
        return [i + NUM_SPECIALS for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` up to the first EOS, without PAD and BOS."""
        bounded = until_stop(ids, self.stop_ids, self.vocab_size)
        plain = [i - NUM_SPECIALS for i in bounded if i >= NUM_SPECIALS]
        return self._bpe.decode(plain, skip_special_tokens=False)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BPETokenizer":
        """Read the file that `save` wrote; raise DataError if there is none, or another file."""
        path = storage.as_path(path)
        if not (record := read_json(path)):
            raise DataError(f"No tokenizer at {path}: train one, or correct the path.")
        if any(record.get(k) != v for k, v in _HEADER.items()):
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

    def dump(self) -> bytes:
        """Return the tokenizer as JSON."""
        record = {**_HEADER, "lowercase": self.lowercase, "bpe": json.loads(self._bpe.to_str())}
        return json.dumps(record, ensure_ascii=True, sort_keys=True, separators=(",", ":")).encode()


def _clean(text: str, lowercase: bool) -> str:
    return clean(text).lower() if lowercase else clean(text)
