"""Parquet: the right row from the right group, without TensorFlow, and damage named."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.image_files import contents, image
from support.threads import run_in_threads

from vadapter.data.config import DataConfig
from vadapter.data.example import Question
from vadapter.data.open import describe, make_source
from vadapter.data.shards import index, parquet_rows, shard_set
from vadapter.data.sources.parquet import ParquetImages
from vadapter.errors import ConfigError, DataError


def write(path: Path, rows: list[dict], group: int = 3, **options) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, **options)
    return path


def row(number: int, **more) -> dict:
    media = {"bytes": image(number), "path": f"{number}.png"}
    return {"image": media, "caption": f"number {number}"} | more


def files(folder: Path, rows: int = 10) -> Path:
    """Two files of row groups of 3, 3, 3, 1 and 3, 3, 3, 1."""
    for n in range(2):
        numbers = range(rows * n, rows * (n + 1))
        write(folder / f"train-0000{n}-of-00002.parquet", [row(i) for i in numbers])
    return folder


def test_rows_come_in_order_from_files_and_groups(tmp_path):
    source = ParquetImages(files(tmp_path), "train")
    first, second = (f"train-0000{n}-of-00002.parquet" for n in range(2))
    assert contents(source) == [
        (f"{(first, second)[i // 10]}#{i % 10}", i, (f"number {i}",), ()) for i in range(20)
    ]
    assert source.kind == "image"
    assert source[13] == source[13]
    for i in (19, 0, 11, 10, 9, 5):
        assert source[i].captions == (f"number {i}",)
    for i in (-1, 20):
        with pytest.raises(IndexError):
            source[i]


def test_one_sample_reads_one_group_and_texts_no_image(tmp_path, monkeypatch):
    source = ParquetImages(files(tmp_path), "train")
    reads = []
    cached = parquet_rows._group.__wrapped__
    monkeypatch.setattr(parquet_rows, "_group", lambda *a: reads.append(a[1:]) or cached(*a))
    assert source[14].captions == ("number 14",)
    assert reads == [(1, ("image", "caption"))]
    assert source.text_only(14) == source[14].__class__(source[14].id, None, ("number 14",))
    assert reads[1] == (1, ("caption",))


def test_an_index_gives_the_same_source(tmp_path, monkeypatch):
    scanned = ParquetImages(files(tmp_path), "train")
    text = index.build(tmp_path, say=lambda text: None)
    assert "2 shards (2 read now), 8 row groups" in text
    monkeypatch.setattr(shard_set, "scan", None)
    indexed = ParquetImages(tmp_path, "train")
    assert contents(indexed) == contents(scanned)
    assert indexed.fingerprint() == scanned.fingerprint()
    write(tmp_path / "train-00001-of-00002.parquet", [row(1)])
    with pytest.raises(DataError, match=r"does not match .*00001-of-00002\.parquet.*data index"):
        ParquetImages(tmp_path, "train")


def test_columns_name_images_texts_and_questions(tmp_path):
    rows = [
        {"img": image(i), "key": f"k{i}", "qs": [{"q": "who?", "a": ["x", "y"]}], "title": "t"}
        for i in range(2)
    ]
    write(tmp_path / "a.parquet", rows)
    columns = {"image": "img", "id": "key", "question": "qs.q", "answers": "qs.a"}
    source = ParquetImages(tmp_path, shards="*.parquet", columns={**columns, "caption": "title"})
    assert contents(source)[1] == ("k1", 1, ("t",), (Question("who?", ("x", "y")),))
    with pytest.raises(ConfigError, match="no column 'names'; columns: img, key, qs, title"):
        ParquetImages(tmp_path, shards="*.parquet", columns={"caption": "names"})
    with pytest.raises(DataError, match="no column image, clip or video; map one"):
        ParquetImages(tmp_path, shards="*.parquet", columns={"caption": "title"})
    columns = {"clip": "img", "caption": "title"}
    assert ParquetImages(tmp_path, shards="*.parquet", columns=columns).kind == "clip"


def test_an_unusable_row_is_masked_and_named(tmp_path):
    bad = [row(0), row(1, caption=None), row(2, caption=" "), row(3)]
    bad[3]["image"] = {"bytes": None, "path": "elsewhere.png"}
    bad.append(row(4))
    bad[4]["image"] = {"bytes": b"<html>404</html>", "path": "4.png"}
    write(tmp_path / "a.parquet", bad)
    config = {"kind": "parquet", "folder": str(tmp_path), "shards": "a.parquet"}
    source = make_source("x", DataConfig(config, "caption", 9))
    assert [source[i].captions for i in range(3)] == [("number 0",), (), ()]
    assert source[3].media is None
    assert "a.parquet, row 1: no captions and no question" in describe("x", source, 1)
    assert "a.parquet, row 2: caption: expected a text" in describe("x", source, 2)
    assert "there is no image" in describe("x", source, 3)
    assert "starts with b'<html>404" in describe("x", source, 4)


def test_a_corrupt_file_is_named(tmp_path):
    plain = {"write_page_checksum": True, "write_statistics": False, "compression": "none"}
    path = write(tmp_path / "a.parquet", [row(i) for i in range(9)], **plain)
    raw = bytearray(path.read_bytes())
    source = ParquetImages(tmp_path, shards="*.parquet")
    at = raw.index(image(4))
    raw[at + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.parquet: changed since it was indexed"):
        source[4]
    source = ParquetImages(tmp_path, shards="*.parquet")
    assert source[0].captions == ("number 0",)
    with pytest.raises(DataError, match=r"a\.parquet: row group 1 cannot be read"):
        source[4]
    path.write_bytes(raw[:-9])
    with pytest.raises(DataError, match=r"a\.parquet: not a readable parquet file"):
        ParquetImages(tmp_path, shards="*.parquet")
    path.unlink()
    with pytest.raises(DataError, match=r"a\.parquet"):
        source[8]


def test_a_group_too_large_to_be_read_for_each_sample_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [row(i) for i in range(9)])
    monkeypatch.setattr(parquet_rows, "MAX_GROUP_BYTES", 200)
    with pytest.raises(DataError, match=r"row group of .* bytes.*row_group_size=100"):
        ParquetImages(tmp_path, shards="*.parquet")


def test_a_missing_file_and_an_empty_split_are_named(tmp_path):
    files(tmp_path)
    with pytest.raises(DataError, match=r"no shards val-NNN\.parquet; splits in the folder: train"):
        ParquetImages(tmp_path, "val")
    (tmp_path / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(DataError, match="number 1 of 'train' is missing"):
        ParquetImages(tmp_path, "train")
    empty = pa.table({"image": pa.array([], pa.binary()), "caption": pa.array([], pa.string())})
    pq.write_table(empty, tmp_path / "e-000.parquet")
    with pytest.raises(DataError, match="0 usable examples in split 'e'"):
        ParquetImages(tmp_path, "e")


def test_threads_and_pickled_copies_read_the_right_rows(tmp_path):
    source = pickle.loads(pickle.dumps(ParquetImages(files(tmp_path), "train")))
    wrong = []

    def read(start: int) -> None:
        for i in range(60):
            at = (start * 7 + i * 3) % 20
            if source[at].captions != (f"number {at}",):
                wrong.append(at)

    run_in_threads(read, 6)
    assert not wrong


def test_the_fingerprint_follows_files_and_columns(tmp_path):
    files(tmp_path)
    prints = {
        ParquetImages(tmp_path, "train").fingerprint(),
        ParquetImages(tmp_path, shards="train-00000*").fingerprint(),
        ParquetImages(tmp_path, "train", columns={"question": "caption"}).fingerprint(),
    }
    assert len(prints) == 3


def test_importing_the_sources_imports_none_of_the_slow_libraries():
    code = (
        "import sys, vadapter.data.open, vadapter.train.loop, json;"
        "slow = ('pyarrow', 'tensorflow_datasets', 'tensorflow', 'vadapter.data.benchmarks');"
        "print(json.dumps([m for m in slow if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
