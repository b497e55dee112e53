"""Sources: what the files say is what comes out, and what is wrong is named by file and line."""

import json
import pickle

import numpy as np
import pytest
from support.image_files import (
    EXPECTED,
    contents,
    folder_of,
    image,
    row,
    tars,
    write_rows,
    write_tar,
)

from vadapter.data.example import Question
from vadapter.data.media.frames import load_media
from vadapter.data.sources.table import ImageFolder
from vadapter.data.sources.tars import CaptionTars
from vadapter.errors import DataError


def test_tar_rows_come_in_order_with_their_own_image(tmp_path):
    source = CaptionTars(tars(tmp_path), "train")
    assert contents(source) == EXPECTED
    assert source.kind == "image"


def test_folder_rows_come_in_order_with_their_own_image(tmp_path):
    source = ImageFolder(folder_of(tmp_path))
    assert contents(source) == EXPECTED
    assert source.kind == "image"


def test_media_may_be_in_another_folder_than_their_table(tmp_path):
    (tmp_path / "a").mkdir()
    folder_of(tmp_path / "a")
    table = write_rows(tmp_path / "b.jsonl", [{"image": "3.png", "caption": "three"}])
    assert contents(ImageFolder(table, tmp_path / "a")) == [("3.png", 60, ("three",), ())]


def test_only_the_rows_and_shards_of_the_split_count(tmp_path):
    rows = [row(0), row(1, split="val"), {"image": "2.png", "caption": "in all"}]
    write_tar(tmp_path / "val-000.tar", {"1.png": image(9), "2.png": image(9)})
    write_tar(tmp_path / "train-extra-000.tar", {"0.png": image(9)})  # the split train-extra
    source = CaptionTars(tars(tmp_path, rows), "train")
    assert [name for name, *_ in contents(source)] == ["0.png", "2.png"]
    assert contents(CaptionTars(tmp_path, "val"))[0][:2] == ("1.png", 9)
    folder_of(tmp_path, rows)
    assert len(ImageFolder(tmp_path / "table.jsonl", split="val")) == 2
    assert len(ImageFolder(tmp_path / "table.jsonl")) == 3


def test_questions_about_one_image_gather_in_one_example(tmp_path):
    ask = lambda i, q, a, **more: {"image": f"{i}.png", "question": q, "answer": a} | more  # noqa: E731
    tars(tmp_path).joinpath("captions.jsonl").rename(tmp_path / "c")
    all_of_them = {"answers": ["cat", "a cat", "cat"], "kind": "animal", "question_id": 7}
    rows = [ask(0, "what?", "dog"), ask(1, "who?", "", **all_of_them), ask(0, "why?", "so")]
    rows.append({"image": "2.png", "question": "hidden?"})
    write_rows(tmp_path / "qa.jsonl", rows)
    source = CaptionTars(tmp_path, "train")
    assert [e.qa for e in (source[0], source[1], source[2])] == [
        (("what?", ("dog",), "", ""), ("why?", ("so",), "", "")),
        (("who?", ("cat", "a cat", "cat"), "animal", "7"),),
        (("hidden?", (), "", ""),),
    ]
    (tmp_path / "c").rename(tmp_path / "captions.jsonl")
    both = CaptionTars(tmp_path, "train")
    assert (len(both), both[0].captions, both[0].qa) == (5, ("number 0", "gray"), source[0].qa)


def test_webdataset_pairs_need_no_table(tmp_path):
    files = {
        "a/0.png": image(0),
        "a/0.txt": "größe\n".encode(),
        "a/0.json": b'{"caption": "less than the txt"}',
        "b/0.json": b'{"captions": ["one", "two"], "question": "q", "answer": "a"}',
        "b/0.seg.png": image(40),
    }
    write_tar(tmp_path / "train-000.tar", files)
    source = CaptionTars(tmp_path, "train")
    assert contents(source) == [
        ("a/0", 0, ("größe\n",), ()),
        ("b/0", 40, ("one", "two"), (("q", ("a",), "", ""),)),
    ]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.png": b"x"}, "'0' has only 0.png"),
        ({"0.txt": b"x"}, "'0' has only 0.txt"),
        ({"0.png": b"x", "0.txt": b"\xff"}, "0.txt: not UTF-8"),
        ({"0.png": b"x", "0.txt": b" "}, "0.txt: caption: expected a text"),
        ({"0.png": b"x", "0.json": b"{"}, "0.json: not JSON"),
        ({"0.png": b"x", "0.jpg": b"x", "0.txt": b"x"}, "second media of '0'"),
    ],
)
def test_an_unusable_pair_names_its_shard(tmp_path, files, message):
    write_tar(tmp_path / "train-000.tar", files)
    with pytest.raises(DataError) as caught:
        CaptionTars(tmp_path, "train")
    assert message in str(caught.value)
    assert "train-000.tar" in str(caught.value)


BAD_ROWS = [
    (b'{"image": "1.png", "caption": "\xff"}', "not UTF-8"),
    (b"{'image': 1}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'["1.png"]', "expected a JSON object"),
    ({"photo": "1.png", "caption": "x"}, "none of the keys image, clip, video"),
    ({"image": 1, "caption": "x"}, "image: expected a text, got 1"),
    ({"image": "1.png"}, "no captions and no question"),
    ({"image": "1.png", "captions": []}, "no captions and no question"),
    ({"image": "1.png", "captions": ["x", " \n"]}, "caption: expected a text"),
    ({"image": "1.png", "captions": None}, "caption: expected a text, got None"),
    ({"image": "1.png", "captions": [["x"]]}, "caption: expected a text"),
    ({"image": "1.png", "caption": "\ud800"}, "unpaired surrogate"),
    ({"image": "1.png", "question": "q", "answer": 3}, "answer: expected a text, got 3"),
    ({"image": "0.png", "caption": "again"}, "'0.png' has captions already"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_ROWS)
@pytest.mark.parametrize("build", [tars, folder_of])
def test_a_bad_row_is_named_by_file_and_line(tmp_path, build, bad, message):
    path = build(tmp_path, [row(0), b"", bad])
    with pytest.raises(DataError) as caught:
        CaptionTars(path, "train") if build is tars else ImageFolder(path)
    assert message in str(caught.value)
    assert "jsonl, line 3" in str(caught.value)


def test_unusual_valid_captions_are_unchanged(tmp_path):
    captions = ["x" * 1_000_000, "שלום", "🐕‍🦺", "a\0b", "<eos><image>", " padded "]
    source = CaptionTars(tars(tmp_path, [row(0, captions=captions)]), "train")
    assert source[0].captions == tuple(captions)


def test_a_byte_order_mark_is_no_error(tmp_path):
    rows = [b"\xef\xbb\xbf" + json.dumps(row(0)).encode() + b"\r"]
    assert len(CaptionTars(tars(tmp_path, rows), "train")) == 1


def test_an_image_that_no_shard_holds_is_named(tmp_path):
    tars(tmp_path, [row(0), row(7)])
    with pytest.raises(DataError, match=r"line 2: '7\.png' cannot be read: no member"):
        CaptionTars(tmp_path, "train")
    write_tar(tmp_path / "train-002.tar", {"../7.png": b"x"})
    write_rows(tmp_path / "captions.jsonl", [{"image": "../7.png", "caption": "x"}])
    with pytest.raises(DataError, match="climbs out"):
        CaptionTars(tmp_path, "train")


def test_a_row_that_names_another_shard_is_an_error(tmp_path):
    assert CaptionTars(tars(tmp_path, [row(0, shard="train-000.tar")]), "train")
    with pytest.raises(DataError, match=r"line 1: '0\.png' is in train-000\.tar"):
        CaptionTars(tars(tmp_path, [row(0, shard="train-001.tar")]), "train")


def test_one_name_in_two_shards_is_an_error(tmp_path):
    write_tar(tars(tmp_path) / "train-002.tar", {"0.png": image(9)})
    with pytest.raises(DataError, match=r"train-002\.tar: '0\.png' is in .*train-000\.tar too"):
        CaptionTars(tmp_path, "train")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../x.png", "a\0.png"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path, name):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.png").write_bytes(image(1))
    table = write_rows(tmp_path / "in" / "t.jsonl", [{"image": name, "caption": "x"}])
    with pytest.raises(DataError, match=r"line 1: .* leaves the folder"):
        ImageFolder(table)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"line 2: no file .*9\.png"):
        ImageFolder(folder_of(tmp_path, [row(0), row(9)]))


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, "no shards test-NNN.tar; splits in the folder: train"),
        (lambda p: write_tar(p / "test-000.tar", {"0.png": b"x"}), "no rows of split 'test'"),
        (lambda p: (p / "test-000.tar").write_bytes(b""), "test-000.tar: not a readable tar"),
    ],
)
def test_a_split_without_data_says_what_is_there(tmp_path, prepare, message):
    tars(tmp_path)
    prepare(tmp_path)
    with pytest.raises(DataError) as caught:
        CaptionTars(tmp_path, "test")
    assert message in str(caught.value)


def test_empty_and_missing_tables_and_folders_are_errors(tmp_path):
    with pytest.raises(DataError, match="check the path"):
        CaptionTars(tmp_path / "nowhere", "train")
    with pytest.raises(DataError, match="no such file"):
        ImageFolder(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="the file is empty"):
        ImageFolder(write_rows(tmp_path / "t.jsonl", [b"", b"  "]))
    with pytest.raises(DataError, match="no rows of split 'val'; splits: train"):
        ImageFolder(folder_of(tmp_path), split="val")
    write_tar(tmp_path / "x-000.tar", {})
    with pytest.raises(DataError, match="0 usable examples"):
        CaptionTars(tmp_path, "x")


def test_clips_are_a_kind_and_do_not_mix_with_images(tmp_path):
    for name in ("a.mp4", "b.gif", "c.png", "d.txt"):
        (tmp_path / name).write_bytes(b"x")
    rows = [{"clip": "a.mp4", "caption": "x"}, {"video": "b.gif", "caption": "y"}]
    source = ImageFolder(write_rows(tmp_path / "t.jsonl", rows))
    assert (source.kind, source[1].media) == ("clip", tmp_path / "b.gif")
    rows.append({"image": "c.png", "caption": "z"})
    with pytest.raises(DataError, match="images and clips are mixed"):
        ImageFolder(write_rows(tmp_path / "t.jsonl", rows))
    with pytest.raises(DataError, match=r"type \.txt are neither"):
        ImageFolder(write_rows(tmp_path / "t.jsonl", [{"image": "d.txt", "caption": "z"}]))


@pytest.mark.parametrize("build", [tars, folder_of])
def test_the_fingerprint_follows_the_data_not_the_place(tmp_path, build):
    def fingerprint(name, **change):
        folder = tmp_path / name
        folder.mkdir()
        path = build(folder, **change)
        return (CaptionTars(path, "train") if build is tars else ImageFolder(path)).fingerprint()

    rows = [row(i) for i in range(5)]
    base = fingerprint("a")
    assert len(base) == 64
    assert fingerprint("b") == base
    changed = {
        "caption": {"rows": [row(0, captions=["number 0", "dark"]), *rows[1:]]},
        "order": {"rows": rows[::-1]},
        "fewer": {"rows": rows[:-1]},
    }
    prints = [fingerprint(name, **change) for name, change in changed.items()]
    assert len({base, *prints}) == 4


def test_the_fingerprint_notices_another_image_size(tmp_path):
    table = folder_of(tmp_path)
    before = ImageFolder(table).fingerprint()
    (tmp_path / "3.png").write_bytes(image(60, 99))
    assert ImageFolder(table).fingerprint() != before


@pytest.mark.parametrize("build", [tars, folder_of])
def test_a_source_is_picklable_and_reads_on(tmp_path, build):
    path = build(tmp_path)
    source = CaptionTars(path, "train") if build is tars else ImageFolder(path)
    copied = pickle.loads(pickle.dumps(source))
    assert contents(copied) == EXPECTED
    assert copied.fingerprint() == source.fingerprint()
    with pytest.raises(IndexError):
        copied[5]


def test_building_and_reading_write_nothing(tmp_path):
    tars(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    contents(CaptionTars(tmp_path, "train"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.data
def test_real_caption_and_question_sets_have_their_official_sizes(data_root):
    photos = CaptionTars(data_root / "flickr8k", "test")
    assert len(photos) == 1000
    assert all(len(photos[i].captions) == 5 for i in range(0, 1000, 100))
    rooms = CaptionTars(data_root / "daquar", "test")
    assert sum(len(rooms.text_only(i).qa) for i in range(len(rooms))) == 5673
    assert rooms[0].qa[0].answer == "garbage_bin"
    media = [source[len(source) - 1].media for source in (photos, rooms)]
    assert all(isinstance(load_media(m, frames=1), np.ndarray) for m in media)


def test_the_target_answer_is_that_of_most_annotators():
    assert Question("?", ("a", "b", "b", "a", "c")).answer == "a"  # the first of two as frequent
    assert Question("?", ("a", "b", "b")).answer == "b"
    assert Question("?").answer == ""
