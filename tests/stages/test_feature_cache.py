"""Cached visual tokens: training is the same, and a cache is never incomplete."""

import contextlib
import dataclasses
import functools
import json
import pickle
import re
import resource
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from support import tiny
from support.recipes import SIZE, draw, tiny_recipe

from vadapter import console
from vadapter.config import digest
from vadapter.data import features as files
from vadapter.data.batch import check_batch
from vadapter.data.blank import BlankSource
from vadapter.data.config import DataConfig
from vadapter.data.media.images import ImageTransform
from vadapter.data.open import make_source, make_stream, train_tokenizer
from vadapter.data.pipeline import eval_batches, make_loader
from vadapter.distributed.mesh import MeshConfig, make_mesh
from vadapter.distributed.preemption import Stop
from vadapter.errors import ConfigError, DataError, Preempted
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.registry import make_module
from vadapter.recipe.schema import TokenizerConfig, read
from vadapter.stages import feature_cache
from vadapter.stages.feature_cache import encoded
from vadapter.stages.steps import CaptionObjective


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def recipe(shapes):
    return read(tiny_recipe(shapes))


@pytest.fixture(scope="module")
def images(recipe):
    return make_source("images", recipe.data["images"])


@pytest.fixture(scope="module")
def encoder(recipe):
    module = make_module("encoder", recipe.components["encoder"])
    return module, tiny.init(module, jnp.zeros((1, 1, SIZE, SIZE, 3)))


class Encoder:
    """An encoder that asks for images of another view than its module does."""

    def __init__(self, module, view):
        self.config, self.dtype, self.apply, self.view = (
            module.config,
            module.dtype,
            module.apply,
            view,
        )


class Clips:
    """The images of a source, as clips."""

    kind = "clip"

    def __init__(self, source):
        self.fingerprint, self._count = source.fingerprint, len(source)

    def __len__(self):
        return self._count


@pytest.fixture
def cache(encoder, tmp_path):
    """`encoded` of a source on one device; options change the data set or the arguments."""
    module, params = encoder

    def encode(
        source, *, folder=tmp_path, encoder=module, view=None, flip=False, stored="bfloat16",
        frames=1, blank=False, decode="exact", **more,
    ):  # fmt: skip
        config = DataConfig(
            {}, "caption", 16, cache_dir=str(folder), flip=flip, frames=frames, cache_dtype=stored,
            blank=blank, decode=decode,
        )  # fmt: skip
        arguments = {"params": params, "digest": "d" * 64, "batch": 16} | more
        arguments.setdefault("mesh", make_mesh(MeshConfig(), jax.devices()[:1]))
        return encoded(
            source, config, tmp_path, encoder=Encoder(encoder, view or encoder.view), **arguments
        )

    return encode


@pytest.fixture
def small_shards(monkeypatch):
    """Eight examples a file: three of them for the 24 images."""
    monkeypatch.setattr(files, "SHARD_BYTES", 1)
    monkeypatch.setattr(files, "ROUND", 8)


def refuse(batches):
    """Fail: no token may be computed."""
    pytest.fail("computed")


def pixels(source, index, flip=False):
    """u8[M,1,S,S,3]."""
    return feature_cache._pixels(source[index], view=ImageTransform(SIZE), frames=1, flip=flip)[
        "frames"
    ]


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
@pytest.mark.parametrize("flip", [False, True])
def test_each_example_has_its_own_tokens_and_those_of_its_mirror_image(
    cache, encoder, images, flip, stored, small_shards
):
    module, params = encoder
    made = cache(images, flip=flip, stored=stored)
    assert (len(made), made.kind, made.fingerprint()) == (24, "image", images.fingerprint())
    for index in (0, 7, 8, 23):  # of all three files
        views = pixels(images, index, flip)
        if flip:
            np.testing.assert_array_equal(views[1], views[0][:, :, ::-1])
        tokens = np.asarray(module.apply({"params": params}, views))
        error = {"bfloat16": np.abs(tokens) * 2**-8}
        error["int8"] = error["bfloat16"] + np.abs(tokens).max(-1, keepdims=True) / 254
        stored_tokens = made[index].media.tokens
        assert stored_tokens.dtype == ml_dtypes.bfloat16
        assert stored_tokens.shape == tokens.shape
        assert (np.abs(stored_tokens.astype(np.float32) - tokens) <= error[stored] + 1e-5).all()
        assert made[index].captions == images[index].captions
    if flip:
        assert not np.array_equal(made[0].media.tokens[0], made[0].media.tokens[1])


def test_blank_images_are_encoded_once_for_all_examples_and_data_sets(
    cache, encoder, images, recipe, small_shards
):
    module, params = encoder
    held = make_source("held", recipe.data["held"])
    made = cache(BlankSource(images), blank=True)
    gray = np.full((1, 1, SIZE, SIZE, 3), 127, np.uint8)
    tokens = np.asarray(module.apply({"params": params}, gray))
    assert len(made) == len(images)
    for index in (0, 7, 23):
        np.testing.assert_allclose(
            made[index].media.tokens.astype(np.float32), tokens, rtol=2**-7, atol=1e-5
        )
        assert made[index].captions == images[index].captions
    same = cache(BlankSource(held), blank=True, watch=refuse)
    assert (same.cache.folder, same.cache.count) == (made.cache.folder, 1)
    assert same[len(held) - 1].captions == held[len(held) - 1].captions


def test_the_loss_on_cached_tokens_is_that_on_images(cache, encoder, images, recipe, tmp_path):
    config = recipe.data["images"]
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("images",)), {"images": images}, tmp_path / "t.json"
    )
    lm = dataclasses.replace(tiny.TLM, vocab_size=300, depth=1, max_len=160)
    front = make_module("front", {"kind": "mlp", "hidden_dim": 16, "width": 16})
    module, params = encoder
    lm, lm_params = tiny.lm(lm)
    model = AdapterModel({"encoder": module, "front": front, "lm": lm}, "lm", ("front",), "encoder")
    tokens = jnp.zeros(cache(images)[0].media.tokens.shape)
    params = {"encoder": params, "front": tiny.init(front, tokens), "lm": lm_params}
    objective = CaptionObjective(model)

    @jax.jit
    def loss(params, batch):
        visual = objective.prepare(params, batch)
        return objective.loss(params, visual, batch, batch["weights"].sum(), None)[0]

    losses = []
    for source in (images, cache(images), cache(images, stored="int8")):
        items, transform = make_stream("images", config, source, tokenizer, ImageTransform(SIZE))
        stream = {"images": (items, transform, 1.0)}
        batch = next(make_loader(stream, global_batch=8, seed=3))
        assert ("features" in batch) == (source is not images)
        check_batch(batch, 300)
        losses.append(float(loss(params, batch)))
    print("losses", losses)
    assert abs(losses[0] - losses[1]) < 1e-3
    assert abs(losses[0] - losses[2]) < 1e-3
    other = {**batch, "features": np.roll(batch["features"], 1, axis=0)}
    assert abs(float(loss(params, other)) - losses[2]) > 1e-3  # the images do matter


def test_cached_tokens_are_not_computed_again(cache, images):
    first = cache(images)
    assert np.array_equal(cache(images, watch=refuse)[3].media.tokens, first[3].media.tokens)


def test_several_devices_compute_the_same_tokens(cache, images, small_shards, tmp_path):
    one = cache(images, flip=True)
    many = cache(images, flip=True, folder=tmp_path / "8", mesh=make_mesh(MeshConfig()))
    assert len(jax.devices()) == 8
    for index in range(24):
        np.testing.assert_allclose(
            one[index].media.tokens.astype(np.float32),
            many[index].media.tokens.astype(np.float32),
            rtol=0.01,
        )


def test_of_two_runs_that_need_the_same_tokens_one_computes_them(cache, images):
    calls, made = [], []

    def watch(batches):
        calls.append(1)
        return batches

    def run():
        made.append(cache(images, watch=watch))

    threads = [threading.Thread(target=run) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(made[0][3].media.tokens, made[1][3].media.tokens)
    assert len(calls) == 1


def test_another_encoder_or_preprocessing_is_another_cache(
    cache, encoder, images, recipe, tmp_path
):
    module, _ = encoder
    held = make_source("held", recipe.data["held"])
    deeper = type(module)(dataclasses.replace(module.config, depth=2))
    changes = [
        {"digest": "e" * 64},
        {"view": ImageTransform(SIZE, fit="stretch")},
        {"view": ImageTransform(SIZE, interpolation="bilinear")},
        {"view": ImageTransform(SIZE, crop_pct=0.875)},
        {"view": ImageTransform(SIZE, floor=True)},
        {"decode": "fast"},
        {"flip": True},
        {"source": Clips(images), "frames": 2},
        {"stored": "int8"},
        {"source": held},
        {"source": BlankSource(images), "blank": True},
        {"encoder": type(module)(module.config, dtype=jnp.bfloat16)},
        {"encoder": deeper, "params": tiny.init(deeper, jnp.zeros((1, 1, SIZE, SIZE, 3)))},
    ]
    folders = []

    def stop(batches):
        raise KeyboardInterrupt

    for number, change in enumerate(({}, *changes, {})):
        place = tmp_path / str(number)
        with pytest.raises(KeyboardInterrupt):  # its key is written first
            cache(**{"source": images, "folder": place, "watch": stop, **change})
        folders.extend(place.iterdir())
    assert len(folders) == len(changes) + 2
    assert folders[0].name == folders[-1].name
    assert len({folder.name for folder in folders}) == len(changes) + 1
    keys = [json.loads((folder / "key.json").read_text()) for folder in folders]
    assert [digest(key)[:16] for key in keys] == [folder.name for folder in folders]
    # Caches of exact images have the names that earlier versions gave them.
    assert keys[0]["view"].keys() == {"size", "fit", "interpolation", "crop_pct", "floor"}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def complete(shards):
    return [".lock", *(f"{shard:05d}.array_record" for shard in shards), "key.json"]


@pytest.mark.parametrize("flip", [False, True])
def test_an_interrupted_computation_resumes_after_the_last_complete_file(
    cache, images, tmp_path, small_shards, flip, capsys
):
    stop, batch = Stop(), 4 * (1 + flip)

    def stopping(batches):
        for i, batch in enumerate(stop.watch(batches, "stage", "features")):
            yield batch
            stop.signal = 15 * (i == 3)  # of six batches of four

    with pytest.raises(Preempted, match="stage, features: stopped by SIGTERM"):
        cache(images, watch=stopping, batch=batch, flip=flip)
    (folder,) = tmp_path.iterdir()
    assert names(folder) == complete([0])
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    capsys.readouterr()

    made = cache(images, batch=batch, flip=flip)
    assert "feature cache: 16 of 24 examples" in capsys.readouterr().out
    assert names(folder) == complete(range(3))
    assert before.items() <= {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}.items()
    whole = cache(images, batch=batch, flip=flip, folder=tmp_path / "whole").cache
    for shard in whole.shards:
        assert whole.path(shard).read_bytes() == made.cache.path(shard).read_bytes()


@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_an_unreadable_image_becomes_an_unusable_row_and_the_others_stay(cache, tmp_path, stored):
    folder = draw(tmp_path / "shapes")
    data = read(tiny_recipe(folder)).data["images"]
    (folder / "01.png").write_bytes(b"not an image")
    source = make_source("images", data)
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("p",)), {"p": source}, tmp_path / "t.json"
    )
    made = cache(source, stored=stored)
    items, transform = make_stream("images", data, made, tokenizer, ImageTransform(SIZE))
    batch = next(iter(eval_batches(items, transform, 24)))
    assert batch["bad"].tolist() == [i == 1 for i in range(24)]
    assert batch["weights"].sum(1).astype(bool).tolist() == [i != 1 for i in range(24)]
    assert np.isfinite(batch["features"]).all()
    assert batch["features"].any((1, 2, 3)).tolist() == [i != 1 for i in range(24)]
    assert list(source.texts())


def test_tokens_that_are_not_finite_are_an_error(cache, encoder, images, tmp_path):
    broken = jax.tree.map(lambda x: np.nan * x, encoder[1])
    with pytest.raises(DataError, match="tokens are not finite"):
        cache(images, params=broken)
    assert not list(tmp_path.rglob("*.array_record"))


@pytest.mark.parametrize(("stored", "size"), [("bfloat16", 24 * 16 * 32), ("int8", 24 * 16 * 20)])
def test_the_size_is_printed_and_checked_before_anything_is_computed(
    cache, images, monkeypatch, capsys, small_shards, stored, size
):
    free = types.SimpleNamespace(free=size + 3 * files.SLACK_BYTES - 1)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ConfigError, match=f"need {size:,} bytes .* and .* are free. Free "):
        cache(images, stored=stored, watch=refuse)
    free.free += 1
    made = cache(images, stored=stored)
    line = f"24 of 24 examples, 16 tokens × 16 {stored} each, {console.size(size)} in 3 files in "
    assert line in capsys.readouterr().out
    records = sum(len(record) for i in range(24) for record in [made._records[i]])
    assert records == size
    assert size < sum(p.stat().st_size for p in made.cache.folder.iterdir()) <= free.free


@contextlib.contextmanager
def largest_file(size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_no_half_file(cache, images, small_shards):
    with (
        largest_file(50_000),
        pytest.raises(ConfigError, match=r"00000.part: .*File too large.* complete shards are kep"),
    ):
        cache(images)
    made = cache(images)
    assert names(made.cache.folder) == complete(range(3))


def flipped(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_names_the_file_and_that_file_alone_is_computed_again(
    cache, images, small_shards, recipe, tmp_path
):
    made = cache(images)
    path, wanted = made.cache.path(1), made.cache.path(1).read_bytes()
    record = made._records[10]
    flipped(path, wanted.index(record) + 100)
    again = cache(images)  # the ends of the files are whole
    assert np.array_equal(again[9].media.tokens, made[9].media.tokens)
    named = rf"{re.escape(str(path))}: record 2: .*hash mismatch.*Delete it and rerun"
    with pytest.raises(DataError, match=named):
        again[10]
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("p",)), {"p": images}, tmp_path / "t.json"
    )
    config = recipe.data["images"]
    stream = {"p": (*make_stream("images", config, again, tokenizer, ImageTransform(SIZE)), 1.0)}
    with pytest.raises(DataError, match=named):  # an epoch
        list(make_loader(stream, global_batch=8, seed=3, num_steps=3))
    path.unlink()
    others = {p: p.stat().st_mtime_ns for p in made.cache.folder.glob("*.array_record")}
    cache(images)
    assert path.read_bytes() == wanted
    assert others == {p: p.stat().st_mtime_ns for p in others}


def test_bits_flipped_anywhere_are_found_or_change_nothing(cache, images, small_shards):
    made = cache(images)
    path = made.cache.path(2)
    data, tokens = path.read_bytes(), [made[i].media.tokens for i in range(16, 24)]
    found, rng = 0, np.random.default_rng(0)
    seal = data.index(made.cache.key.encode())
    for at in (*rng.integers(0, len(data), 100), *rng.integers(0, 6000, 100), seal):
        flipped(path, at)
        try:
            source = files.FeatureSource(images, made.cache)
            for index, wanted in enumerate(tokens, 16):
                np.testing.assert_array_equal(source[index].media.tokens, wanted)
        except DataError as error:
            assert str(path) in str(error)  # noqa: PT017
            found += 1
        path.write_bytes(data)
    assert 60 < found < 201


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:70_000]), "truncated or corrupt"),
        (lambda p: p.write_bytes(b""), "truncated or corrupt"),
        (lambda p: p.write_text("<html>not found</html>"), "truncated or corrupt"),
        (lambda p: shutil.copy(p.with_name("00000.array_record"), p), "a shard of another cache"),
        (lambda p: p.unlink(), "is missing: the cached tokens are incomplete"),
    ],
)
def test_a_file_that_is_not_that_of_the_cache_is_named(cache, images, small_shards, change, named):
    made = cache(images).cache
    change(made.path(1))
    with pytest.raises(DataError, match=rf"{re.escape(str(made.path(1)))}.*{named}"):
        files.FeatureSource(images, made)


def test_the_files_of_another_encoder_are_refused(cache, images, small_shards):
    made, other = cache(images).cache, cache(images, digest="e" * 64).cache
    shutil.copy(other.path(0), made.path(0))
    with pytest.raises(DataError, match=f"a shard of another cache, .*{other.key}"):
        cache(images)


def test_files_hold_64_mib_or_more_and_are_never_many():
    made = functools.partial(files.Cache, files.Path("x"), "k", stored="bfloat16")
    paper = made(count=1_000_000, shape=(1, 8, 256, 1024))
    assert 200 < len(paper.shards) <= files.MAX_SHARDS
    small = made(count=6000, shape=(2, 1, 49, 1280))
    assert small.rows % files.ROUND == 0
    fewer, size = small.rows - files.ROUND, small.record_bytes
    assert fewer * size < 64 << 20 <= small.rows * size
    spans = [i for shard in small.shards for i in small.span(shard)]
    assert spans == list(range(6000))


def test_a_worker_reads_the_same_tokens(cache, images, recipe, tmp_path, small_shards):
    made = cache(images)
    sent = pickle.dumps(made)
    assert len(sent) < 24 * made.cache.record_bytes  # the tokens stay on disk
    assert np.array_equal(pickle.loads(sent)[5].media.tokens, made[5].media.tokens)
    tokenizer = train_tokenizer(
        TokenizerConfig(300, data=("p",)), {"p": images}, tmp_path / "t.json"
    )
    items = make_stream("images", recipe.data["images"], made, tokenizer, ImageTransform(SIZE))
    load = functools.partial(make_loader, {"p": (*items, 1.0)}, global_batch=8, seed=3, num_steps=4)
    for here, there in zip(load(threads=4), load(workers=1, threads=2), strict=True):
        assert here["features"].dtype == there["features"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(here["features"], there["features"])
