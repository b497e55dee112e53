"""Transforms: the layout as literal tables, truncation, bad samples, augmentation."""

import functools
import io
import time

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from benches.fake_batch import fake_batch
from vadapter.data.batch import check_batch
from vadapter.data.example import Example, Features, Question
from vadapter.data.media.images import ImageTransform
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.transforms import caption_sample, document_sample, question_sample
from vadapter.errors import ConfigError, DataError


class Words:
    """One id a word, so that the tables below can be read."""

    bos_id, eos_id = 1, 2

    def __init__(self):
        text = "Describe the following: : a dog runs fast cat Answer: question? yes no"
        self.ids = {word: i for i, word in enumerate(text.split(), 3)}

    def encode(self, text: str, *, start: bool = False) -> list[int]:
        return [self.ids.get(word, 99) for word in text.split()]


COLON, A, DOG, RUNS, FAST, CAT = 6, 7, 8, 9, 10, 11
EOS = 2
IMAGE = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)

caption = functools.partial(
    caption_sample,
    tokenizer=Words(),
    view=ImageTransform(8),
    text_len=10,
    target_len=8,
    prompt_len=6,
)


def lists(row):
    return {key: row[key].tolist() for key in row if key != "frames"}


def test_two_captions_share_one_prefix():
    row = caption(Example("x", IMAGE, ("a dog", " a  cat runs")), texts_per_image=2)
    assert lists(row) == {
        "prompt": [-1, -1, 1, 3, 4, 5],
        "tokens": [COLON, A, DOG, COLON, A, CAT, RUNS, 0, 0, 0],
        "segments": [1, 1, 1, 2, 2, 2, 2, 0, 0, 0],
        "positions": [0, 1, 2, 0, 1, 2, 3, 0, 0, 0],
        "target_at": [0, 1, 2, 3, 4, 5, 6, 0],
        "targets": [A, DOG, EOS, A, CAT, RUNS, EOS, 0],
        "weights": [1, 1, 1, 1, 1, 1, 1, 0],
        "bad": False,
    }
    assert row["frames"].shape == (1, 8, 8, 3)


def test_only_the_answer_is_a_target():
    row = question_sample(
        Example("x", IMAGE, qa=(Question("question?", ("yes",)), Question("question?", ("no",)))),
        Words(),
        view=ImageTransform(8),
        text_len=8,
        target_len=4,
        prompt_len=9,
        texts_per_image=1,
    )
    q, answer, yes = 13, 12, 14
    assert lists(row) == {
        "prompt": [-1, 1, 99, 4, 99, 99, 4, 99, 99],
        "tokens": [99, 99, q, answer, yes, 0, 0, 0],  # ". Question: question? Answer: yes"
        "segments": [1, 1, 1, 1, 1, 0, 0, 0],
        "positions": [0, 1, 2, 3, 4, 0, 0, 0],
        "target_at": [3, 4, 0, 0],
        "targets": [yes, EOS, 0, 0],
        "weights": [1, 1, 0, 0],
        "bad": False,
    }


def test_documents_are_packed_as_segments_that_start_with_bos():
    documents = [
        Example("1", pieces=("a dog", " runs")),
        Example("2", pieces=("a dog runs fast a dog runs fast",)),  # no room left
        Example("3", pieces=("Describe the following:", " cat", " :", " a cat")),
        Example("4", pieces=()),
    ]
    row = document_sample(documents, Words(), text_len=12)
    assert lists(row) == {
        "prompt": [],
        "tokens": [1, A, DOG, RUNS, 1, 3, 4, 5, CAT, COLON, A, CAT],
        "segments": [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7],
        "target_at": list(range(12)),
        "targets": [A, DOG, RUNS, EOS, 3, 4, 5, CAT, COLON, A, CAT, EOS],
        "weights": [1] * 12,
        "bad": False,
    }
    assert "frames" not in row
    last = document_sample(documents[2:3], Words(), text_len=12, target_len=4, last_only=True)
    assert last["tokens"].tolist()[:8] == row["tokens"].tolist()[4:]
    assert last["target_at"].tolist() == [5, 6, 7, 0]
    assert last["targets"].tolist() == [A, CAT, EOS, 0]


def test_a_document_and_a_caption_end_in_the_same_tokens():
    """A frozen model meets the layout it was pretrained on: only the context differs."""
    tok = BPETokenizer.train(["Describe the following: a dog runs :"] * 9, 300)
    row = caption_sample(
        Example("x", IMAGE, ("a dog runs",)), tok,
        view=ImageTransform(8), text_len=32, target_len=32, prompt_len=32,
    )  # fmt: skip
    pieces = ("Describe the following:", " dog grass", " :", " a dog runs")
    document = document_sample([Example("y", pieces=pieces)], tok, text_len=64)
    prompt, text = row["prompt"][row["prompt"] >= 0], row["tokens"][row["segments"] > 0]
    whole = document["tokens"][document["segments"] > 0]
    context = tok.encode(" dog grass")
    np.testing.assert_array_equal(whole, [*prompt, *context, *text])


def test_targets_that_do_not_fit_are_truncated_longest_first_and_keep_their_eos():
    captions = ("a dog", "a dog runs fast a dog runs fast")
    row = caption(Example("x", IMAGE, captions), texts_per_image=2)
    # Ten tokens hold two colons and eight words, eight targets hold two EOS and six words.
    assert row["tokens"].tolist() == [COLON, A, DOG, COLON, A, DOG, RUNS, FAST, 0, 0]
    assert row["targets"].tolist() == [A, DOG, EOS, A, DOG, RUNS, FAST, EOS]
    assert row["weights"].all()
    document = document_sample([Example("x", pieces=(captions[1],))], Words(), text_len=4)
    assert document["tokens"].tolist() == [1, A, DOG, RUNS]
    assert document["targets"].tolist() == [A, DOG, RUNS, EOS]


def test_a_caption_of_a_megabyte_is_truncated_quickly():
    tok = BPETokenizer.train(["a dog"] * 3, 262)
    start = time.monotonic()
    row = caption_sample(
        Example("x", IMAGE, ("x" * 2**20,)), tok,
        view=ImageTransform(8), text_len=16, target_len=16, prompt_len=64,
    )  # fmt: skip
    assert time.monotonic() - start < 1
    assert row["targets"].tolist()[-2:] == [EOS, 0]


def _png(broken: bool) -> bytes:
    out = io.BytesIO()
    Image.fromarray(IMAGE[0]).save(out, "PNG")
    return out.getvalue()[: 45 if broken else None]


@pytest.mark.parametrize(
    "example",
    [
        Example("truncated", _png(broken=True), ("a dog",)),
        Example("web page", b"<html>404</html>", ("a dog",)),
        Example("no media", None, ("a dog",)),
        Example("no captions", IMAGE),
        Example("blank captions", IMAGE, ("", " \t\n")),
    ],
    ids=lambda example: example.id,
)
def test_an_unusable_sample_keeps_its_shape_and_has_weight_zero(example):
    good, row = caption(Example("good", _png(broken=False), ("a dog",))), caption(example)
    assert not good["bad"]
    assert good["frames"].any()
    assert row["bad"]
    assert not row["weights"].any()
    assert not row["frames"].any()
    assert {k: (v.shape, v.dtype) for k, v in row.items()} == {
        k: (v.shape, v.dtype) for k, v in good.items()
    }


def test_blank_captions_are_skipped_if_there_are_others():
    row = caption(Example("x", IMAGE, ("", "a dog", " ")), texts_per_image=2)
    assert row["segments"].max() == 1
    assert not row["bad"]


def test_a_question_that_does_not_fit_is_masked_not_truncated():
    ask = functools.partial(
        question_sample,
        tokenizer=Words(),
        view=ImageTransform(8),
        text_len=8,
        target_len=4,
        prompt_len=9,
    )
    row = ask(Example("x", IMAGE, qa=(Question("word " * 20, ("yes",)),)))
    assert row["bad"]
    assert not row["weights"].any()
    assert ask(Example("x", IMAGE, qa=(Question("question?", (" ",)),)))["bad"]


def test_training_draws_captions_without_repeats_and_evaluation_takes_the_first():
    example = Example("x", IMAGE, ("a", "dog", "runs", "fast"))
    two = functools.partial(caption, example, texts_per_image=2)
    assert two()["tokens"].tolist()[:4] == [COLON, A, COLON, DOG]
    drawn = [tuple(two(rng=np.random.default_rng(i))["tokens"][[1, 3]]) for i in range(200)]
    assert len(set(drawn)) == 12
    assert all(a != b for a, b in drawn)


def test_half_of_the_images_are_mirrored_except_where_the_text_names_left_or_right():
    def mirrored(text, seed, frames=2):
        rng = np.random.default_rng(seed)
        shown = caption(Example("x", IMAGE, (text,)), rng=rng, flip=True, frames=frames)["frames"]
        if (shown == IMAGE[:, :, ::-1]).all():
            return True
        np.testing.assert_array_equal(shown, IMAGE)
        return False

    assert 30 < sum(mirrored("a dog", seed) for seed in range(100)) < 70
    for text in ("a dog on the left", "the RIGHT one", "leftmost dog", "a right-hand glove"):
        assert not any(mirrored(text, seed) for seed in range(20))
    evaluated = caption(Example("x", IMAGE, ("a dog",)), flip=True, frames=2)
    np.testing.assert_array_equal(evaluated["frames"], IMAGE)


def test_features_take_the_place_of_frames():
    features = np.ones((1, 1, 4, 6), ml_dtypes.bfloat16)
    row = caption(Example("x", Features(features), ("a dog",)))
    np.testing.assert_array_equal(row["features"], features[0])
    assert "frames" not in row
    bad = caption(Example("x", Features(features)))
    assert bad["bad"]
    assert not bad["features"].any()


def test_lengths_that_cannot_work_are_named():
    example = Example("x", IMAGE, ("a dog", "a cat"))
    with pytest.raises(ConfigError, match="prompt_len=3"):
        caption(example, prompt_len=3)
    with pytest.raises(ConfigError, match="text_len=3, target_len=8"):
        caption(example, texts_per_image=2, text_len=3)


@pytest.mark.parametrize("kwargs", [{}, {"frames": 8}, {"frames": 0}, {"features": (4, 6)}])
def test_a_fake_batch_is_valid_and_reproducible(kwargs):
    batch, again = fake_batch(3, size=4, **kwargs), fake_batch(3, size=4, **kwargs)
    check_batch(batch, vocab_size=64)
    for key, value in batch.items():
        np.testing.assert_array_equal(value, again[key])


def test_check_batch_names_what_is_wrong():
    def spoil(key, value, where=(1, 2)):
        batch = fake_batch(3, size=4)
        batch[key] = batch[key].copy()
        batch[key][where] = value
        return batch

    def replaced(**changes):
        return {**fake_batch(3, size=4), **changes}

    cases = [
        (spoil("tokens", 64), r"'tokens'\] has 64 in row 1"),
        (spoil("targets", -1), r"'targets'\] has -1"),
        (spoil("prompt", 1000), r"'prompt'\]"),
        (spoil("prompt", -2), r"'prompt'\] has -2 .*outside -1\.\.63"),
        (spoil("target_at", 24), r"'target_at'\]"),
        (spoil("weights", np.nan), "weights must be finite"),
        (spoil("bad", True, 1), "in bad rows"),
        (spoil("id", -1, 1), "in bad rows"),
        (spoil("segments", 0, 1), "0 at padding"),
        (replaced(tokens=np.zeros((3, 24), np.int64)), r"'tokens'\] is int64"),
        (replaced(targets=np.zeros((3, 25), np.int32)), r"'targets'\] is int32\[3, 25\]"),
        (replaced(extra=np.zeros(3)), r"unknown keys \['extra'\]"),
        (replaced(features=np.zeros((3, 1, 4, 6), ml_dtypes.bfloat16)), "at most one"),
    ]
    for batch, message in cases:
        with pytest.raises(DataError, match=message):
            check_batch(batch, vocab_size=64)
    missing = fake_batch(3, size=4)
    del missing["bad"]
    with pytest.raises(DataError, match=r"missing keys \['bad'\]"):
        check_batch(missing, vocab_size=64)
