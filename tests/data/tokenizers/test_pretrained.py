"""Tokenizers of public models: the library's own ids on odd text, and no special from any text."""

import itertools
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support.odd_text import ODD, SPECIALS
from support.public_tokenizers import (
    BYTES,
    MADE_BY_TEXT,
    STYLES,
    TEXTS,
    gemma,
    gpt2,
    llama2,
    special,
    unigram,
    write,
)
from tokenizers import models, pre_tokenizers

from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.tokenizers.pretrained import PretrainedTokenizer, load_tokenizer
from vadapter.errors import CheckpointError, DataError


@pytest.fixture(scope="module", params=STYLES)
def folder(request, tmp_path_factory) -> Path:
    return STYLES[request.param](tmp_path_factory.mktemp("models") / request.param)


@pytest.fixture(scope="module")
def tok(folder) -> PretrainedTokenizer:
    return PretrainedTokenizer.load(folder)


def controls(folder: Path) -> set[int]:
    if not (folder / "tokenizer.json").exists():
        return {json.loads((folder / "config.json").read_text())["eos_token_id"]}
    spec = json.loads((folder / "tokenizer.json").read_text())
    return {token["id"] for token in spec["added_tokens"] if token["special"]}


@pytest.mark.parametrize("text", [*ODD, *SPECIALS])
def test_no_text_encodes_to_a_special_token_and_every_text_round_trips(tok, folder, text):
    for start in (False, True):
        ids = tok.encode(text, start=start)
        assert controls(folder).isdisjoint(ids)
        assert all(0 <= i < tok.vocab_size for i in ids)
    readable = text.replace("▁", " ") if folder.name in ("llama2", "gemma", "unigram") else text
    if "<0x" not in text or folder.name != "unigram":  # the library reads those as the bytes
        assert tok.decode(tok.encode(text)) == readable


@pytest.mark.parametrize("text", [*ODD, *SPECIALS])
def test_ids_are_those_of_the_library_with_specials_read_as_text(tok, folder, text):
    if folder.name == "gpt2":
        whole = tokenizers.Tokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
        whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole.encode_special_tokens = True
    whole.no_truncation()
    want = whole.encode(text, add_special_tokens=False).ids
    if folder.name in MADE_BY_TEXT and not controls(folder).isdisjoint(want):
        return
    assert tok.encode(text, start=True) == want


def test_a_lone_surrogate_does_not_raise(tok):
    assert tok.decode(tok.encode("a\ud800b")) == "a?b"


def test_pieces_of_a_layout_join_to_the_whole_text(tok):
    pieces = ["A dog", " runs", " on the grass", " ."]
    joined = tok.encode(pieces[0], start=True) + [i for p in pieces[1:] for i in tok.encode(p)]
    assert tok.decode(joined).strip() == "".join(pieces)
    whole = tok.encode("".join(pieces), start=True)
    assert len(joined) <= len(whole) + 3  # without merges across pieces, and without more spaces


def test_sentence_piece_models_get_their_prefix_only_at_the_start(tmp_path):
    for make in (llama2, unigram):
        tok = PretrainedTokenizer.load(make(tmp_path / make.__name__))
        assert tok.encode("dog", start=True) == tok.encode(" dog")
        assert tok.encode("dog") != tok.encode(" dog")
        assert tok.decode(tok.encode("dog", start=True)) == " dog"
    tok = PretrainedTokenizer.load(gemma(tmp_path / "gemma"))
    assert tok.encode("dog", start=True) == tok.encode("dog")


# style: (BOS, EOS, PAD, ids that end a text), by name in the tokenizer's files
ENDS = {
    "neox": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", 1),
    "gpt2": ("<|endoftext|>", "<|endoftext|>", "<|endoftext|>", 1),
    "llama3": ("<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>", 2),
    "llama2": ("<s>", "</s>", "</s>", 1),
    "gemma": ("<bos>", "<eos>", "<pad>", 1),
    "unigram": ("<s>", "</s>", "</s>", 1),
}


def test_special_ids_are_those_that_the_files_name(tok, folder):
    if folder.name == "gpt2":
        ids = json.loads((folder / "vocab.json").read_text())
    else:
        spec = json.loads((folder / "tokenizer.json").read_text())
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
    bos, eos, pad, stops = ENDS[folder.name]
    assert (tok.bos_id, tok.eos_id, tok.pad_id) == (ids[bos], ids[eos], ids[pad])
    assert tok.stop_ids[0] == tok.eos_id
    assert len(tok.stop_ids) == stops


def test_decode_drops_specials_and_padding_rows_and_stops_at_any_end(tok):
    ids = tok.encode(" dog")
    for end in tok.stop_ids:
        assert tok.decode([*ids, end, *ids]) == " dog"
    if tok.bos_id not in tok.stop_ids:
        assert tok.decode([tok.bos_id, *ids]) == " dog"
    assert tok.decode([*ids, *range(tok.vocab_size, tok.rows)]) == " dog"
    for stranger in (tok.rows, -1):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tok.decode([stranger])


def test_id_zero_is_text_if_the_tokenizer_defines_it(tmp_path):
    tok = PretrainedTokenizer.load(gpt2(tmp_path / "gpt2"))
    assert tok.encode("!") == [0]
    assert tok.decode([0, 0]) == "!!"


def test_save_and_load_and_pickle_keep_everything(tok, tmp_path):
    path = tmp_path / "deep" / "tokenizer.json"
    tok.save(path)
    for again in (PretrainedTokenizer.load(path), pickle.loads(pickle.dumps(tok))):
        assert again.digest == tok.digest
        for key in ("bos_id", "eos_id", "pad_id", "stop_ids", "vocab_size", "rows"):
            assert getattr(again, key) == getattr(tok, key)
        for text in (*ODD, *SPECIALS):
            for start in (False, True):
                assert again.encode(text, start=start) == tok.encode(text, start=start)
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]


def test_either_kind_of_tokenizer_is_read_from_the_file_it_saved(tok, tmp_path):
    trained = BPETokenizer.train(TEXTS, 280)
    for tokenizer in (tok, trained):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path / "tokenizer.json")
        assert (type(again), again.digest) == (type(tokenizer), tokenizer.digest)
    with pytest.raises(DataError, match="No tokenizer at"):
        load_tokenizer(tmp_path / "none.json")


def test_the_digest_depends_on_vocabulary_and_specials(tmp_path):
    one, two = (PretrainedTokenizer.load(llama2(tmp_path / name)) for name in ("a", "b"))
    assert one.digest == two.digest
    write(tmp_path / "b", special_tokens_map={"bos_token": "<s>", "eos_token": "<s>"})
    assert PretrainedTokenizer.load(tmp_path / "b").digest != one.digest


def test_the_model_may_have_more_rows_than_ids_and_never_fewer(tok, folder, tmp_path):
    wide = PretrainedTokenizer.load(folder, rows=tok.vocab_size + 100)
    assert (wide.vocab_size, wide.rows) == (
        tok.vocab_size if folder.name != "gemma" else tok.vocab_size + 1,
        tok.vocab_size + 100,
    )
    with pytest.raises(CheckpointError, match=r"only 200 rows .*different models"):
        PretrainedTokenizer.load(folder, rows=200)
    tok.save(tmp_path / "saved.json")
    with pytest.raises(CheckpointError, match="different models"):
        PretrainedTokenizer.load(tmp_path / "saved.json", rows=200)


def test_a_special_token_without_a_row_is_allowed(tmp_path):
    tok = PretrainedTokenizer.load(gemma(tmp_path / "gemma"))
    spec = json.loads((tmp_path / "gemma" / "tokenizer.json").read_text())
    assert tok.rows == tok.vocab_size == spec["added_tokens"][-1]["id"]


def test_the_files_are_tried_in_their_order(tmp_path):
    folder = llama2(tmp_path / "m")
    eos = lambda: PretrainedTokenizer.load(folder).eos_id  # noqa: E731
    write(folder, special_tokens_map={}, config={"bos_token_id": 1, "eos_token_id": 5})
    assert eos() == 5
    write(folder, generation_config={"eos_token_id": [6, 7]})
    assert eos() == 6
    write(folder, special_tokens_map={"eos_token": "<s>"})
    assert eos() == 1
    write(folder, tokenizer_config={"eos_token": "</s>"})
    assert eos() == 2
    assert PretrainedTokenizer.load(folder).stop_ids == (2, 6, 7)


def test_without_an_end_or_with_an_unknown_one_it_is_refused(tmp_path):
    folder = llama2(tmp_path / "m")
    write(folder, special_tokens_map={"bos_token": "<s>"})
    with pytest.raises(DataError, match=r"No end token .*never stops"):
        PretrainedTokenizer.load(folder)
    write(folder, tokenizer_config={"eos_token": "<|im_end|>"})
    with pytest.raises(
        DataError, match=r"tokenizer_config\.json names '<\|im_end\|>' as eos_token"
    ):
        PretrainedTokenizer.load(folder)


def test_unknown_text_never_becomes_the_end_token(tmp_path):
    """OPT and others name one token for "unknown" and for the end of a text."""
    model = {
        "type": "BPE",
        "vocab": {"<end>": 0, "a": 1, "b": 2},
        "merges": [],
        "unk_token": "<end>",
    }
    spec = {"version": "1.0", "added_tokens": [special(0, "<end>")], "model": model}
    spec |= dict.fromkeys(("normalizer", "pre_tokenizer", "decoder"))
    tok = PretrainedTokenizer.load(
        write(tmp_path / "m", spec, tokenizer_config={"eos_token": "<end>"})
    )
    assert tok.encode("azb<end>") == [1, 2]


def _spoiled(folder: Path) -> dict[str, str]:
    good = json.loads((folder / "tokenizer.json").read_text())
    model = good["model"]
    change = lambda **kwargs: json.dumps({**good, "model": {**model, **kwargs}})  # noqa: E731
    return {
        "not json": "{",
        "a list": "[]",
        "no model": json.dumps({**good, "model": None}),
        "another kind": change(type="WordPiece"),
        "vocabulary of another form": change(vocab=[["a", 0.0]]),
        "an id that is no number": change(vocab={**model["vocab"], "dog": "x"}),
        "a merge of nothing": change(merges=[["zq", "qz"]]),
        "half a merge": change(merges=["zq"]),
        "an unknown normalizer": json.dumps({**good, "normalizer": {"type": "Nmt2"}}),
        "an added token without its id": json.dumps({**good, "added_tokens": [{"content": "a"}]}),
    }


def test_a_corrupt_or_foreign_file_is_refused_by_name(tmp_path):
    folder = llama2(tmp_path / "m")
    for name, text in _spoiled(folder).items():
        (folder / "tokenizer.json").write_text(text)
        with pytest.raises(DataError, match=str(folder)):
            pytest.fail(f"{name}: {PretrainedTokenizer.load(folder)}")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"No tokenizer in .*contains config\.json, spec.*expected"):
        PretrainedTokenizer.load(folder)
    with pytest.raises(DataError, match="No tokenizer of a public model"):
        PretrainedTokenizer.load(folder / "none.json")
    with pytest.raises(DataError, match="No tokenizer of a public model"):
        PretrainedTokenizer.load(folder / "config.json")


def test_merges_of_another_class_than_gpt2_are_refused(tmp_path):
    folder = gpt2(tmp_path / "m")
    write(folder, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(DataError, match=r"Qwen2Tokenizer, .*tokenizer\.json"):
        PretrainedTokenizer.load(folder)


# -- llama2.c ----------------------------------------------------------------------------------


def llama2c(folder: Path, pieces: list[tuple[str, float]]) -> Path:
    first = ["<unk>", "\n<s>\n", "\n</s>\n", *BYTES]
    rows = [(piece.encode(), score) for piece, score in [*((p, 0.0) for p in first), *pieces]]
    body = b"".join(struct.pack("<fi", score, len(piece)) + piece for piece, score in rows)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.bin").write_bytes(struct.pack("<i", 9) + body)
    return folder


def joined(text: str, vocab: dict[str, int], scores: list[float]) -> list[int]:
    """encode() of llama2.c's run.c: join the best pair, the leftmost of equals, until none is."""
    pieces = list(vocab)
    ids = [vocab[" "]] if text else []
    for char in text:
        ids += [vocab[char]] if char in vocab else [byte + 3 for byte in char.encode()]
    while True:
        pairs = [
            (scores[vocab[pieces[a] + pieces[b]]], -at)
            for at, (a, b) in enumerate(itertools.pairwise(ids))
            if pieces[a] + pieces[b] in vocab
        ]
        if not pairs:
            return ids
        at = -max(pairs)[1]
        ids[at : at + 2] = [vocab[pieces[ids[at]] + pieces[ids[at + 1]]]]


def fuzz(tok: PretrainedTokenizer, vocab: dict[str, int], scores: list[float], count: int) -> None:
    rng = np.random.default_rng(0)
    parts = [*list(vocab)[259:], "é", "日", "\n", "</s>", "\n<s>\n", "<0x41>", "▁", "👍"]
    texts = ["".join(rng.choice(parts, rng.integers(0, 25))) for _ in range(count)]
    for text in (*ODD, *SPECIALS, *texts):
        ids = tok.encode(text, start=True)
        assert ids == joined(text, vocab, scores), text
        assert min(ids, default=3) >= 3
        assert tok.decode(tok.encode(text)) == text


def test_llama2c_joins_as_its_source_does(tmp_path):
    pieces = [(" t", 0.0), ("he", -1.0), (" the", -2.0), ("  ", -3.0), ("    ", -4.0), ("at", -5.0)]
    pieces += [(c, -10.0 - i) for i, c in enumerate(" theab.")]
    tok = PretrainedTokenizer.load(llama2c(tmp_path / "m", pieces))
    assert (tok.bos_id, tok.eos_id, tok.vocab_size, tok.rows) == (1, 2, 272, 272)
    vocab = ["<unk>", "\n<s>\n", "\n</s>\n", *BYTES, *(p for p, _ in pieces)]
    fuzz(tok, {p: i for i, p in enumerate(vocab)}, [0.0] * 259 + [s for _, s in pieces], 300)


@pytest.mark.parametrize("cut", [1, 4, 10, 4000])
def test_a_corrupt_llama2c_file_is_refused(tmp_path, cut):
    path = llama2c(tmp_path / "m", [(" ", 0.0), ("a", -1.0)]) / "tokenizer.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"tokenizer\.bin"):
        PretrainedTokenizer.load(path.parent)
    path.write_bytes(struct.pack("<ifi", 7, 0.0, 1 << 30))
    with pytest.raises(DataError, match="piece 0 has 1073741824 bytes"):
        PretrainedTokenizer.load(path.parent)


@pytest.mark.data
def test_stories260k_reads_and_writes_its_goldens(data_root):
    folder = data_root / "weights" / "stories260k"
    tok = PretrainedTokenizer.load(folder)
    golden = np.load(folder / "golden_greedy.npz")["tokens"].tolist()
    text = json.loads((folder / "config.json").read_text())["greedy_200_text"]
    assert golden[0] == tok.bos_id
    assert tok.encode(text, start=True) == golden[1:]
    assert tok.decode(golden) == " " + text
    data, at, scores, vocab = (folder / "tok512.bin").read_bytes(), 4, [], {}
    while at < len(data):
        score, n = struct.unpack_from("<fi", data, at)
        vocab[data[at + 8 : at + 8 + n].decode()] = len(scores)
        scores.append(score)
        at += 8 + n
    fuzz(tok, vocab, scores, 2000)
