"""Whoever shows the encoder a picture shows it as the encoder wants it, or as its data set says."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from support import runs, tiny
from support.processors import image
from support.recipes import SIZE, tiny_recipe
from support.sources import ListSource

from vadapter.data.config import DataConfig
from vadapter.data.example import Example
from vadapter.data.media.frames import load_square
from vadapter.data.media.images import ImageTransform, decode_image, resize
from vadapter.data.open import make_source, train_tokenizer
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import ConfigError
from vadapter.evaluate import describe
from vadapter.evaluate.runner import evaluate
from vadapter.metrics.scoring import Generation
from vadapter.models.registry import make_module
from vadapter.recipe.schema import EvalConfig, read
from vadapter.stages.feature_cache import encoded
from vadapter.stages.outline import Outline
from vadapter.stages.run import Run

# Nothing of it is a default, and each part of it shows in the pixels.
KEYS = {"fit": "crop", "interpolation": "bilinear", "crop_pct": 0.75, "floor": True}
VIEW = ImageTransform(SIZE, "crop", "bilinear", 0.75, True)
PIXELS = image(75, 99)
ONE = DataConfig({"kind": "folder"}, "caption", text_len=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Drawn images, the first of them like a photo and oblong."""
    made = runs.prepare(tmp_path_factory.mktemp("images"))
    Image.fromarray(PIXELS).save(made / "shapes" / "00.png")
    return made


def wanting(config, **keys):
    """The recipe with an encoder that wants `VIEW`."""
    with config.unlocked():
        config.components.encoder.update(KEYS)
        config.data.images.update(cache=False, flip=False, **keys)
    return read(config)


class Seen:
    """A decoder that keeps the images and generates the same caption for each."""

    def __init__(self, tokenizer, frames):
        self.tokenizer, self.frames = tokenizer, frames
        self.mesh = make_mesh(MeshConfig(), jax.devices()[:1])

    def generate(self, params, batches, how, shown=None, count=1):
        self.frames += [np.asarray(batch["frames"]) for batch in batches]
        yield [Generation(i, "a bar", True) for i in range(2)]


@pytest.mark.parametrize("name", ["vision", "decoder"])
def test_a_stage_trains_on_the_encoders_view(folder, tmp_path, name):
    config = tiny_recipe(folder / "shapes") if name == "vision" else runs.small(folder)
    stage = Run(wanting(config), tmp_path).stage(name)
    assert stage.view == VIEW
    items, transform = stage.stream("images", {})
    np.testing.assert_array_equal(transform(items[0])["frames"], resize(PIXELS[None], VIEW))


def test_each_part_of_the_view_shows_in_the_pixels():
    shown = resize(PIXELS[None], VIEW)
    for key in KEYS:
        assert not np.array_equal(
            shown, resize(PIXELS[None], ImageTransform(SIZE, **without(key)))
        ), key


def without(key):
    return {"fit": "stretch"} if key == "fit" else {k: v for k, v in KEYS.items() if k != key}


@pytest.mark.parametrize(
    ("keys", "view"),
    [
        ({"fit": "pad"}, dataclasses.replace(VIEW, fit="pad")),
        ({"size": 2 * SIZE}, dataclasses.replace(VIEW, size=2 * SIZE)),
        ({"fit": "", "size": 0}, VIEW),
    ],
)
def test_a_data_set_may_be_seen_otherwise(folder, tmp_path, keys, view):
    stage = Run(wanting(runs.small(folder), **keys), tmp_path).stage("decoder")
    items, transform = stage.stream("images", {})
    np.testing.assert_array_equal(transform(items[0])["frames"], resize(PIXELS[None], view))


def test_without_an_encoder_a_data_set_says_how_large_images_are():
    assert dataclasses.replace(ONE, size=8, fit="pad").view(None) == ImageTransform(8, "pad")
    with pytest.raises(ConfigError, match="image_size=0"):
        ONE.view(None)


@pytest.fixture(scope="module")
def tokenizer(folder, tmp_path_factory):
    config = read(tiny_recipe(folder / "shapes"))
    sources = {n: make_source(n, config.data[n]) for n in config.tokenizer.data}
    return train_tokenizer(config.tokenizer, sources, tmp_path_factory.mktemp("t") / "t.json")


def test_an_evaluation_shows_the_view_of_training(tokenizer):
    seen = []
    source = ListSource([Example(name, PIXELS[None], ("a bar",)) for name in "ab"])
    for data in (ONE, dataclasses.replace(ONE, fit="stretch")):
        evaluate(Seen(tokenizer, seen), {}, source, data, EvalConfig("x"), VIEW)
    np.testing.assert_array_equal(seen[0][0], resize(PIXELS[None], VIEW))
    stretched = dataclasses.replace(VIEW, fit="stretch")
    np.testing.assert_array_equal(seen[1][0], resize(PIXELS[None], stretched))


def test_an_evaluation_decodes_jpegs_as_its_data_set_says(tokenizer, jpeg):
    seen = []
    source = ListSource([Example(name, jpeg.read_bytes(), ("a bar",)) for name in "ab"])
    for decode in ("exact", "fast"):
        data = dataclasses.replace(ONE, decode=decode)
        evaluate(Seen(tokenizer, seen), {}, source, data, EvalConfig("x"), VIEW)
        view = dataclasses.replace(VIEW, decode=decode)
        np.testing.assert_array_equal(seen[-1][0], load_square(jpeg, view, frames=1))
    assert not np.array_equal(*seen)


@pytest.fixture
def jpeg(tmp_path):
    """A JPEG that `decode=fast` decodes at a part of its size."""
    path = tmp_path / "large.jpg"
    Image.fromarray(image(300, 400)).save(path)
    return path


@pytest.mark.parametrize("how", [{}, {"fit": "stretch"}, {"decode": "fast"}], ids=str)
def test_own_images_are_transformed_like_those_of_training_and_decoded_exactly(
    jpeg, tokenizer, monkeypatch, how
):
    seen = []
    monkeypatch.setattr(describe, "Decoder", lambda *_: Seen(tokenizer, seen))
    data = {"images": dataclasses.replace(ONE, **how)}
    loaded = types.SimpleNamespace(
        view=VIEW, name="s", tokenizer=tokenizer, params={},
        outline=Outline(VIEW, tiny.LLM.max_len, {}),
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]), config=types.SimpleNamespace(data=data),
        recipe=types.SimpleNamespace(data=data),
    )  # fmt: skip
    replies = list(describe.Describer(loaded).replies([jpeg] * 2))
    assert [reply.text for reply in replies] == ["a bar"] * 2
    view = dataclasses.replace(VIEW, fit=how.get("fit", VIEW.fit))
    np.testing.assert_array_equal(seen[0][0], resize(decode_image(jpeg)[None], view))


def test_tokens_are_cached_of_the_encoders_view(folder, tmp_path):
    recipe = wanting(runs.small(folder))
    module = make_module("encoder", recipe.components["encoder"])
    params = tiny.init(module, jnp.zeros((1, 1, SIZE, SIZE, 3)))
    source = make_source("images", recipe.data["images"])
    made = encoded(
        source, recipe.data["images"], tmp_path, encoder=module, params=params, digest="d" * 64,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
    )  # fmt: skip
    wanted, plain = (
        module.apply({"params": params}, resize(PIXELS[None], view)[None])[0]
        for view in (VIEW, ImageTransform(SIZE))
    )
    np.testing.assert_allclose(made[0].media.tokens[0], wanted, rtol=2**-8, atol=1e-4)  # bfloat16
    assert np.abs(np.asarray(plain) - wanted).max() > 0.05
