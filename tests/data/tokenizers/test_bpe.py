"""BPETokenizer: exact round trips, specials no text can produce, one file, one digest."""

import json
import pickle

import pytest

from vadapter.data.batch import BOS, EOS, PAD
from vadapter.data.tokenizers.bpe import MIN_VOCAB_SIZE, NUM_SPECIALS, BPETokenizer
from vadapter.errors import ConfigError, DataError

TEXTS = ["A dog runs on the grass .", "The dog runs .", "A man and a dog play on the beach ."] * 5

ODD = [
    "",
    " ",
    "  two  spaces\tand a tab\r\n",
    "nul \x00 inside",
    "\x1b[31mred\x07",
    "naïve café",
    "cafe\u0301 decomposed",
    "日本語のキャプション",
    "שלום a mixed \u202eline\u202c",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈",
    "\ufeffbyte order mark \ufffd",
    "<eos> <bos> <pad> </s> <s> <image> <|endoftext|> [PAD]",
    "Describe the following: :",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def tok() -> BPETokenizer:
    return BPETokenizer.train(TEXTS, 280)


@pytest.mark.parametrize("text", ODD)
def test_any_text_round_trips_and_never_yields_a_special_id(tok, text):
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    assert all(NUM_SPECIALS <= i < tok.vocab_size for i in ids)


def test_a_lone_surrogate_does_not_raise(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a?b"


def test_lower_casing_is_part_of_the_tokenizer():
    tok = BPETokenizer.train(TEXTS, 280, lowercase=True)
    assert tok.encode("A DOG") == tok.encode("a dog")
    assert tok.decode(tok.encode("A DOG")) == "a dog"


def test_decode_drops_specials_and_stops_at_eos(tok):
    ids = tok.encode(" dog")
    assert tok.decode([PAD, BOS, *ids, EOS, *ids]) == " dog"


def test_decode_refuses_ids_of_another_vocabulary(tok):
    for stranger in (tok.vocab_size, -1):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tok.decode([stranger])


def test_training_depends_on_the_texts_alone_not_on_their_order(tok):
    assert BPETokenizer.train(reversed(TEXTS), 280).digest == tok.digest
    assert BPETokenizer.train(TEXTS, 279).digest != tok.digest
    assert BPETokenizer.train(TEXTS, 280, lowercase=True).digest != tok.digest


def test_merges_shorten_the_text_and_the_vocabulary_has_its_limit(tok):
    assert len(tok.encode(" dog runs")) < 4
    assert tok.vocab_size == 280
    assert BPETokenizer.train(["ab ab"], 5000).vocab_size < MIN_VOCAB_SIZE + 5
    with pytest.raises(ConfigError, match="259"):
        BPETokenizer.train(TEXTS, MIN_VOCAB_SIZE - 1)


def test_no_text_is_an_error():
    with pytest.raises(DataError, match="all texts are empty"):
        BPETokenizer.train(["", ""], 300)


def test_save_and_load_and_pickle_keep_everything(tok, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tok.save(path)
    for again in (BPETokenizer.load(path), pickle.loads(pickle.dumps(tok))):
        assert again.digest == tok.digest
        assert again.lowercase == tok.lowercase
        assert again.encode("A dog 👍") == tok.encode("A dog 👍")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def _with(record: dict, **changes) -> str:
    return json.dumps({**record, **changes})


def test_a_foreign_or_corrupt_file_is_refused_by_name(tok, tmp_path):
    path = tmp_path / "tokenizer.json"
    tok.save(path)
    good = json.loads(path.read_text())
    added = tok._bpe.from_str(tok._bpe.to_str())
    added.add_special_tokens(["</s>"])
    damaged = {
        "not json": "{",
        "another library's file": json.dumps(good["bpe"]),
        "a later version": _with(good, version=2),
        "no model": _with(good, bpe={}),
        "odd option": _with(good, lowercase="yes"),
        "added tokens": _with(good, bpe=json.loads(added.to_str())),
    }
    for text in damaged.values():
        path.write_text(text)
        with pytest.raises(DataError, match=r"tokenizer\.json"):
            BPETokenizer.load(path)
    with pytest.raises(DataError, match="No tokenizer at"):
        BPETokenizer.load(tmp_path / "none.json")
