"""The five lines of someone who has an export and some images."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT

from vadapter import VAdapter
from vadapter.data.media.images import decode_image, resize
from vadapter.data.media.video import decode_clip
from vadapter.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def model(exported):
    return VAdapter.from_pretrained(str(exported))


@pytest.fixture
def shapes(folder):
    return folder / "shapes"


def test_lists_give_lists_and_one_gives_one(model, shapes):
    paths = [str(shapes / name) for name in ("00.png", "05.png", "00.gif")]
    each = [model.caption(path) for path in paths]
    assert all(isinstance(text, str) for text in each)
    assert model.caption(paths) == each
    assert model.caption(paths, batch=2) == each
    assert model.caption(paths[:1]) == each[:1]
    assert model.caption([]) == []


def test_a_question_goes_with_every_image_and_a_image_with_every_question(model, shapes):
    paths = [shapes / "00.png", shapes / "05.png"]
    asked = ["what colour is it?", "is the ground black, or is it white, or something else?"]
    one = {(p, q): model.ask(p, q) for p in paths for q in asked}
    assert all(isinstance(text, str) for text in one.values())
    assert model.ask(paths, asked[0]) == [one[paths[0], asked[0]], one[paths[1], asked[0]]]
    assert model.ask(paths[0], asked) == [one[paths[0], asked[0]], one[paths[0], asked[1]]]
    assert model.ask(paths, asked) == [one[paths[0], asked[0]], one[paths[1], asked[1]]]
    with pytest.raises(ConfigError, match="2 images and 3 questions"):
        model.ask(paths, [*asked, "why?"])
    with pytest.raises(ConfigError, match="a question is empty"):
        model.ask(paths, ["what?", " "])


def test_images_are_files_images_or_pixels(model, shapes, monkeypatch):
    seen = []
    decoder = model._describer._decoder
    texts = decoder.texts

    def watch(params, batches, max_new):
        batches = list(batches)
        seen.extend(batch["frames"] for batch in batches)
        return texts(params, iter(batches), max_new)

    monkeypatch.setattr(decoder, "texts", watch)
    image = shapes / "00.png"
    same = [image, str(image), Image.open(image), decode_image(image)]
    assert len(set(model.caption(same))) == 1
    assert all(np.array_equal(row, seen[0][0]) for row in seen[0][1:4])
    seen.clear()
    clip = shapes / "00.gif"
    assert (
        len(
            set(model.caption([clip, decode_clip(clip, model.loaded.recipe.data["images"].frames)]))
        )
        == 1
    )
    assert len(seen) == 1
    assert seen[0].shape[1] == 8
    assert np.array_equal(seen[0][0], seen[0][1])


def test_an_image_is_turned_upright_as_its_file_is(model, shapes, tmp_path, monkeypatch):
    image = Image.open(shapes / "00.png").convert("RGB").crop((4, 0, 30, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    seen = []

    def watch(frames, view):
        seen.append(frames)
        return resize(frames, view)

    monkeypatch.setattr("vadapter.evaluate.describe.resize", watch)
    model.caption([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    assert seen[0].shape == (1, 26, 32, 3)
    np.testing.assert_array_equal(*seen)


def test_what_cannot_be_read_is_named(model, shapes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for media, words in (
        ([shapes / "00.png", tmp_path / "none.jpg"], r"none\.jpg: no such file"),
        (tmp_path / "broken.jpg", r"broken\.jpg: starts with"),
        ([shapes / "00.png", np.zeros((8, 8, 3), np.float32)], "image 1: raw frames must be u8"),
    ):
        with pytest.raises(DataError, match=words):
            model.caption(media)


def test_every_batch_asks_its_own_questions(model, shapes, monkeypatch):
    read = []
    decoder = model._describer._decoder
    decode = decoder._decode

    def watch(params, batch, **how):
        tokenizer = model.loaded.tokenizer
        read.append(tokenizer.decode(np.asarray(batch["tokens"])[0].tolist()))
        return decode(params, batch, **how)

    monkeypatch.setattr(decoder, "_decode", watch)
    model.ask([shapes / "00.png"] * 2, ["red?", "green?"], batch=1)
    assert ["red" in read[0], "green" in read[1], len(read)] == [True, True, 2]


def test_questions_of_about_the_same_length_share_a_program(model, shapes, monkeypatch):
    shapes_of = set()
    decoder = model._describer._decoder
    decode = decoder._decode

    def watch(params, batch, **how):
        shapes_of.add(batch["tokens"].shape)
        return decode(params, batch, **how)

    monkeypatch.setattr(decoder, "_decode", watch)
    for question in ("red?", "is it red?", "is it a red one?"):
        model.ask(shapes / "00.png", question)
    assert len(shapes_of) == 1


def test_parameters_may_be_split_over_devices(exported, model, shapes):
    split = VAdapter.from_pretrained(exported, mesh={"data": 2, "fsdp": 4})
    assert dict(split.loaded.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert split.caption(shapes / "00.png") == model.caption(shapes / "00.png")
    with pytest.raises(ConfigError, match=r"mesh\.fdsp: unknown key; did you mean 'fsdp'"):
        VAdapter.from_pretrained(exported, mesh={"fdsp": 4})


def test_a_place_without_an_export_is_explained(own, tmp_path):
    with pytest.raises(CheckpointError, match="no exported adapter in"):
        VAdapter.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not the record .* `vadapter export .*own DIR`"):
        VAdapter.from_pretrained(own)
    with pytest.raises(CheckpointError, match=r"There is no folder '\./adaptor'"):
        VAdapter.from_pretrained("./adaptor")


def test_importing_the_package_does_not_import_jax():
    script = (
        "import sys, vadapter\n"
        "assert not {'jax', 'numpy', 'flax', 'huggingface_hub'} & sys.modules.keys()\n"
        "print(vadapter.VAdapter.__module__, hasattr(vadapter, 'VAdaptor'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "vadapter.hub.api False\n"
