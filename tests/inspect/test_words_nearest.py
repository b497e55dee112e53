"""Whole words of tokenizers, and whether a word occurs in captions."""

import itertools

import pytest

from vadapter.data.tokenizers import Tokenizer
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.errors import DataError
from vadapter.inspect.words import Vocabulary, whole_words, words_of

TEXTS = ["a square is red", "the square is in a circle", "squirrels circle a square", "a cat's toy"]


class Listed(Tokenizer):
    """A vocabulary of given pieces, encoded greedily from the left; ids 0 and 1 are special."""

    bos_id, eos_id, stop_ids = 0, 1, (1,)

    def __init__(self, *pieces: str):
        self.pieces = ("", "", *pieces)
        self.vocab_size = len(self.pieces)

    def encode(self, text, *, start=False):
        ids = []
        while text:
            fits = [i for i, piece in enumerate(self.pieces) if piece and text.startswith(piece)]
            best = max(fits, key=lambda i: len(self.pieces[i]), default=None)
            ids += [] if best is None else [best]
            text = text[1 if best is None else len(self.pieces[best]) :]
        return ids

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def test_of_a_vocabulary_with_texts_a_piece_of_a_word_is_no_word():
    tokenizer = BPETokenizer.train(TEXTS * 20, 320)
    pieces = {tokenizer.decode([i]) for i in range(tokenizer.vocab_size)}
    words = whole_words(tokenizer, TEXTS)
    assert {" squ", " square", " circle"} <= pieces  # " squ" is a token, but never a whole word
    assert {"square", "circle", "a"} <= set(words.texts)
    assert "squ" not in words.texts
    assert set(words.texts) <= {word for text in TEXTS for word in words_of(text)}
    for i, word in zip(words.ids, words.texts, strict=True):
        assert [t for t in tokenizer.encode(f" {word}") if tokenizer.decode([t]) != " "] == [i]


def test_without_texts_words_are_the_tokens_of_letters_after_a_space():
    words = whole_words(
        Listed(" red", " Red", "red", " s", " 12", ".", " it's", " co-", " 木", " ой")
    )
    assert words.texts == ("red", "Red", "it's", "木", "ой")
    assert "space" in words.rule


def test_a_vocabulary_without_marks_of_spaces_has_words_without_them():
    letters = [chr(ord("a") + i) for i in range(26)]
    pairs = ["".join(pair) for pair in itertools.product("aeiou", "nrst")]
    words = whole_words(Listed(*letters, *pairs, "赤", "丸", " x1"))
    assert set(words.texts) == {*pairs, "赤", "丸"}
    assert "no marks" in words.rule


def test_a_vocabulary_without_words_is_refused():
    with pytest.raises(DataError, match="no token of this tokenizer is a whole word"):
        whole_words(Listed("1", ".", " s", "  "))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A man's T-shirt, 2 red-ish balls!", ["a", "man's", "t-shirt", "red-ish", "balls"]),
        ("हिन्दी में लाल", ["हिन्दी", "में", "लाल"]),
        ("كرة حمراء", ["كرة", "حمراء"]),
        ("CAFE\u0301 'quoted' -dash-", ["café", "quoted", "dash"]),
        ("<b>& 12", ["b"]),
        ("", []),
    ],
)
def test_words_of_a_text_are_its_letters_with_their_marks(text, expected):
    assert words_of(text) == expected


def test_a_word_occurs_whatever_its_case_and_between_other_characters_where_no_spaces_are():
    known = Vocabulary(["A Red circle.", "赤い丸があります", "كرة حمراء"])
    assert all(word in known for word in ("red", "RED", "Circle", "丸", "حمراء"))
    assert all(word not in known for word in ("re", "circ", "blue", "حمر", "青"))
    assert known.share(["red", "blue", "a", "cir"]) == 0.5
