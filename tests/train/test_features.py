"""Tokens of the frozen encoder, computed once: the same training, and never half a file."""

import dataclasses
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from recipes import SIZE, draw, tiny_recipe

from vadapter.data.images import View
from vadapter.data.pipeline import eval_batches, make_loader
from vadapter.errors import ConfigError, DataError, Preempted
from vadapter.models.vadapter import VAdapter
from vadapter.models.variants import make_module
from vadapter.parallel.mesh import MeshConfig, make_mesh
from vadapter.train import features
from vadapter.train.features import cached
from vadapter.train.inputs import make_source, make_stream, texts, train_tokenizer
from vadapter.train.interrupts import Stop
from vadapter.train.recipe import TokenizerConfig, read
from vadapter.train.steps import CaptionObjective


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    with runs.cached_programs():
        yield draw(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def recipe(shapes):
    return read(tiny_recipe(shapes))


@pytest.fixture(scope="module")
def pictures(recipe):
    return make_source("pictures", recipe.data["pictures"])


@pytest.fixture(scope="module")
def encoder(recipe):
    module = make_module("encoder", recipe.components["encoder"])
    return module, tiny.init(module, jnp.zeros((1, 1, SIZE, SIZE, 3)))


@pytest.fixture
def cache(encoder, tmp_path):
    """`cached` with everything but the source given."""
    module, params = encoder
    return functools.partial(
        cached, folder=tmp_path, encode=module, params=params, digest="d" * 64, view=View(SIZE),
        frames=1, flip=False, mesh=make_mesh(MeshConfig(), jax.devices()[:1]), batch=16,
    )  # fmt: skip


def pixels(source, index, flip=False):
    example = source[index]
    return features._pixels(example, view=View(SIZE), frames=1, flip=flip)["frames"]


@pytest.mark.parametrize("flip", [False, True])
def test_each_example_has_its_own_tokens_and_those_of_its_mirror_image(
    cache, encoder, pictures, flip
):
    module, params = encoder
    made = cache(pictures, flip=flip)
    assert (len(made), made.kind, made.fingerprint()) == (24, "image", pictures.fingerprint())
    for index in (0, 15, 16, 23):  # two batches, the second of eight
        views = [pixels(pictures, index, flip=f) for f in ((False, True) if flip else (False,))]
        tokens = np.asarray(module.apply({"params": params}, np.stack(views)))
        stored = made[index]
        assert stored.media.dtype == np.float16
        np.testing.assert_allclose(stored.media, tokens if flip else tokens[0], atol=5e-3)
        assert stored.captions == pictures[index].captions
    if flip:
        assert not np.array_equal(made[0].media[0], made[0].media[1])


def test_the_loss_on_cached_tokens_is_that_on_pictures(cache, encoder, pictures, recipe, tmp_path):
    config = recipe.data["pictures"]
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("pictures",)), {"pictures": pictures}, tmp_path / "t.json"
    )
    lm = dataclasses.replace(tiny.TLM, vocab_size=300, depth=1, max_len=160)
    front = make_module("front", {"kind": "mlp", "hidden_dim": 16, "width": 16})
    module, params = encoder
    lm, lm_params = tiny.lm(lm)
    model = VAdapter({"encoder": module, "front": front, "lm": lm}, "lm", ("front",), "encoder")
    tokens = jnp.zeros((1, *cache(pictures)[0].media.shape))
    params = {"encoder": params, "front": tiny.init(front, tokens), "lm": lm_params}
    objective = CaptionObjective(model)

    @jax.jit
    def loss(params, batch):
        visual = objective.prepare(params, batch)
        return objective.loss(params, visual, batch, batch["weights"].sum(), None)[0]

    losses = []
    for source in (pictures, cache(pictures)):
        items, transform = make_stream("pictures", config, source, tokenizer, View(SIZE))
        stream = {"pictures": (items, transform, 1.0)}
        batch = next(make_loader(stream, global_batch=8, seed=3))
        assert ("features" in batch) == (source is not pictures)
        losses.append(float(loss(params, batch)))
    assert abs(losses[0] - losses[1]) < 1e-3
    other = {**batch, "features": np.roll(batch["features"], 1, axis=0)}
    assert abs(float(loss(params, other)) - losses[1]) > 1e-3  # the pictures do matter


def test_what_is_there_is_not_computed_again(cache, pictures, monkeypatch):
    first = cache(pictures)
    monkeypatch.setattr(features, "_compute", lambda *_: pytest.fail("computed again"))
    assert np.array_equal(cache(pictures)[3].media, first[3].media)


def test_another_encoder_or_preprocessing_is_another_file(
    cache, encoder, pictures, recipe, tmp_path
):
    module, _ = encoder
    cache(pictures)
    changes = [
        {"digest": "e" * 64},
        {"view": View(SIZE, fit="stretch")},
        {"view": View(SIZE, interpolation="bilinear")},
        {"view": View(SIZE, crop_pct=0.875)},
        {"view": View(SIZE, floor=True)},
        {"flip": True},
        {"encode": type(module)(module.config, dtype=jnp.bfloat16)},
        {"encode": type(module)(dataclasses.replace(module.config, depth=2))},
    ]
    keys = []
    for change in changes:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "_compute", lambda _, path, *rest: path.write_bytes(EMPTY))
            keys.append(cache(pictures, **change).path.name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_compute", lambda _, path, *rest: path.write_bytes(EMPTY))
        held = make_source("held", recipe.data["held"])
        keys += [cache(held).path.name, cache(pictures).path.name]
    assert len(set(keys)) == len(changes) + 2
    assert {path.stem for path in tmp_path.glob("*.json")} == {key[:16] for key in keys}


EMPTY = b"\x93NUMPY\x01\x00v\x00{'descr': '<f2', 'fortran_order': False, 'shape': (1,), }"
EMPTY = EMPTY.ljust(127) + b"\n\x00\x00"


def test_a_computation_that_stops_midway_leaves_nothing_that_is_used(cache, pictures, tmp_path):
    stop = Stop()

    def stopping(batches):
        for i, batch in enumerate(stop.watch(batches, "stage", "features")):
            yield batch
            stop.signal = 15 * (i == 0)

    with pytest.raises(Preempted, match="stage, features: stopped by SIGTERM"):
        cache(pictures, watch=stopping)
    assert {path.suffix or path.name for path in tmp_path.iterdir()} == {".lock", ".part"}
    whole = cache(pictures)
    assert np.isfinite(whole[23].media).all()
    assert np.abs(whole[23].media).max() > 0.1
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".npy"]  # the lock


def test_a_picture_that_cannot_be_read_becomes_a_bad_row_and_the_others_stay(cache, tmp_path):
    folder = draw(tmp_path / "shapes")
    data = read(tiny_recipe(folder)).data["pictures"]
    (folder / "01.png").write_bytes(b"not a picture")
    source = make_source("pictures", data)
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("p",)), {"p": source}, tmp_path / "t.json"
    )
    items, transform = make_stream("pictures", data, cache(source), tokenizer, View(SIZE))
    batch = next(iter(eval_batches(items, transform, 24)))
    assert batch["bad"].tolist() == [i == 1 for i in range(24)]
    assert batch["weights"].sum(1).astype(bool).tolist() == [i != 1 for i in range(24)]
    assert np.isfinite(batch["features"]).all()
    assert list(texts(source))


def test_tokens_too_large_for_float16_are_an_error(cache, encoder, pictures, tmp_path):
    large = jax.tree.map(lambda x: 1e6 * x, encoder[1])
    with pytest.raises(DataError, match="tokens do not fit into float16; set cache=False"):
        cache(pictures, params=large)
    assert not list(tmp_path.glob("*.npy"))


def test_a_full_disk_is_told_before_anything_is_computed(cache, pictures, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match="No space left on device; the cached tokens need 0 MiB"):
        cache(pictures)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_worker_reads_the_same_tokens(cache, pictures):
    made = cache(pictures)
    sent = pickle.dumps(made)
    assert len(sent) < made.path.stat().st_size  # the tokens stay on disk
    assert np.array_equal(pickle.loads(sent)[5].media, made[5].media)
