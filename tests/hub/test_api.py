"""The public Python API: captions and answers from an exported adapter."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from support.patches import wrap_generate
from support.paths import ROOT

import vadapter
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


def test_a_list_gives_a_list_and_an_image_a_string(model, shapes):
    paths = [str(shapes / name) for name in ("00.png", "05.png", "00.gif")]
    each = [model.caption(path) for path in paths]
    assert all(isinstance(text, str) for text in each)
    assert model.caption(paths) == each
    assert model.caption(paths, batch=2) == each
    assert model.caption(paths[:1]) == each[:1]
    assert model.caption([]) == []


def test_a_single_question_or_image_is_combined_with_each_of_the_other_list(model, shapes):
    paths = [shapes / "00.png", shapes / "05.png"]
    asked = ["what colour is it?", "is the ground black, or is it white, or something else?"]
    one = {(p, q): model.ask(p, q) for p in paths for q in asked}
    assert all(isinstance(text, str) for text in one.values())
    assert model.ask(paths, asked[0]) == [one[paths[0], asked[0]], one[paths[1], asked[0]]]
    assert model.ask(paths[0], asked) == [one[paths[0], asked[0]], one[paths[0], asked[1]]]
    assert model.ask(paths, asked) == [one[paths[0], asked[0]], one[paths[1], asked[1]]]
    with pytest.raises(ConfigError, match="got 2 images but 3 questions"):
        model.ask(paths, [*asked, "why?"])
    with pytest.raises(ConfigError, match="the question is empty"):
        model.ask(paths, ["what?", " "])


@pytest.fixture
def batches(monkeypatch):
    """The batches that are decoded from now on."""
    decoded = []

    def recording(generate, decoder, params, batches, *args, **kwargs):
        batches = list(batches)
        decoded.extend(batches)
        return generate(decoder, params, iter(batches), *args, **kwargs)

    wrap_generate(monkeypatch, recording)
    return decoded


def test_images_are_files_pil_images_or_pixels(model, shapes, batches):
    image = shapes / "00.png"
    same = [image, str(image), Image.open(image), decode_image(image)]
    assert len(set(model.caption(same))) == 1
    (batch,) = batches
    assert all(np.array_equal(row, batch["frames"][0]) for row in batch["frames"][1:4])
    batches.clear()
    clip = shapes / "00.gif"
    pixels = decode_clip(clip, model.loaded.recipe.data["images"].frames)
    assert len(set(model.caption([clip, pixels]))) == 1
    (batch,) = batches
    assert batch["frames"].shape[1] == 8
    assert np.array_equal(batch["frames"][0], batch["frames"][1])


def test_pil_images_are_rotated_by_their_exif_as_files_are(model, shapes, tmp_path, batches):
    image = Image.open(shapes / "00.png").convert("RGB").crop((4, 0, 30, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    image.save(tmp_path / "turned.png", exif=exif)
    model.caption([tmp_path / "turned.png", Image.open(tmp_path / "turned.png")])
    upright = np.asarray(image.transpose(Image.Transpose.ROTATE_270))[None]
    assert upright.shape == (1, 26, 32, 3)
    expected = resize(upright, model.loaded.view)
    for frames in batches[0]["frames"][:2]:
        np.testing.assert_array_equal(frames, expected)


def test_unreadable_images_are_named(model, shapes, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    for media, words in (
        ([shapes / "00.png", tmp_path / "none.jpg"], r"none\.jpg: no such file"),
        (tmp_path / "broken.jpg", r"broken\.jpg: not an image"),
        ([shapes / "00.png", np.zeros((8, 8, 3), np.float32)], "image 1: raw frames must be u8"),
    ):
        with pytest.raises(DataError, match=words):
            model.caption(media)


def test_every_batch_has_its_own_questions(model, shapes, batches):
    model.ask([shapes / "00.png"] * 2, ["red?", "green?"], batch=1)
    decode = model.loaded.tokenizer.decode
    texts = [decode(np.asarray(batch["tokens"])[0].tolist()) for batch in batches]
    assert ["red" in texts[0], "green" in texts[1], len(texts)] == [True, True, 2]


def test_questions_of_similar_length_share_a_program(model, shapes, batches):
    for question in ("red?", "is it red?", "is it a red one?"):
        model.ask(shapes / "00.png", question)
    assert len({batch["tokens"].shape for batch in batches}) == 1


def test_parameters_can_be_sharded(exported, model, shapes):
    split = VAdapter.from_pretrained(exported, mesh={"data": 2, "fsdp": 4})
    assert dict(split.loaded.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    assert split.caption(shapes / "00.png") == model.caption(shapes / "00.png")
    with pytest.raises(ConfigError, match=r"mesh\.fdsp: unknown key; did you mean 'fsdp'"):
        VAdapter.from_pretrained(exported, mesh={"fdsp": 4})


def test_a_path_without_an_export_is_explained(own, tmp_path):
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
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
    assert vadapter.VAdapter.__module__ == "vadapter.hub.api"
    assert not hasattr(vadapter, "VAdaptor")
