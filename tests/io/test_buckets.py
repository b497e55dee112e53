"""Tars and tables in a bucket give the examples that they give on a disk."""

import pickle
import re

import pytest
from support import gcs
from support.image_files import contents, folder_of, image, row, tars, write_tar

from vadapter.data.shards import index
from vadapter.data.sources.parquet import ParquetImages
from vadapter.data.sources.table import ImageFolder
from vadapter.data.sources.tars import CaptionTars
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

FOLDER = "gs://bucket/pairs"


@pytest.fixture(scope="module")
def server():
    with gcs.local() as bucket:
        yield bucket


@pytest.fixture
def bucket(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server.objects.clear()
    return server


def pairs(folder):
    """Two shards with their texts in them."""
    folder.mkdir()
    for shard in range(2):
        files = {}
        for i in range(shard, 6, 2):
            files |= {f"{i}.png": image(i * 20), f"{i}.txt": b"number %d" % i}
        write_tar(folder / f"train-00{shard}.tar", files)
    return folder


@pytest.mark.parametrize("make", [tars, pairs])
@pytest.mark.parametrize("indexed", [False, True])
def test_tars_of_a_bucket_give_the_examples_of_local_ones(bucket, tmp_path, make, indexed):
    (tmp_path / "local").mkdir()
    folder = make(tmp_path / "local" / "pairs") if make is pairs else make(tmp_path / "local")
    bucket.upload(folder, "pairs")
    if indexed:
        said = index.build(storage.as_path(FOLDER), say=lambda _: None)
        assert said.startswith(f"{FOLDER}/index.vadapter: 2 shards (2 read now)")
    here, there = CaptionTars(folder, "train"), CaptionTars(FOLDER, "train")
    assert contents(there) == contents(here)
    assert there.fingerprint() == here.fingerprint()
    assert contents(pickle.loads(pickle.dumps(there))) == contents(here)  # as in a worker


def test_with_an_index_only_the_bytes_of_the_example_are_fetched(bucket, tmp_path):
    bucket.upload(pairs(tmp_path / "pairs"), "pairs")
    index.build(storage.as_path(FOLDER), say=lambda _: None)
    bucket.sent = 0
    source = CaptionTars(FOLDER, "train")
    opened = bucket.sent
    media = source[0].media
    assert isinstance(media, bytes)
    assert bucket.sent - opened == len(media)
    shards = sum(len(bucket.objects[f"pairs/train-00{i}.tar"]) for i in range(2))
    assert opened < shards + len(bucket.objects["pairs/index.vadapter"])


def test_a_shard_of_a_bucket_that_is_replaced_is_refused(bucket, tmp_path):
    bucket.upload(tars(tmp_path), "pairs")
    index.build(storage.as_path(FOLDER), say=lambda _: None)
    source = CaptionTars(FOLDER, "train")
    bucket.put("pairs/train-000.tar", bucket.objects["pairs/train-000.tar"])
    with pytest.raises(DataError, match="missing or changed since it was indexed"):
        contents(source)
    with pytest.raises(DataError, match=f"modified since; run `vadapter data index {FOLDER}`"):
        CaptionTars(FOLDER, "train")


def test_an_index_of_a_bucket_reads_only_what_is_new(bucket, tmp_path):
    bucket.upload(pairs(tmp_path / "pairs"), "pairs")
    index.build(storage.as_path(FOLDER), say=lambda _: None)
    bucket.put("pairs/train-001.tar", bucket.objects["pairs/train-001.tar"])
    said = index.build(storage.as_path(FOLDER), say=lambda _: None)
    assert "2 shards (1 read now)" in said
    assert index.verify(storage.as_path(FOLDER), say=lambda _: None).endswith("2 shards unchanged")


def test_images_of_a_table_in_a_bucket_are_those_of_a_local_one(bucket, tmp_path):
    table = folder_of(tmp_path)
    bucket.upload(tmp_path, "pairs")
    here, there = ImageFolder(table), ImageFolder(f"{FOLDER}/table.jsonl")
    assert contents(there) == contents(here)
    assert there.fingerprint() == here.fingerprint()
    assert there.text_only(1).media is None
    assert contents(ImageFolder(table, FOLDER)) == contents(here)  # the table alone is local


def test_an_image_missing_from_a_bucket_is_named_by_its_row(bucket, tmp_path):
    folder_of(tmp_path, [row(0), row(9)])
    bucket.upload(tmp_path, "pairs")
    with pytest.raises(DataError, match=rf"line 2: no file {FOLDER}/9.png"):
        ImageFolder(f"{FOLDER}/table.jsonl")


def test_shards_missing_from_a_bucket_are_named(bucket, tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{FOLDER}: no shards train-NNN.tar")):
        CaptionTars(FOLDER, "train")
    with pytest.raises(DataError, match=r"table\.jsonl: no such file"):
        ImageFolder(f"{FOLDER}/table.jsonl")


def test_other_forms_are_refused_in_buckets(bucket):
    with pytest.raises(ConfigError, match="must be a local path; copy it from the bucket"):
        ParquetImages(FOLDER, "train")
