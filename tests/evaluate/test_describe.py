"""Captions and answers with a kept program are those of the traced one, bit for bit."""

import numpy as np
import pytest
from support.recipes import SIZE

from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.evaluate import runner
from vadapter.evaluate.describe import Describer
from vadapter.io import results
from vadapter.models import generate
from vadapter.stages import abstract_state, restore

QUESTION, LONG = "what colour is it?", "is it so that the ground of this image is black?" * 2


@pytest.fixture(params=["vadapter", pytest.param("perceiver", marks=pytest.mark.slow)])
def name(request):
    return request.param


@pytest.fixture
def opened(chain, name, monkeypatch):
    """A function that opens a stage of the run on one device, as a process of its own would."""
    import jax

    one = make_mesh(MeshConfig(), jax.devices()[:1])
    monkeypatch.setattr(restore, "make_mesh", lambda *_: one)
    return lambda: restore.open_run(chain / "run", name)


@pytest.fixture
def arrays(monkeypatch):
    """What programs return, all of it on the host."""
    seen, original = [], runner.Decoder._detokenize

    def detokenize(self, arrays, out):
        seen.append({key: np.asarray(value) for key, value in out.items()})
        return original(self, arrays, out)

    monkeypatch.setattr(runner.Decoder, "_detokenize", detokenize)
    return seen


@pytest.fixture
def folder(tmp_path):
    before = results.folder()
    yield tmp_path / "cache"
    results.keep_in(before)


def requests(shapes):
    """Arguments of `Describer.replies`, of every shape that a user may ask for."""
    image, other, clip = (shapes / file for file in ("02.png", "05.png", "02.gif"))
    frames = np.random.default_rng(0).integers(0, 255, (3, SIZE, SIZE, 3), np.uint8)
    return [
        (([image, other, shapes / "none.png", clip],), {}),
        (([frames], [LONG]), {}),
        (([other] * 3, [QUESTION] * 3), {"batch": 2, "max_new": 3}),
    ]


def answers(loaded, shapes):
    describer = Describer(loaded)
    return [list(describer.replies(*args, **how)) for args, how in requests(shapes)]


def texts(replies):
    return [[(reply.text, reply.error) for reply in each] for each in replies]


def test_images_clips_questions_and_batches_get_the_same_bits(
    opened, chain, arrays, folder, monkeypatch
):
    results.keep_in(None)
    plain = texts(answers(opened(), chain / "shapes"))
    expected, arrays[:] = list(arrays), []
    results.keep_in(folder)
    assert texts(answers(opened(), chain / "shapes")) == plain
    made, arrays[:] = list(arrays), []

    def forbidden(*_, **__):
        raise AssertionError("traced again")

    monkeypatch.setattr(generate, "decode", forbidden)
    monkeypatch.setattr(abstract_state.Initializer, "__init__", forbidden)
    assert texts(answers(opened(), chain / "shapes")) == plain
    assert len(expected) == len(made) == len(arrays) == 5
    for one, other, kept in zip(expected, made, arrays, strict=True):
        assert one.keys() == other.keys() == kept.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)
            np.testing.assert_array_equal(one[key], kept[key], err_msg=key)


def test_other_parameters_use_the_same_program_and_get_their_own_answer(
    opened, chain, arrays, folder, monkeypatch
):
    image = [chain / "shapes" / "02.png"]
    results.keep_in(folder)
    list(Describer(opened()).replies(image))

    def scaled(loaded):
        loaded.params["llm"] = {
            key: {k: 0.5 * v for k, v in tree.items()} if key == "embedding" else tree
            for key, tree in loaded.params["llm"].items()
        }
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(generate, "decode", None)  # would be traced
        list(Describer(scaled(opened())).replies(image))
    results.keep_in(None)
    list(Describer(scaled(opened())).replies(image))
    before, kept, plain = (each["logprob"] for each in arrays)
    assert kept != before
    np.testing.assert_array_equal(kept, plain)
