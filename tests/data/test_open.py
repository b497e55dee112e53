"""From the recipe's data section to sources, streams and a tokenizer."""

import dataclasses
import json

import numpy as np
import pytest
from support.recipes import draw, tiny_recipe

from vadapter.data.config import DataConfig
from vadapter.data.media.images import ImageTransform
from vadapter.data.open import describe, make_source, make_stream, resolve, train_tokenizer
from vadapter.data.pipeline import eval_batches
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.errors import ConfigError, DataError
from vadapter.recipe.schema import TokenizerConfig, read


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def data(shapes):
    """The data sets of a recipe: name -> DataConfig."""
    return read(tiny_recipe(shapes)).data


@pytest.fixture(scope="module")
def tokenizer(data):
    lines = [t for name in ("images", "questions") for t in make_source(name, data[name]).texts()]
    return BPETokenizer.train(lines, 300, lowercase=True)


def test_a_set_that_is_not_what_the_recipe_says_is_refused(data, tokenizer):
    source, view = make_source("images", data["images"]), ImageTransform(16)
    said = lambda media: dataclasses.replace(data["images"], media=media)  # noqa: E731
    for media in ("", "image"):
        make_stream("images", said(media), source, tokenizer, view)
    with pytest.raises(ConfigError, match="'images': media='clip', but its source has images"):
        make_stream("images", said("clip"), source, tokenizer, view)


def test_variables_and_the_home_folder_are_filled_in(monkeypatch):
    monkeypatch.setenv("DATA", "/d")
    monkeypatch.setenv("HOME", "/home/me")
    assert resolve("$DATA/x") == resolve("${DATA}/x") == "/d/x"
    assert resolve("~/x") == "/home/me/x"
    assert resolve(["$DATA", ("~", 3)]) == ["/d", ["/home/me", 3]]
    assert resolve(7) == 7
    assert resolve("") == ""


def test_a_variable_that_is_not_set_is_named_with_its_key(monkeypatch):
    monkeypatch.delenv("VADAPTER_DATA", raising=False)
    config = DataConfig({"kind": "tars", "folder": "$VADAPTER_DATA/x", "split": "t"}, "caption", 9)
    message = r"^data\.photos\.source\.folder='\$VADAPTER_DATA/x': the environment variable VADAP.*"
    with pytest.raises(ConfigError, match=message + r"--config\.data\.photos\.source\.folder=PATH"):
        make_source("photos", config)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "tar"}, r"config\.data\.x\.source\.kind='tar': unknown; did you mean 'tars'\?"),
        ({}, r"config\.data\.x\.source\.kind='': unknown; known: documents, folder, parquet, "),
        ({"kind": "folder", "tabel": "t"}, r"source\.tabel: unknown key; did you mean 'table'\?"),
        ({"kind": "folder"}, r"config\.data\.x\.source: .*missing.*'table'"),
        ({"kind": "folder", "table": "nowhere.jsonl"}, r"nowhere\.jsonl: no such file"),
        ({"kind": "tars", "folder": "nowhere", "split": "train"}, "nowhere: no shards train-NNN"),
        ({"kind": "documents"}, "0 usable examples"),
        ({"kind": "documents", "groups": ["nowhere.jsonl"]}, r"No text file at nowhere\.jsonl"),
    ],
)  # fmt: skip
def test_a_source_that_cannot_be_made_is_one_clear_line(source, message):
    with pytest.raises((ConfigError, DataError), match=message) as error:
        make_source("x", DataConfig(source, "caption", 16))
    assert "\n" not in str(error.value)


def test_streams_yield_rows_of_the_lengths_that_the_recipe_asks_for(data, tokenizer):
    for name, frames in (("images", 1), ("clips", 8), ("questions", 1)):
        config = data[name]
        items, transform = make_stream(
            name, config, make_source(name, config), tokenizer, ImageTransform(16)
        )
        batch = next(iter(eval_batches(items, transform, 4)))
        assert batch["frames"].shape == (4, frames, 16, 16, 3)
        assert batch["tokens"].shape == (4, config.text_len)
        assert batch["targets"].shape == (4, config.target_len)
        assert batch["segments"].max() == config.texts == 2
        assert not batch["bad"].any()


def test_documents_are_packed_and_have_no_prompt(data, tokenizer):
    config = dataclasses.replace(data["documents"], text_len=160)
    source = make_source("documents", config)
    items, transform = make_stream("documents", config, source, tokenizer, None)
    batch = next(iter(eval_batches(items, transform, 4)))
    assert batch["prompt"].shape == (4, 0)
    assert "frames" not in batch
    assert batch["segments"].max() > 1


def test_every_caption_and_answer_of_a_source_is_trained_on(data):
    said = set(make_source("questions", data["questions"]).texts())
    assert ". Question: what colour is it? Answer:" in said
    assert {"red", "yes", "no"} <= said
    said = set(make_source("images", data["images"]).texts())
    assert "a red circle on white" in said


def test_the_tokenizer_is_trained_once_and_then_read(data, tmp_path):
    config = TokenizerConfig(vocab_size=280, data=("images",))
    sources = {"images": make_source("images", data["images"])}
    made = train_tokenizer(config, sources, tmp_path / "tokenizer.json")
    again = train_tokenizer(config, {}, tmp_path / "tokenizer.json")  # no source is needed
    assert again.digest == made.digest
    assert made.decode(made.encode("Describe the following: x")) == "describe the following: x"
    with pytest.raises(ConfigError, match=r"config\.tokenizer\.data: empty; name the data sets"):
        train_tokenizer(TokenizerConfig(), {}, tmp_path / "other.json")
    (tmp_path / "tokenizer.json").write_text('{"format": "vada')
    with pytest.raises(DataError, match=r"Cannot read the tokenizer .*tokenizer\.json"):
        train_tokenizer(config, sources, tmp_path / "tokenizer.json")


def test_an_unusable_sample_is_called_by_its_name_and_its_fault(shapes, data, tmp_path):
    rows = [json.loads(line) for line in (shapes / "images.jsonl").read_text().splitlines()]
    folder = tmp_path / "shapes"
    draw(folder)
    (folder / rows[0]["image"]).write_bytes((folder / rows[0]["image"]).read_bytes()[:60])
    (folder / rows[1]["image"]).write_text("<html>not found</html>")
    source = make_source("images", read(tiny_recipe(folder)).data["images"])
    said = [describe("images", source, i) for i in range(3)]
    assert said[0].startswith("images '00.png' (cannot be decoded")
    assert said[1] == (
        "images '01.png' (not an image (JPEG, PNG, WEBP, GIF, BMP) or a clip; it starts with "
        "b'<html>not found<')"
    )
    assert said[2] == "images '03.png' (no text that fits)"
    (folder / rows[0]["image"]).unlink()
    assert "00.png is not a regular file" in describe("images", source, 0)
    assert describe("documents", make_source("documents", data["documents"]), 5) == (
        "documents row 5 (no text in it)"
    )


def test_a_text_that_cannot_fit_at_all_is_an_error_and_not_a_bad_sample(data, tokenizer):
    small = DataConfig(data["images"].source, "caption", text_len=4, texts=4)
    items, transform = make_stream(
        "images", small, make_source("images", small), tokenizer, ImageTransform(16)
    )
    with pytest.raises(ConfigError, match="text_len=4, target_len=4 are too small for 2 texts"):
        next(iter(eval_batches(items, transform, 4)))
    assert np.asarray(items[0].captions).shape == (2,)


@pytest.mark.parametrize("name", ["images", "clips", "questions"])
def test_a_blank_data_set_has_the_texts_of_the_other_and_gray_in_place_of_all_pixels(
    data, tokenizer, name
):
    view = ImageTransform(16)
    blank = dataclasses.replace(data[name], blank=True)
    rows = []
    for config in (data[name], blank):
        items, transform = make_stream(name, config, make_source(name, config), tokenizer, view)
        rows.append([transform(items[i], rng=np.random.default_rng(i)) for i in range(len(items))])
    assert len(rows[0]) == len(rows[1]) > 0
    for seen, unseen in zip(*rows, strict=True):
        assert not np.array_equal(seen["frames"], unseen["frames"])
        assert unseen["frames"].shape == seen["frames"].shape
        assert set(unseen.pop("frames").ravel()) == {127}
        del seen["frames"]
        for key, values in seen.items():
            assert np.array_equal(values, unseen[key])
    assert make_source(name, blank).fingerprint() == make_source(name, data[name]).fingerprint()
    assert [*make_source(name, blank).texts()] == [*make_source(name, data[name]).texts()]


def test_documents_cannot_be_blank(data):
    with pytest.raises(ConfigError, match=r"config\.data\.documents\.blank: .* no images"):
        make_source("documents", dataclasses.replace(data["documents"], blank=True))
