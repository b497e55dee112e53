"""Evaluations reproduce the scores of training; the ablation shows whether images are used."""

import dataclasses
import functools
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import tiny
from support.patches import with_recipe
from support.sources import ListSource

from vadapter.config import differences, digest
from vadapter.data.config import DataConfig
from vadapter.data.example import Example, Source
from vadapter.data.items import Questions, Slice
from vadapter.data.media.images import ImageTransform
from vadapter.data.scenes.source import ScenesSource
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.errors import ConfigError
from vadapter.evaluate.image_ablation import image_ablation_scores, make_image_ablation
from vadapter.evaluate.recipe_evals import choose, run_eval
from vadapter.evaluate.runner import Decoder, evaluate, record_of
from vadapter.metrics.scoring import Result
from vadapter.models import layered
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.restore import open_run


@pytest.fixture(scope="module")
def run(chain, tmp_path_factory):
    target = tmp_path_factory.mktemp("runner") / "run"
    return shutil.copytree(chain / "run", target)


@pytest.fixture(scope="module")
def loaded(run):
    return open_run(run, "vadapter")


@pytest.fixture(scope="module")
def decoder(loaded):
    return Decoder(loaded)


CAPTIONS = DataConfig(source={}, task="caption", text_len=1, size=32)
EIGHT = EvalConfig("", max_new=12, batch=8)


class Captioned(ListSource):
    """A source of images with the same caption."""

    def __init__(self, media):
        super().__init__(Example(str(i), m, ("a bar",)) for i, m in enumerate(media))


class Pairs(Source):
    """Examples of two, one and no questions."""

    kind = "image"
    asked = ((("a?", "1", "x"), ("b?", "2", "y")), (("c?", "3", "x"),), ())

    def __len__(self):
        return len(self.asked)

    def __getitem__(self, index):
        return Example(str(index), None, (), self.asked[index])


def test_questions_are_items_of_their_own_up_to_the_limit():
    items = Questions(Pairs())
    assert [(e.id, q) for e, (q, *_) in (items[i] for i in range(len(items)))] == [
        ("0", "a?"),
        ("0", "b?"),
        ("1", "c?"),
    ]
    assert items.text_only(2)[1] == ("c?", "3", "x")
    assert [len(Questions(Pairs(), limit)) for limit in (0, 1, 2, 9)] == [3, 1, 2, 3]
    assert [len(Slice(Pairs(), 0, limit)) for limit in (1, 9)] == [1, 3]


def test_an_evaluation_reproduces_the_scores_of_training(run, decoder):
    before = run / "vadapter" / "eval" / "captions"
    rows = [json.loads(line) for line in (before / "predictions.jsonl").read_text().splitlines()]
    scores = json.loads((before / "score.json").read_text())["scores"]
    result, directory = run_eval(decoder, "captions")
    assert directory == before
    assert [row["prediction"] for row in result.rows] == [row["prediction"] for row in rows]
    assert result.scores == pytest.approx(scores)
    assert result.scores["n"] == len(rows) == 12
    assert scores["cider"] > 0.05  # it is trained: equal zeros would prove little
    assert json.loads((before / "score.json").read_text())["scores"] == pytest.approx(scores)


def test_the_limit_and_the_batch_size_change_no_generation(run, decoder):
    whole = (run / "vadapter" / "eval" / "captions" / "predictions.jsonl").read_text()
    result, directory = run_eval(decoder, "captions", limit=5, batch=3)  # on eight devices
    assert directory.name == "captions-first-5"
    full = [json.loads(line)["prediction"] for line in whole.splitlines()]
    assert [row["prediction"] for row in result.rows] == full[:5]
    assert (run / "vadapter" / "eval" / "captions" / "predictions.jsonl").read_text() == whole
    assert json.loads((directory / "score.json").read_text())["eval"]["limit"] == 5


def test_a_result_has_the_protocol_that_says_what_it_can_be_compared_with(run, decoder):
    saved = lambda folder: json.loads((folder / "score.json").read_text())  # noqa: E731
    folders = {stage: run / stage / "eval" for stage in ("vadapter", "perceiver")}
    trained = {stage: saved(folder / "captions") for stage, folder in folders.items()}
    asked = saved(folders["vadapter"] / "answers")
    assert len({record["protocol_digest"] for record in trained.values()}) == 1
    protocol = trained["vadapter"]["protocol"]
    assert trained["vadapter"]["protocol_digest"] == digest(protocol)
    assert protocol["items"] == 12
    assert protocol["metric"] == "cider"
    assert protocol["prompt"] == {"before": "Describe the following:", "after": " :"}
    assert protocol["decode"]["max_new"] == decoder.stage.recipe.evals["captions"].max_new
    assert "{question}" in asked["protocol"]["prompt"]["after"]
    assert asked["protocol"]["metric"] == "simple"

    again, folder = run_eval(decoder, "captions", batch=5)
    assert saved(folder)["protocol_digest"] == digest(protocol)  # the batch size changes nothing
    assert saved(folder)["intervals"] == {k: list(v) for k, v in again.intervals.items()}
    assert again.intervals.keys() == {"cider", "bleu4", "rouge_l"}
    _, folder = run_eval(decoder, "captions", limit=5)
    assert differences(protocol, saved(folder)["protocol"]) == [("items", 12, 5)]


def test_the_protocol_differs_with_the_data_the_decoding_and_the_task():
    scenes = functools.partial(ScenesSource, split="test", count=3)
    result = Result({}, [{}] * 3)
    same = record_of(scenes(), CAPTIONS, EIGHT, result)
    assert record_of(scenes(), CAPTIONS, EIGHT, result) == same
    others = (
        (scenes(seed=1), CAPTIONS, EIGHT),
        (scenes(), CAPTIONS, dataclasses.replace(EIGHT, beams=2)),
        (scenes(), dataclasses.replace(CAPTIONS, task="question"), EIGHT),
        (scenes(), dataclasses.replace(CAPTIONS, decode="fast"), EIGHT),
    )
    digests = [record_of(*other, result)["protocol_digest"] for other in others]
    assert len({same["protocol_digest"], *digests}) == 5
    assert "images" not in same["protocol"]  # as in records that earlier versions wrote


def test_an_unreadable_image_has_no_text_and_does_not_shift_the_others(decoder):
    shape = (1, 32, 32, 3)
    images = [np.full(shape, 40 * i, np.uint8) for i in range(4)]
    texts = []
    for media in (images, [*images[:2], b"junk", images[3]]):
        result = evaluate(
            decoder, decoder.stage.params, Captioned(media), CAPTIONS, EIGHT, ImageTransform(32)
        )
        texts.append([row["prediction"] for row in result.rows])
    assert all(texts[0])
    assert texts[1] == [*texts[0][:2], "", texts[0][3]]


class Narrow:
    """A tokenizer of fewer ids than the model has rows, which remembers what it decodes."""

    def __init__(self, tokenizer, vocab_size):
        self.tokenizer, self.vocab_size, self.seen = tokenizer, vocab_size, set()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def decode(self, ids):
        self.seen |= set(ids)
        return self.tokenizer.decode(ids)


def test_no_id_is_generated_that_the_tokenizer_lacks(loaded):
    image = np.full((1, 32, 32, 3), 90, np.uint8)
    source = Captioned([image, image])
    limit = loaded.tokenizer.vocab_size
    for _ in range(2):  # then without the highest id of the first text
        tokenizer = Narrow(loaded.tokenizer, limit)
        narrow = types.SimpleNamespace(
            adapter_model=loaded.adapter_model,
            tokenizer=tokenizer,
            mesh=loaded.mesh,
            facts=loaded.facts,
            config=loaded.config,
        )
        decoder = Decoder(narrow)
        evaluate(decoder, loaded.params, source, CAPTIONS, EIGHT, ImageTransform(32))
        assert max(tokenizer.seen) < limit
        limit = max(tokenizer.seen)


def test_an_evaluation_gives_the_same_with_its_layers_unrolled(loaded, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (5, 1, 32, 32, 3), np.uint8)
    spec, results, seen = dataclasses.replace(EIGHT, batch=2), [], []
    single = loaded.on(make_mesh(MeshConfig(), jax.devices()[:1]))
    params = jax.tree.map(np.asarray, loaded.params)
    params = jax.device_put(params, jax.devices()[0])
    for answer in (False, True):

        def pays(params, tokens, answer=answer):
            seen.append(tokens)
            return answer

        monkeypatch.setattr(layered, "pays", pays)
        view = ImageTransform(32)
        result = evaluate(Decoder(single), params, Captioned(images), CAPTIONS, spec, view)
        results.append(result.rows)
    assert results[0] == results[1]
    assert len({row["prediction"] for row in results[0]}) > 1, "equal generations prove little"
    assert seen == [3 * spec.decode.max_new] * 2, "tokens of three batches, one after the other"


def test_evaluations_are_chosen_by_name(loaded, run):
    assert choose(loaded) == ["captions", "answers", "clips"]
    assert choose(loaded, "clips, answers") == ["clips", "answers"]
    assert set(choose(loaded, "all")) == {"captions", "answers", "clips"}
    with pytest.raises(ConfigError, match="--evals=clps: unknown; did you mean 'clips'"):
        choose(loaded, "clps")
    with pytest.raises(ConfigError, match=r"is text-only.* decoder, vadapter, perceiver"):
        choose(open_run(run, "tlm"))
    silent = dataclasses.replace(loaded.recipe, evals={}, stages=_without_evals(loaded.recipe))
    with pytest.raises(ConfigError, match="no evaluations"):
        choose(with_recipe(loaded, silent))


def _without_evals(recipe):
    return {n: dataclasses.replace(s, evals=()) for n, s in recipe.stages.items()}


@pytest.fixture(scope="module")
def ablation():
    """A tiny stage-2 model: (image ablation, params, a function from images to a batch)."""
    model = tiny.stage2()
    params = {k: tiny.filled(v, seed=i) for i, (k, v) in enumerate(tiny.boxed(model).items())}
    tokens = np.arange(3, 3 + tiny.B * 4, dtype=np.int32).reshape(tiny.B, 4) % tiny.V
    same = lambda row: np.broadcast_to(np.array(row), (tiny.B, len(row)))  # noqa: E731

    def batch(frames):
        return {
            "frames": jnp.asarray(frames),
            "prompt": jnp.ones((tiny.B, 1), jnp.int32),
            "tokens": jnp.asarray(tokens),
            "segments": jnp.ones_like(tokens),
            "positions": jnp.asarray(same([0, 1, 2, 3])),
            "target_at": jnp.asarray(same([0, 1, 2])),
            "targets": jnp.asarray(tokens[:, 1:]),
            "weights": jnp.asarray(same([1.0, 1.0, 0.0]).astype(np.float32)),
        }

    return jax.jit(make_image_ablation(model)), params, batch


def test_the_ablation_compares_right_wrong_and_mean_images(ablation):
    ablate, params, batch = ablation
    rng = np.random.default_rng(0)
    shape = (tiny.B, 1, tiny.IMAGE, tiny.IMAGE, 3)
    frames = rng.integers(0, 256, shape).astype(np.uint8)
    sums = jax.device_get(ablate(params, batch(frames)))
    assert sums["targets"] == 2 * tiny.B
    assert sums["right"] != pytest.approx(sums["wrong"], rel=1e-6)
    assert 0 <= sums["between"] <= sums["power"]

    # The wrong image of a row is that of the row before.
    rolled = jax.device_get(ablate(params, batch(np.roll(frames, 1, axis=0))))
    assert rolled["right"] == pytest.approx(float(sums["wrong"]), rel=1e-5)

    # Of equal images none is wrong, and nothing is specific to one of them.
    equal = jax.device_get(ablate(params, batch(np.broadcast_to(frames[:1], shape))))
    assert equal["wrong"] == pytest.approx(float(equal["right"]), rel=1e-5)
    assert equal["mean"] == pytest.approx(float(equal["right"]), rel=1e-5)
    assert equal["power"] < 1e-6 * sums["power"]


def test_ablation_scores_are_means_over_all_targets_of_all_batches():
    first = {"targets": 3.0, "right": 6.0, "wrong": 9.0, "mean": 7.5, "between": 1.0, "power": 4.0}
    second = {"targets": 1.0, "right": 6.0, "wrong": 3.0, "mean": 0.5, "between": 2.0, "power": 2.0}
    expected = {"loss": 3.0, "loss_wrong": 3.0, "loss_mean": 2.0, "query_share": 0.5}
    assert image_ablation_scores([first, second]) == expected
    assert image_ablation_scores([{"targets": 4.0, "right": 2.0}]) == {"loss": 0.5}
    assert image_ablation_scores([{"targets": 0.0, "right": 0.0}]) == {"loss": 0.0}
