"""Shown rows have every token once, and a target exactly where the loss counts it."""

import html.parser
import re

import numpy as np
import pytest
from support.opened import opened, prepare, recipe

from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.errors import ConfigError
from vadapter.inspect.open_data import open_data
from vadapter.inspect.show_data import as_text, pieces, shown, texts_of, wants_color
from vadapter.inspect.show_page import write_page


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = prepare(tmp_path_factory.mktemp("show"))
    (root / "shapes" / "02.png").write_bytes(b"<html><script>alert(1)</script>")
    return root


@pytest.mark.parametrize("name", ["images", "clips", "held_questions", "documents"])
def test_every_token_of_a_row_is_shown_once_and_targets_are_those_of_the_loss(root, name):
    data = opened(root, name)
    for n, seen in enumerate(shown(data, 3)):
        _, row = data.row(n)
        tokens = [token for text in seen.texts for token in text]
        real = row["segments"] > 0
        read = [token for token in tokens if token.read]
        assert [t.id for t in read] == row["tokens"][real].tolist()
        assert [t.segment for t in read] == row["segments"][real].tolist()
        assert [t.position for t in read] == row["positions"][real].tolist()
        assert [t.id for t in tokens if t.role == "target"] == [
            int(t) for t, w in zip(row["targets"], row["weights"], strict=True) if w > 0
        ]
        assert [t.id for t in seen.prompt] == row["prompt"][row["prompt"] >= 0].tolist()
        assert seen.padding == ((row["prompt"] < 0).sum(), (~real).sum())
        if name != "documents":
            np.testing.assert_array_equal(seen.frames, row["frames"])
            assert seen.frames.shape == (8 if name == "clips" else 1, 32, 32, 3)


def test_targets_are_words_and_end_and_the_rest_is_context(root):
    _, seen = shown(opened(root, "held_questions"), 2)  # the first one cannot be read
    first = seen.texts[0]
    words = {
        role: "".join(t.text for t in first if t.role == role) for role in ("context", "target")
    }
    assert words["context"] == ". question: what colour is it? answer:"
    assert re.fullmatch(r" (red|green|blue)⟨eos⟩", words["target"])


def test_a_target_that_the_loss_does_not_count_is_context(root):
    data = opened(root, "images")
    _, row = data.row(0)
    row["weights"][1] = 0
    before = next(texts_of(data.row(0)[1], data.tokenizer))
    after = next(texts_of(row, data.tokenizer))
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    assert [after[i].role for i in changed] == ["context"]
    assert [before[i].role for i in changed] == ["target"]


def test_mirrored_rows_are_marked_and_others_are_not(root):
    data = opened(root, "images", flip=True)
    marks = [row.mirrored for row in shown(data, 24)]
    for n, mark in enumerate(marks):
        index, row = data.row(n)
        whole = data.transform(data.source[index], rng=None)["frames"]
        assert mark == (not np.array_equal(whole, row["frames"]))
    assert 4 < sum(marks) < 20
    assert not any(row.mirrored for row in shown(opened(root, "images"), 24))


@pytest.mark.parametrize("decode", ["exact", "fast"])
def test_rows_whose_jpegs_are_not_decoded_exactly_say_so(root, tmp_path, decode):
    rows = list(shown(opened(root, "images", decode=decode), 2))
    text = "\n".join(as_text(rows, color=False))
    page = write_page(tmp_path / "rows.html", "rows", rows).read_text()
    for words in (text, page):
        assert words.count("JPEGs decoded fast") == 2 * (decode == "fast")


def test_a_bad_row_has_its_name_and_reason(root):
    rows = list(shown(opened(root, "held"), 2))
    assert "held '02.png' (not an image " in rows[0].bad
    assert not any(token.role == "target" for text in rows[0].texts for token in text)
    assert not rows[1].bad
    text = "\n".join(as_text(rows, color=False))
    assert text.count("unusable row, weight 0") == 1


def test_pieces_join_to_the_text_also_inside_characters():
    tokenizer = BPETokenizer.train(["aa ab"], 259)
    text = "é 日本 a\N{PILE OF POO}"
    ids = tokenizer.encode(text)
    assert len(pieces(ids, tokenizer)) == len(ids) > len(text)
    assert "".join(pieces(ids, tokenizer)) == text
    around = pieces([1, *ids[:2], 2], tokenizer)
    assert around == ["⟨bos⟩", "", "é", "⟨eos⟩"]


def test_plain_text_marks_targets_and_color_is_optional(root, monkeypatch):
    rows = list(shown(opened(root, "clips"), 1))
    plain, colored = ("\n".join(as_text(rows, color=c)) for c in (False, True))
    assert "\x1b" not in plain
    assert plain.count("⟦") == plain.count("⟧") == 2
    assert "8 × 32 × 32" in plain
    assert colored.count("▀") == 8 * 25 * 12  # eight frames side by side
    assert "\x1b[1;32m" in colored

    class Terminal:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_color(Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_color(Terminal())


def test_control_characters_in_data_do_not_reach_the_terminal(root):
    (row,) = shown(opened(root, "images"), 1)
    hostile = type(row)(**{**row.__dict__, "name": "\x1b[2Jx\r", "bad": "\x07y"})
    assert not set("\x1b\r\x07") & set("\n".join(as_text([hostile], color=False)))


class Page(html.parser.HTMLParser):
    """Tags, images and spans of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.spans, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.images += [dict(attrs)["src"]] if tag == "img" else []
        if tag == "span":
            self.open = dict(attrs).get("class", "").split()
            self.spans.append((self.open, ""))

    def handle_data(self, data):
        if self.open and self.spans:
            kinds, text = self.spans[-1]
            self.spans[-1] = kinds, text + data

    def handle_endtag(self, tag):
        self.open = [] if tag == "span" else self.open


def test_the_page_is_self_contained_and_data_is_never_markup(root, tmp_path):
    rows = [*shown(opened(root, "clips"), 2), *shown(opened(root, "held"), 1)]
    rows[0] = type(rows[0])(**{**rows[0].__dict__, "name": "<script>alert(1)</script>"})
    path = write_page(tmp_path / "deep" / "page.html", "<b>title", rows)
    text = path.read_text()
    page = Page(text)
    assert len(page.images) == 8 + 8 + 1
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    assert "script" not in page.tags
    assert not re.search(r"(?:src|href)=(?!\"?data:)", text)
    assert page.tags.count("article") == 3
    texts = [
        "".join(t for kinds, t in page.spans if kind in kinds) for kind in ("target", "unread")
    ]
    expected = "".join(t.text for row in rows for x in row.texts for t in x if t.role == "target")
    assert texts[0].removeprefix("targettarget, not read") == expected  # after the legend
    assert texts[1].count("⟨eos⟩") == 4
    assert "unusable row, weight 0" in text


def test_without_a_tokenizer_it_says_what_to_do(root, tmp_path):
    (data,) = open_data(recipe(root), tmp_path, "", ["images"])
    with pytest.raises(ConfigError, match="need the tokenizer of stage vision: pass --workdir=RUN"):
        next(shown(data, 1))
    assert not list(tmp_path.iterdir())
