"""Every row of the table of bad data in `vadapter.data.sources` is kept."""

import io
import json
import os
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from support.image_files import folder_of, image, pairs, read, row, tars, write_rows, write_tar

from vadapter.data import sources
from vadapter.data.config import DataConfig
from vadapter.data.media.images import ImageTransform
from vadapter.data.open import describe, make_stream
from vadapter.data.pipeline import eval_batches
from vadapter.data.shards import index
from vadapter.data.sources.parquet import ParquetImages
from vadapter.data.sources.table import ImageFolder
from vadapter.data.sources.tars import CaptionTars
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.errors import DataError

CASES: dict[str, Callable[[Path], None]] = {}
TOKENIZER = BPETokenizer.train(["number 1 2 3 gray", "Question: what? Answer: dog"], 280)


def case(name: str) -> Callable:
    def keep(test: Callable[[Path], None]) -> None:
        CASES[name] = test

    return keep


def refused(build: Callable[[], object], *words: str) -> None:
    with pytest.raises(DataError) as caught:
        build()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def batch(source, task: str = "caption") -> dict[str, np.ndarray]:
    """All rows of a source, as an evaluation reads them."""
    config = DataConfig({}, task, text_len=40, size=8)
    items, transform = make_stream("x", config, source, TOKENIZER, ImageTransform(8))
    return next(iter(eval_batches(items, transform, len(source), threads=0)))


def masked(source, which: int, clean, *words: str) -> None:
    """Row `which` alone is bad, has no weight and says why; the others are as if it was not."""
    made, other = batch(source), batch(clean)
    assert made["bad"].tolist() == [i == which for i in range(len(source))]
    assert not made["weights"][which].any()
    for key in ("frames", "tokens", "weights", "id"):
        rest = np.arange(len(source)) != which
        np.testing.assert_array_equal(made[key][rest], other[key][rest])
    for word in words:
        assert word in describe("x", source, which)


def replaced(folder: Path, data: bytes, *words: str) -> None:
    """An image that becomes `data` is masked, in a folder and in a shard."""
    for build in (ImageFolder, lambda path: CaptionTars(path.parent, "train")):
        made = {}
        for name in ("clean", "spoilt"):
            where = folder / f"{build.__name__.strip('<>')}-{name}"
            where.mkdir()
            made[name] = folder_of(tars(where))
        files = {f"{i}.png": data if i == 3 else image(20 * i) for i in (1, 3)}
        write_tar(made["spoilt"].with_name("train-001.tar"), files)
        made["spoilt"].with_name("3.png").write_bytes(data)
        masked(build(made["spoilt"]), 3, build(made["clean"]), "3.png", *words)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@case("shard missing")
def _(folder):
    tars(folder)
    write_tar(folder / "train-003.tar", {})
    refused(lambda: CaptionTars(folder, "train"), str(folder), "number 2 of 'train' is missing")


@case("shard truncated")
def _(folder):
    for size in (100, 700, 1024, 1600):
        tars(folder)
        cut(folder / "train-001.tar", size)
        refused(lambda: CaptionTars(folder, "train"), "train-001.tar")
        refused(lambda: index.build(folder, say=lambda text: None), "train-001.tar")


@case("shard that differs from its index")
def _(folder):
    index.build(pairs(folder), say=lambda text: None)
    os.utime(folder / "00001.tar", ns=(5, 5))
    refused(lambda: read(folder), "00001.tar", f"vadapter data index {folder}")


@case("flipped bytes in a tar header")
def _(folder):
    path = tars(folder) / "train-001.tar"
    raw = path.read_bytes()
    for at in (3, 130, 150, 260):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        refused(lambda: CaptionTars(folder, "train"), "train-001.tar")


@case("flipped bytes in an image")
def _(folder):
    source = read(pairs(folder))
    clean = pickle.loads(pickle.dumps(source))
    index.build(folder, say=lambda text: None)
    path = folder / "00001.tar"
    raw, status = bytearray(path.read_bytes()), path.stat()
    at = raw.index(image(21)) + 40
    raw[at : at + 4] = bytes(4)
    batch(clean)  # nothing of it is remembered
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert batch(read(folder))["bad"].tolist() == [i == 4 for i in range(12)]
    assert "'000010001' (" in describe("x", read(folder), 4)
    refused(lambda: index.verify(folder, say=lambda text: None), "00001.tar: contents changed")


@case("flipped bytes in a parquet file")
def _(folder):
    path = folder / "a.parquet"
    rows = [{"image": image(i), "caption": f"number {i}"} for i in range(3)]
    plain = {"write_page_checksum": True, "write_statistics": False, "compression": "none"}
    pq.write_table(pa.Table.from_pylist(rows), path, **plain)
    raw = path.read_bytes()
    for at, word in ((raw.index(image(1)) + 9, "row group 0"), (len(raw) - 2, "not a readable")):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
        refused(lambda: ParquetImages(folder, shards="a.parquet")[1], "a.parquet", word)


@case("HTML or other content, not an image")
def _(folder):
    replaced(folder, b"<html>not found</html>", "starts with b'<html>")


@case("image truncated")
def _(folder):
    replaced(folder, image(60)[:50], "cannot be decoded")


@case("image of more than 25 megapixels")
def _(folder):
    large = io.BytesIO()
    Image.new("1", (6000, 6000)).save(large, "PNG")
    replaced(folder, large.getvalue()[:99], "6000x6000 pixels, more than the 25000000 allowed")


@case("image that is missing")
def _(folder):
    table = folder_of(folder, [row(0), row(9)])
    refused(lambda: ImageFolder(table), "table.jsonl, line 2", "9.png")
    tars(folder, [row(0), row(9)])
    refused(lambda: CaptionTars(folder, "train"), "captions.jsonl, line 2", "no member")


@case("pair without its image or its text")
def _(folder):
    clean = read(pairs(folder / "clean", count=1))
    for lost in ("txt", "png"):
        files = {}
        for i in range(3):
            files |= {f"{i}.png": image(i), f"{i}.txt": f"shard 0, image {i}".encode()}
        del files[f"1.{lost}"]
        (folder / lost).mkdir()
        write_tar(folder / lost / "0.tar", files)
        kept = "png" if lost == "txt" else "txt"
        why = f"'1' has only 1.{kept}" if lost == "txt" else "there is no image"
        masked(read(folder / lost), 1, clean, why)
    write_tar(folder / "txt" / "0.tar", {"1.png": image(1)})
    refused(lambda: read(folder / "txt"), "0.tar: '1' has only 1.png", "captions.jsonl")


@case("caption in a table that is not text")
def _(folder):
    for bad in (3, None, "", " \n", "\ud800", ["x"], {"a": 1}):
        table = folder_of(folder, [row(0), row(1, captions=[bad])])
        refused(lambda table=table: ImageFolder(table), "table.jsonl, line 2: caption")


@case("caption in a shard that is not text")
def _(folder):
    def shards(name: str, count: int, bad: dict[int, bytes], suffix: str = "txt") -> Path:
        files = {}
        for i in range(count):
            good = f"number {i}".encode()
            good = good if suffix == "txt" else json.dumps({"caption": good.decode()}).encode()
            files |= {f"{i:05d}.png": image(i % 9), f"{i:05d}.{suffix}": bad.get(i, good)}
        (folder / name).mkdir()
        write_tar(folder / name / "0.tar", files)
        return folder / name

    clean = read(shards("clean", 4, {}))
    for n, bad in enumerate((b"\xff", b" \n", b"")):
        masked(read(shards(f"txt{n}", 4, {2: bad})), 2, clean, "0.tar: 00002.txt")
    for n, bad in enumerate((b"{", b"[]", b"3", b"{}", b'{"caption": null}', b'{"caption": 3}')):
        masked(read(shards(f"json{n}", 4, {2: bad}, "json")), 2, clean, "0.tar: 00002.json")
    few = read(shards("few", 20, dict.fromkeys(range(10), b"")))
    assert batch(few)["bad"].sum() == 10
    many = shards("many", 20, dict.fromkeys(range(11), b""))
    refused(lambda: read(many), "11 of 20", "more than 0.1%", "00000.txt", "max_bad=0.55")
    assert len(read(many, max_bad=0.55)) == 20
    refused(lambda: read(shards("all", 3, dict.fromkeys(range(3), b""))), "0 usable examples of 3")


@case("id of an image twice")
def _(folder):
    table = folder_of(folder, [row(0), row(0)])
    refused(lambda: ImageFolder(table), "line 2: '0.png' has captions already")
    write_tar(tars(folder) / "train-002.tar", {"0.png": image(9)})
    refused(lambda: CaptionTars(folder, "train"), "train-002.tar: '0.png' is in", "train-000.tar")
    index.build(folder, say=lambda text: None)
    refused(lambda: CaptionTars(folder, "train"), "train-002.tar: '0.png' is in", "train-000.tar")


@case("id of a question twice")
def _(folder):
    rows = [{"image": f"{i}.png", "question": "?", "question_id": 7} for i in range(2)]
    refused(lambda: ImageFolder(folder_of(folder, rows)), "line 2: question_id 7 is in")


@case("split without rows")
def _(folder):
    tars(folder)
    write_tar(folder / "val-000.tar", {"0.png": image(0)})
    refused(lambda: CaptionTars(folder, "val"), "no rows of split 'val'; splits: train")
    refused(
        lambda: CaptionTars(folder, "test"),
        "no shards test-NNN.tar; splits in the folder: train, val",
    )
    refused(lambda: ImageFolder(folder_of(folder), split="val"), "no rows of split 'val'")


@case("question without answers")
def _(folder):
    asked = [row(i, question=f"what {i}?", answers=["dog"] if i != 1 else []) for i in range(3)]
    for one in asked:
        del one["captions"]
    source = ImageFolder(folder_of(folder, asked))
    assert source[1].qa[0].answers == ()
    assert batch(source, "question")["bad"].tolist() == [False, True, False]


@case("link, device or climbing name in a tar")
def _(folder):
    path = tars(folder, [row(0)]) / "train-001.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("l.png", tarfile.SYMTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("../c.png"))
    assert len(CaptionTars(folder, "train")) == 1
    names = (("l.png", "not a regular file"), ("d.png", "regular"), ("../c.png", "climbs out"))
    for name, why in names:
        write_rows(folder / "captions.jsonl", [row(0), {"image": name, "caption": "x"}])
        refused(lambda: CaptionTars(folder, "train"), "line 2", name, why)
    index.build(folder, say=lambda text: None)
    refused(lambda: CaptionTars(folder, "train"), "line 2", "climbs out")


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "sung")


@case("pickle in a tar")
def _(folder):
    song = pickle.dumps(Canary(folder / "sung"))
    (folder / "in").mkdir()
    names = ("0.pkl", "0.pyd", "0.pickle", "0.pth", "0.npy", "1.png", "1.txt")
    good = {"0.png": image(0), "0.txt": b"number 0"}
    write_tar(folder / "in" / "0.tar", {**good, **dict.fromkeys(names, song)})
    before = sorted(folder.rglob("*"))
    source = read(folder / "in")
    assert batch(source)["bad"].tolist() == [False, True]
    assert sorted(folder.rglob("*")) == before
    index.build(folder / "in", say=lambda text: None)
    assert batch(read(folder / "in"))["bad"].tolist() == [False, True]
    assert sorted({*folder.rglob("*")} - {*before}) == [folder / "in" / "index.vadapter"]


def rows() -> list[str]:
    """The faults of the table in the docstring."""
    table = (sources.__doc__ or "").split("what happens\n")[1].split("\n\n")[0]
    return [line[2:41].strip() for line in table.splitlines() if re.match(r"  \S", line)]


@pytest.mark.parametrize("fault", rows())
def test_bad_data_is_treated_as_the_table_says(tmp_path, fault):
    CASES[fault](tmp_path)


def test_every_case_is_in_the_table():
    assert set(CASES) == set(rows())
