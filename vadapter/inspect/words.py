"""Whole words of a tokenizer, and which of them occur in an image's captions.

A soft token is a vector among the embeddings of the words that the language model reads. The
nearest of them can be compared with the captions only if it is a word, and not a piece of one.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import DataError

_INSIDE = "'’-"  # what a word may have between letters
# Scripts that write no spaces: a word occurs in a text if its characters do.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")


class Words(NamedTuple):
    """The whole words among a tokenizer's tokens."""

    ids: np.ndarray  # i32[W], ascending
    texts: tuple[str, ...]  # of each id, without spaces
    rule: str  # how they were chosen


def whole_words(tokenizer: Tokenizer, texts: Iterable[str] = ()) -> Words:
    """Return the tokens of a tokenizer that are words.

    With texts, those that encode a word of the texts alone, after a space: for a run's own small
    vocabulary, half of which are pieces such as " squ", of the words that it was trained on.
    Without texts nothing tells " squ" from " square". Then they are the tokens of letters (with
    apostrophes and hyphens inside) after a space, or after the mark that replaces it; all tokens
    of letters where hardly any token has such a mark, as in vocabularies of characters. A single
    letter of an alphabet with two cases is no word then.

    Raises:
      DataError: there is none.
    """
    counted = {word for text in texts for word in words_of(text)}
    if counted:
        found = _of_texts(tokenizer, counted)
        rule = "tokens that are a whole word of the texts that the tokenizer was trained on"
    else:
        found, rule = _of_vocabulary(tokenizer)
    if not found:
        raise DataError(
            "no token of this tokenizer is a whole word, so that soft tokens have no nearest word"
        )
    ids = sorted(found)
    return Words(np.array(ids, np.int32), tuple(found[i] for i in ids), rule)


def _of_texts(tokenizer: Tokenizer, words: Iterable[str]) -> dict[int, str]:
    found = {}
    for word in sorted(words):
        ids = [i for i in tokenizer.encode(f" {word}") if tokenizer.decode([i]).strip()]
        if len(ids) == 1:
            found[ids[0]] = tokenizer.decode(ids).strip()
    return found


def _of_vocabulary(tokenizer: Tokenizer) -> tuple[dict[int, str], str]:
    special = {tokenizer.bos_id, tokenizer.eos_id, *tokenizer.stop_ids}
    ids = [i for i in range(tokenizer.vocab_size) if i not in special]
    decoded = {i: text for i in ids if (text := tokenizer.decode([i]))}
    letters = {i: text for i, text in decoded.items() if _is_word(text.strip())}
    spaced = {i: text for i, text in letters.items() if text[0].isspace()}
    chosen, rule = spaced, "tokens of letters after a space"
    if len(spaced) < len(letters) / 20:
        chosen, rule = letters, "tokens of letters (the vocabulary has no marks of spaces)"
    words = {i: text.strip() for i, text in chosen.items()}
    return {i: word for i, word in words.items() if len(word) > 1 or not _cased(word)}, rule


def _cased(letter: str) -> bool:
    return letter.lower() != letter.upper()


def words_of(text: str) -> list[str]:
    """Return the words of a text, case folded, in order."""
    folded = _fold(text)
    spaced = "".join(c if _is_letter(c) or c in _INSIDE else " " for c in folded)
    return [word for part in spaced.split() if (word := part.strip(_INSIDE))]


def _fold(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


@functools.cache
def _is_letter(character: str) -> bool:
    """Return whether it is a letter or one of its marks, such as the vowel signs of Hindi."""
    return unicodedata.category(character)[0] in "LM"


def _is_word(text: str) -> bool:
    return words_of(text) == [_fold(text)]


class Vocabulary:
    """The words of some captions, to look others up in."""

    def __init__(self, captions: Sequence[str]):
        self._words = {word for caption in captions for word in words_of(caption)}
        self._text = _fold("\n".join(captions))

    def __contains__(self, word: object) -> bool:
        folded = _fold(str(word))
        return folded in self._words or (bool(_UNSPACED.search(folded)) and folded in self._text)

    def __len__(self) -> int:
        return len(self._words)

    def share(self, words: Sequence[str]) -> float:
        """Return the share of words that occur in the captions."""
        return sum(word in self for word in words) / len(words)
