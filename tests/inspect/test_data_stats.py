"""Statistics of data sets equal independent counts."""

import dataclasses
import json

import pytest
from PIL import Image
from support.opened import opened, prepare, recipe

from vadapter.data.example import Source
from vadapter.inspect.data_stats import as_text, stats
from vadapter.inspect.open_data import open_data

WAYS = ("min", "median", "p95", "max")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = prepare(tmp_path_factory.mktemp("stats"))
    (root / "shapes" / "00.png").write_bytes(b"<html>")
    Image.new("RGB", (50, 20)).save(root / "shapes" / "01.png")
    return root


def four(facts):
    return tuple(facts[way] for way in WAYS)


def test_captions_sizes_and_bad_samples_are_counted(root):
    data = opened(root, "images")
    facts = stats(data)
    assert (facts["examples"], facts["looked_at"], facts["rows"]) == (24, 24, 24)
    assert four(facts["captions"]) == (2, 2, 2, 2)
    assert facts["captions"]["sum"] == 48
    assert four(facts["sizes"]["width"]) == (32, 32, 32, 50)
    assert facts["sizes"]["common"][:1] == [{"width": 32, "height": 32, "count": 22}]
    assert facts["headers_unreadable"]["count"] == 1
    assert (facts["bad"]["count"], facts["bad"]["of"]) == (1, 24)
    assert facts["bad"]["first"][0].startswith("images '00.png' (not an image ")
    lengths = sorted(len(data.tokenizer.encode(" " + c)) for e in data.source for c in e.captions)
    assert four(facts["text_tokens"])[::3] == (lengths[0], lengths[-1])
    assert facts["text_tokens"]["median"] == lengths[23]
    assert facts["text_tokens"]["p95"] == lengths[45]
    assert (facts["cut"]["count"], facts["cut"]["of"]) == (0, 48)
    prompt = len(data.tokenizer.encode("Describe the following:", start=True)) + 1
    assert four(facts["prompt_tokens"]) == (prompt,) * 4
    used = sum((data.transform(e, rng=None)["segments"] > 0).sum() for e in data.source)
    assert facts["fill"] == pytest.approx(used / (24 * 40))
    assert facts["tokens_a_second"] > facts["rows_a_second"] > 0


def test_truncated_texts_are_counted_as_the_rows_truncate_them(root):
    data = opened(root, "images", text_len=13, target_len=13, texts=1)
    facts = stats(data)
    whole = [len(data.tokenizer.encode(" " + e.captions[0])) for e in data.source]
    lead = len(data.tokenizer.encode(" :"))
    kept = [int(data.transform(e, rng=None)["segments"].sum()) - lead for e in data.source]
    assert facts["cut"]["count"] == sum(k < w for k, w in zip(kept, whole, strict=True))
    short = opened(root, "images", text_len=lead + 3, target_len=9, texts=1)
    assert stats(short)["cut"]["share"] == 1.0
    assert stats(short)["cut"]["of"] == 24


def test_questions_that_do_not_fit_are_left_out_and_counted(root):
    data = opened(root, "held_questions")
    facts = stats(data)
    assert (facts["left_out"]["count"], facts["left_out"]["of"]) == (0, 24)
    assert facts["questions"]["sum"] == 24
    config = recipe(root)
    room = facts["question_tokens"]["median"]  # the longer half does not fit
    config.data["held_questions"].__dict__["text_len"] = 2 * room
    (tight,) = open_data(config, root / "run", "", ["held_questions"])
    found = stats(tight)["left_out"]
    asked = [q for e in data.source for q in e.qa]
    piece = lambda q: f". Question: {q.text} Answer:"  # noqa: E731
    long = sum(len(data.tokenizer.encode(piece(q))) >= room for q in asked)
    assert 0 < long == found["count"] < found["of"] == 24 or long == found["count"] == 24


def test_clips_have_frames_seconds_and_rate(root):
    facts = stats(opened(root, "clips"))["clips"]
    assert four(facts["frames"]) == (8,) * 4
    assert four(facts["seconds"]) == (0.8,) * 4
    assert four(facts["frames_a_second"]) == (10.0,) * 4


def test_documents_are_counted_with_their_bos(root):
    data = opened(root, "documents")
    facts = stats(data)
    examples = [data.source[i] for i in range(len(data.source))]
    lengths = [1 + sum(len(data.tokenizer.encode(p)) for p in e.pieces) for e in examples]
    assert four(facts["text_tokens"])[::3] == (min(lengths), max(lengths))
    assert facts["cut"]["count"] == sum(n > 48 for n in lengths)
    assert "left_out" not in facts
    assert facts["rows"] <= len(data.items)


class Recording(Source):
    """A source that records which examples are read."""

    def __init__(self, source):
        self.source, self.kind, self.seen = source, source.kind, set()

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.seen.add(index)
        return self.source[index]


def test_a_limit_spreads_over_the_whole_set(root):
    data = opened(root, "images")
    source = Recording(data.source)
    data = dataclasses.replace(data, source=source, items=source)
    facts = stats(data, limit=4)
    assert facts["looked_at"] == facts["rows"] == 4
    assert facts["examples"] == 24
    assert source.seen == {0, 6, 12, 18}
    assert "24 examples (image, caption, as read by stage vision), 4 of them inspected" in as_text(
        facts
    )


def test_without_a_tokenizer_the_rest_is_reported_and_what_to_do(root, tmp_path):
    (data,) = open_data(recipe(root), tmp_path, "", ["images"])
    facts = stats(data)
    assert "text_tokens" not in facts
    assert facts["captions"]["sum"] == 48
    assert "--workdir=RUN" in as_text(facts)
    assert not list(tmp_path.iterdir())


def test_the_statistics_are_json_and_the_text_names_all_of_them(root):
    for name in ("images", "clips", "held_questions", "documents"):
        facts = json.loads(json.dumps(stats(opened(root, name))))
        text = as_text(facts)
        for word in ("text, tokens", "texts truncated", "unusable rows", "tokens per second"):
            assert word in text
