"""The row to be continued is the front of the row that was trained on."""

import ml_dtypes
import numpy as np
import pytest

from vadapter.data.batch import EOS
from vadapter.data.example import Example, Features, Question
from vadapter.data.media.images import ImageTransform
from vadapter.data.prompts import CAPTION, QUESTION
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.data.transforms import caption_sample, prompt_sample, question_sample

PIXELS = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(1, 4, 4, 3)
ASKED = Question("what colour is it?", ("red",), "colour")
EXAMPLE = Example("a", PIXELS, ("a red circle",), (ASKED,))
MAX = 40


@pytest.fixture(scope="module")
def tokenizer():
    texts = [CAPTION.before, CAPTION.after, QUESTION.before, QUESTION.after("what colour is it?")]
    return BPETokenizer.train([*texts, "a red circle"] * 4, 300, lowercase=True)


def lead_of(row):
    """The tokens in front of the first target."""
    return row["tokens"][: row["target_at"][0] + 1].tolist()


@pytest.mark.parametrize(
    ("item", "train", "before"),
    [
        (EXAMPLE, caption_sample, CAPTION.before),
        ((EXAMPLE, ASKED), question_sample, QUESTION.before),
    ],
    ids=["caption", "question"],
)
def test_the_prompt_is_that_of_training(tokenizer, item, train, before):
    P = len(tokenizer.encode(before)) + 1
    trained = train(
        EXAMPLE, tokenizer, view=ImageTransform(4), text_len=MAX, target_len=MAX, prompt_len=P
    )
    row = prompt_sample(item, tokenizer, view=ImageTransform(4), text_len=MAX)
    n = len(lead_of(trained))
    np.testing.assert_array_equal(row["prompt"], trained["prompt"])
    np.testing.assert_array_equal(row["frames"], trained["frames"])
    for key in ("tokens", "segments", "positions"):
        assert row[key].shape == (MAX,)
        np.testing.assert_array_equal(row[key][:n], trained[key][:n])
        assert not row[key][n:].any()
    # Whatever comes next is read where the first target was predicted.
    assert row["target_at"].tolist() == [n - 1] == [int(trained["target_at"][0])]
    assert row["targets"].tolist() == [EOS]
    assert row["weights"].tolist() == [1.0]
    assert not row["bad"]


def test_a_caption_prompt_needs_no_captions(tokenizer):
    rows = [
        prompt_sample(Example("a", PIXELS, captions), tokenizer, view=ImageTransform(4), text_len=3)
        for captions in ((), ("a red circle",))
    ]
    for key in rows[0]:
        np.testing.assert_array_equal(rows[0][key], rows[1][key])
    assert not rows[0]["bad"]


def test_a_question_that_is_too_long_keeps_its_end(tokenizer):
    long = Question("why " * 50 + "is it red?", ("no",))
    row = prompt_sample((EXAMPLE, long), tokenizer, view=ImageTransform(4), text_len=12)
    whole = tokenizer.encode(QUESTION.after(long.text)[: 12 * 32])
    assert row["tokens"].tolist() == whole[-12:]
    assert row["segments"].tolist() == [1] * 12
    assert row["positions"].tolist() == list(range(12))


@pytest.mark.parametrize("media", [b"not an image", None])
def test_an_unreadable_image_gives_an_unusable_row(tokenizer, media):
    row = prompt_sample(Example("a", media), tokenizer, view=ImageTransform(4), text_len=3)
    assert row["bad"]
    assert row["frames"].shape == (1, 4, 4, 3)
    assert not row["frames"].any()
    assert not row["weights"].any()


def test_cached_tokens_pass_and_only_the_image_that_is_not_mirrored(tokenizer):
    tokens = np.arange(2 * 1 * 2 * 3).reshape(2, 1, 2, 3).astype(ml_dtypes.bfloat16)
    row = prompt_sample(
        Example("a", Features(tokens)), tokenizer, view=ImageTransform(4), text_len=3
    )
    np.testing.assert_array_equal(row["features"], tokens[0])
    assert "frames" not in row
    bad = prompt_sample(
        Example("a", Features(tokens, readable=False)),
        tokenizer,
        view=ImageTransform(4),
        text_len=3,
    )
    assert bad["bad"]
    assert not bad["features"].any()


def test_a_clip_is_read_with_the_requested_number_of_frames(tokenizer):
    clip = Example("a", np.repeat(PIXELS, 16, axis=0))
    row = prompt_sample(clip, tokenizer, view=ImageTransform(2), frames=8, text_len=3)
    assert row["frames"].shape == (8, 2, 2, 3)
