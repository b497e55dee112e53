"""Documents: the multimodal layout in text, deterministic per index, packed by random access."""

import gzip
import json
import pickle

import numpy as np
import pytest

from vadapter.data.documents import DocumentSource, content_words
from vadapter.data.items import Windows
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.transforms import document_sample
from vadapter.errors import ConfigError, DataError

GROUPS = [
    ["A black dog runs .", "The dog is fast .", "A dog on grass ."],
    ["Two men play chess .", "Men at a table ."],
    ["A lone caption ."],
]


@pytest.fixture
def files(tmp_path):
    groups = tmp_path / "groups.jsonl.gz"
    lines = [json.dumps({"source": "x", "captions": g}) for g in GROUPS]
    groups.write_bytes(gzip.compress("\n".join(lines).encode()))
    captions = tmp_path / "captions.txt"
    captions.write_text("A red car .\n\n  \nA blue boat .\n")
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        json.dumps({"text": "word " * 100}) + "\n" + json.dumps("a plain string") + "\n"
    )
    return {"groups": [groups], "captions": [captions], "texts": [texts]}


def only(files, sort, **kwargs):
    return DocumentSource(**files, mixture={sort: 1.0}, **kwargs)


def test_prompts_are_the_papers():
    assert (CAPTION.before, CAPTION.after) == ("Describe the following:", " :")
    prompt = QUESTION.fill("what\n is it ?", [("how many ?", "2")])
    assert prompt.before == (
        "Answer the question given the images. Given Question: how many ? Answer: 2 Given"
    )
    assert prompt.after == ". Question: what is it ? Answer:"
    assert QUESTION.fill("x").before == QUESTION.before


def test_sibling_captions_take_the_place_of_the_visual_tokens(files):
    source = only({"groups": files["groups"]}, "siblings")
    for i in range(len(source)):
        caption = [c for g in GROUPS for c in g][i % 6]
        group = next(g for g in GROUPS if caption in g)
        pieces = source[i].pieces
        assert pieces[0] == "Describe the following:"
        assert pieces[-2:] == (" :", " " + caption)
        middle = pieces[1:-2]
        assert len(middle) == (len(group) > 1)
        for text in middle:
            assert text.startswith(" ")
            assert caption not in text, "the target may not stand in its own context"
            assert any(sibling in text for sibling in group)


def test_keywords_are_the_siblings_content_words_shuffled(files):
    source = only({"groups": files["groups"]}, "keywords", variants=30)
    seen = {source[i].pieces[1] for i in range(0, len(source), 6)}
    assert {frozenset(text.split()) for text in seen} == {
        frozenset({"dog", "fast"}),
        frozenset({"dog", "grass"}),
        frozenset({"dog", "fast", "grass"}),
    }
    assert len(seen) > 3, "the order is shuffled"
    alone = source[5].pieces
    assert sorted(alone[1].split()) == ["caption", "lone"]


def test_content_words_leave_out_the_small_words():
    assert content_words("The man's T-shirt is on a RED_car, naïve 2!") == [
        "man's", "t-shirt", "red", "car", "naïve", "2",
    ]  # fmt: skip


def test_every_sort_appears_in_its_share_and_plain_has_no_context(files):
    source = DocumentSource(**files, variants=250)
    sorts = [source[i].id.split("-")[0] for i in range(len(source))]
    shares = {sort: sorts.count(sort) / len(sorts) for sort in set(sorts)}
    expected = {"siblings": 0.35, "keywords": 0.35, "plain": 0.2, "text": 0.1}
    assert shares == pytest.approx(expected, abs=0.04)
    assert only(files, "plain")[6].pieces == ("Describe the following:", " :", " A red car .")


def test_each_caption_is_the_target_of_as_many_documents(files):
    source = only(files, "plain", variants=3)
    targets = [source[i].pieces[-1] for i in range(len(source))]
    assert len(source) == 3 * 8
    assert {targets.count(t) for t in targets} == {3}
    assert len({source[i].id for i in range(len(source))}) == len(source)


def test_a_document_is_a_function_of_seed_and_index(files):
    one, two = DocumentSource(**files), pickle.loads(pickle.dumps(DocumentSource(**files)))
    order = np.random.default_rng(0).permutation(len(one))
    assert {int(i): one[int(i)] for i in order} == {i: two[i] for i in range(len(two))}
    other = DocumentSource(**files, seed=1)
    assert [other[i] for i in range(len(other))] != [one[i] for i in range(len(one))]


def test_the_fingerprint_follows_text_and_parameters(files, tmp_path):
    prints = [
        DocumentSource(**files).fingerprint(),
        DocumentSource(**files, seed=1).fingerprint(),
        DocumentSource(**files, mixture={"plain": 1}).fingerprint(),
        DocumentSource(groups=files["groups"]).fingerprint(),
    ]
    assert len(set(prints)) == 4
    assert DocumentSource(**files).fingerprint() == prints[0]
    files["captions"][0].write_text("A red car .\nA blue goat .\n")
    assert DocumentSource(**files).fingerprint() != prints[0]


def test_general_text_is_cut_between_words_and_complete(tmp_path):
    path = tmp_path / "book.txt"
    words = [f"word{i}" for i in range(300)]
    path.write_text(" ".join(words[:150]) + "\n\n" + " ".join(words[150:]))
    source = DocumentSource(texts=[path], chunk_chars=100)
    assert max(map(len, source._chunks)) <= 100
    assert " ".join(source._chunks).split() == words
    assert source[0].pieces[0] in source._chunks


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("g.jsonl", b'{"captions": ["a"]}\n{"captions": "a"}\n', "line 2"),
        ("g.jsonl", b"{not json}\n", "line 1: not JSON"),
        ("g.jsonl", b'{"captions": ["  "]}\n', "0 usable examples"),
        ("g.jsonl", b"", "0 usable examples"),
        ("g.jsonl", b"\xff\xfe", "UTF-8"),
        ("g.jsonl.gz", b"\x1f\x8b\x08\x00 cut", r"g\.jsonl\.gz"),
        ("g.jsonl.gz", b"plain text", r"g\.jsonl\.gz"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        DocumentSource([tmp_path / name])


def test_bad_arguments_are_named(files, tmp_path):
    with pytest.raises(DataError, match="No text file at"):
        DocumentSource([tmp_path / "absent.txt"])
    with pytest.raises(DataError, match="no files"):
        DocumentSource()
    with pytest.raises(ConfigError, match="siblngs"):
        DocumentSource(**files, mixture={"siblngs": 1})
    with pytest.raises(ConfigError, match="leaves nothing to draw"):
        DocumentSource(groups=files["groups"], mixture={"text": 1})


def test_windows_hold_each_document_once_and_neighbors_apart(files):
    source = DocumentSource(**files)
    windows = Windows(source, 5)
    ids = [example.id for r in range(len(windows)) for example in windows[r]]
    assert len(windows) == len(source) // 5
    assert len(set(ids)) == len(ids) == 5 * len(windows)
    numbers = [int(example.id.split("-")[1]) for example in windows[3]]
    assert np.diff(numbers).tolist() == [len(windows)] * 4


@pytest.mark.data
def test_real_rows_are_packed_at_least_85_percent_full(data_root):
    text = data_root / "text"
    source = DocumentSource(
        groups=[text / "caption_groups.jsonl.gz"], texts=[text / "wikitext_1000.jsonl.gz"]
    )
    sample = [piece for i in range(0, len(source), 1601) for piece in source[i].pieces]
    tok = BPETokenizer.train(sample, 2048)
    windows = Windows.to_fill(source, tok, 256)
    rows = [document_sample(windows[r], tok, text_len=256) for r in range(0, len(windows), 1999)]
    assert len(rows) > 50
    assert np.mean([row["segments"] > 0 for row in rows]) > 0.85
