"""The prompts of a benchmark: instruction, examples with or without images, question.

The tokenizer of the model knows lower-case letters only.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.small_benchmarks import write_benchmarks

from vadapter.data.benchmarks.source import open_benchmark
from vadapter.data.items import items_of
from vadapter.data.media.frames import load_media
from vadapter.data.media.images import resize
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.few_shot import build_prompts
from vadapter.evaluate.protocols import PROTOCOLS, resolve
from vadapter.evaluate.runner import Decoder, predict
from vadapter.models.generate import Decode
from vadapter.stages.restore import open_run


@pytest.fixture(scope="module")
def data(chain, tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("official"), chain / "shapes")


@pytest.fixture(scope="module")
def loaded(chain):
    return open_run(chain / "run", "vadapter")


@pytest.fixture
def prompts(loaded, data):
    """(prompts of a benchmark with some fields of its protocol overridden, its items)."""

    def call(name, *overrides):
        protocol = resolve(PROTOCOLS["paper"], name, ["decode.max_new=4", *overrides])
        items = items_of(open_benchmark(name, data / name, protocol.split), protocol.task)
        return build_prompts(loaded, protocol, data / name, "image", items), items

    return call


def reads(loaded, prompts, item):
    """The row of an item as text, its image as <>."""
    row = prompts.row(item, rng=None)
    words = lambda ids: loaded.tokenizer.decode([int(t) for t in ids if t])  # noqa: E731
    return f"{words(row['prompt'])}<>{words(row['tokens'][row['segments'] > 0])}"


FIRST = r"answer the question given the images\. given"
ASKED = r"\. question: what is 262148000\? answer:"
EXAMPLE = r" question: what is (900\d)\? answer: net given"


def test_caption_prompts_have_no_examples(loaded, prompts):
    built, items = prompts("flickr8k")
    assert reads(loaded, built, items[0]) == "describe the following:<> :"
    assert (built.examples, built.shown, built.frames) == ((), None, 1)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_k_text_only_examples_precede_the_image(loaded, prompts, k):
    built, items = prompts("okvqa", f"shots={k}")
    found = re.fullmatch(f"{FIRST}{k * EXAMPLE}<>{ASKED}", reads(loaded, built, items[0]))
    assert found
    assert len(set(found.groups())) == k
    assert len(built.examples) == k
    assert built.shown is None


def test_only_another_seed_draws_other_examples(prompts):
    draw = lambda seed: prompts("okvqa", "shots=1", f"shot_seed={seed}")[0].examples  # noqa: E731
    drawn = [draw(seed) for seed in range(6)]
    assert len(set(drawn)) == 2
    other = next(seed for seed in range(6) if drawn[seed] != drawn[0])
    assert [draw(0), draw(other)] == [drawn[0], drawn[other]]


@pytest.mark.parametrize("name", ["okvqa", "flickr8k"])
def test_k_image_examples_follow_their_images(loaded, prompts, data, name):
    built, items = prompts(name, "shots=2", "shot_kind=image", "decode.max_new=2")
    plain, _ = prompts(name, "shots=0")
    assert reads(loaded, built, items[0]) == reads(loaded, plain, items[0])
    training = open_benchmark(name, data / name, "train")
    if name == "okvqa":
        behind = {f". Question: {q.text} Answer: net Given": 0 for q in training.text_only(0).qa}
    else:
        captions = [training.text_only(i).captions[0] for i in range(len(training))]
        behind = {f" : {text} Describe the following:": i for i, text in enumerate(captions)}
    assert len(set(built.examples)) == 2

    model, expected = loaded.adapter_model, []
    see = jax.jit(lambda p, pixels: model.prefix(p, model.encode(p, {"frames": pixels}))[0])
    llm = model.modules[model.lm]
    for text in built.examples:
        media = training[behind[text]].media
        assert media is not None
        pixels = resize(load_media(media, frames=1), loaded.view)
        expected.append(see(loaded.params, pixels[None]))
        ids = jnp.asarray(loaded.tokenizer.encode(text))
        expected.append(llm.apply({"params": loaded.params[model.lm]}, ids, method="embed"))
    np.testing.assert_allclose(built.shown[0], np.concatenate(expected), rtol=1e-5, atol=1e-5)


def test_examples_and_beams_change_the_generations(loaded, prompts):
    """An image example is used, not only counted."""
    built, items = prompts("flickr8k", "shots=1", "shot_kind=image")
    decoder = Decoder(loaded)

    def generations(shown, how):
        return predict(decoder, loaded.params, items, built.row, batch=16, how=how, shown=shown)

    plain = generations(None, Decode(8))
    shots = (
        prompts("flickr8k", "shots=1", "shot_kind=image", f"shot_seed={n}")[0]
        for n in reversed(range(6))
    )
    assert any(generations(shot.shown, Decode(8)) != plain for shot in shots)
    assert generations(None, Decode(8, beams=3)) != plain


def test_an_unreadable_image_of_an_example_is_named(prompts, data):
    path = data / "okvqa/train2014/COCO_train2014_000000000009.jpg"
    kept = path.read_bytes()
    path.write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"^9, an example in the prompt: unusable .*shot_seed"):
        prompts("okvqa", "shots=1", "shot_kind=image")
    path.write_bytes(kept)


def test_a_prompt_that_does_not_fit_is_refused_with_the_number_of_examples_that_do(prompts):
    with pytest.raises(ConfigError, match=r"1 of 2 examples fit: --config\.protocol\.shots=1"):
        prompts("okvqa", "shots=2", "decode.max_new=90")
    prompts("okvqa", "shots=1", "decode.max_new=90")
    with pytest.raises(ConfigError, match=r"lower --config\.protocol\.decode\.max_new"):
        prompts("flickr8k", "decode.max_new=400")
