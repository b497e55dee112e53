"""Every benchmark from its official files: what they say is what is scored."""

import dataclasses
import json
import pickle
from pathlib import Path

import pytest
from support.official_files import MAKERS, TEN, shrunk, vqav2
from support.plain_files import content, edit, move_into_zip, write_json, write_tar

from vadapter.data.benchmarks.source import BenchmarkSource, open_benchmark, training_questions
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.example import Source
from vadapter.data.media.frames import load_media
from vadapter.errors import ConfigError

ALL = sorted(BENCHMARKS)
QUESTIONS = [name for name in ALL if BENCHMARKS[name].task == "question"]


def test_the_papers_ten_and_two_more():
    assert set(BENCHMARKS) == set(MAKERS)
    assert len(BENCHMARKS) == 12
    for name, row in BENCHMARKS.items():
        assert row.name == name
        assert row.default_split in row.splits
        assert (row.training in row.splits) == (row.task == "question"), name
        # What is scored has public answers.
        assert row.splits[row.default_split].per_item != 0, name
        for split in row.splits:
            assert any(split in file.splits for file in row.files), (name, split)
            assert any(split in media_set.splits for media_set in row.media_sets), (name, split)


@pytest.mark.parametrize("name", ALL)
def test_the_official_form_is_read_as_it_is(name, tmp_path):
    expected = MAKERS[name](tmp_path)
    source: Source = open_benchmark(name, tmp_path)
    assert source.kind == BENCHMARKS[name].media
    assert len(source) == len(expected)
    for n, record in enumerate(expected):
        example = source[n]
        assert (example.id, example.captions, example.qa) == (record.id, *record[2:])
        assert isinstance(example.media, Path)
        assert example.media.stem == record.media
        assert source.text_only(n) == dataclasses.replace(example, media=None)  # type: ignore


@pytest.mark.parametrize("name", ALL)
def test_only_the_complete_official_split_is_official(name, tmp_path):
    records = MAKERS[name](tmp_path)
    row = BENCHMARKS[name]
    small = open_benchmark(name, tmp_path)
    assert not small.official
    counts = row.splits[row.default_split]
    assert f"of {counts.media:,} {row.media}s" in small.note
    assert f"of {counts.texts:,} {row.task}s" in small.note

    whole = BenchmarkSource(shrunk(name, records), tmp_path)
    assert whole.official
    assert whole.note == ""

    row = shrunk(name, records)
    counts = row.splits[row.default_split]
    for other in (counts._replace(media=3), counts._replace(texts=counts.texts + 1)):
        longer = dataclasses.replace(row, splits={**row.splits, row.default_split: other})
        assert not BenchmarkSource(longer, tmp_path).official

    next(Path(whole[1].media).parent.glob(f"{records[1].media}.*")).unlink()
    partial = BenchmarkSource(shrunk(name, records), tmp_path)
    assert not partial.official
    assert partial.missing == (records[1].media,)
    assert f"1 of 2 {row.media}s" in partial.note
    assert f"1 {row.media}s named but not here, such as {records[1].media}" in partial.note
    assert [partial[n].id for n in range(len(partial))] == [records[0].id]
    assert partial.fingerprint() != whole.fingerprint()


@pytest.mark.parametrize("name", QUESTIONS)
def test_training_questions_have_answers_and_need_no_image(name, tmp_path):
    MAKERS[name](tmp_path)
    if name == "daquar":
        text = (tmp_path / "qa.894.raw.train.txt").read_text()
        assert [q.text for q in training_questions(name, tmp_path)] == ["what is it ?"] * 2
        assert text.count("image5") == 2
        return
    questions = training_questions(name, tmp_path)
    assert len(questions) == 2
    assert all(question.answers and question.text for question in questions)
    assert training_questions(name, tmp_path) == questions


def test_captions_have_no_training_questions(tmp_path):
    with pytest.raises(ConfigError, match=r"coco.*no questions"):
        training_questions("coco", tmp_path)


def test_blank_answers_stay_and_questions_that_have_no_others_are_no_examples(tmp_path):
    MAKERS["vizwiz"](tmp_path)
    assert training_questions("vizwiz", tmp_path)[0].answers == ("", *TEN[1:])

    def blank(data):
        for answer in data[0]["answers"][:6]:
            answer["answer"] = ""

    edit(tmp_path / "Annotations/train.json", blank)
    (only,) = training_questions("vizwiz", tmp_path)
    assert only.answers == TEN
    edit(tmp_path / "Annotations/val.json", blank)
    assert open_benchmark("vizwiz", tmp_path)[0].qa[0].answers == ("",) * 6 + TEN[6:]


def test_questions_without_public_answers_are_read_without(tmp_path):
    vqav2(tmp_path)
    asked = [{"image_id": 1, "question": "What?", "question_id": 1000}]
    write_json(tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    (tmp_path / "test2015").mkdir()
    (tmp_path / "test2015/COCO_test2015_000000000001.jpg").write_bytes(b"1")
    source = open_benchmark("vqav2", tmp_path, "test-dev")
    assert source[0].qa[0].answers == ()
    assert source[0].qa[0].id == "1000"


def test_official_zips_are_read_in_place(tmp_path):
    expected = vqav2(tmp_path)
    whole = open_benchmark("vqav2", tmp_path)
    inside = [whole[n] for n in range(len(whole))]
    names = {
        "v2_OpenEnded_mscoco_val2014_questions.json": "v2_Questions_Val_mscoco.zip",
        "v2_mscoco_val2014_annotations.json": "v2_Annotations_Val_mscoco.zip",
        "val2014": "val2014.zip",
    }
    for name, archive in names.items():
        move_into_zip(tmp_path / name, tmp_path / archive)
    source = pickle.loads(pickle.dumps(open_benchmark("vqav2", tmp_path)))
    before = sorted(path.name for path in tmp_path.iterdir())
    assert len(source) == len(expected)
    for n, example in enumerate(inside):
        assert source[n] == dataclasses.replace(example, media=content(example.media.name))  # type: ignore
    assert sorted(path.name for path in tmp_path.iterdir()) == before  # nothing was extracted


def test_official_tars_are_read_in_place(tmp_path):
    expected = MAKERS["msvd_qa"](tmp_path)
    folder = tmp_path / "YouTubeClips"
    files = {f"YouTubeClips/{path.name}": path.read_bytes() for path in folder.iterdir()}
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()
    write_tar(tmp_path / "YouTubeClips.tar", files)
    source = open_benchmark("msvd_qa", tmp_path)
    assert [source[n].media for n in range(2)] == [content(f"{r.media}.avi") for r in expected]


@pytest.mark.parametrize("name", ["flickr8k", "daquar"])
def test_tar_shards_with_rows_beside_them_are_read_too(name, tmp_path):
    rows = {
        "flickr8k": [{"image": f"{n}.jpg", "captions": list("abcde")} for n in range(2)],
        "daquar": [
            {"image": "0.jpg", "question": "what?", "answers": ["a", "b"], "question_id": 7},
            {"image": "1.jpg", "question": "who?", "answers": ["c"], "question_id": 8},
        ],
    }[name]
    table = {"flickr8k": "captions.jsonl", "daquar": "qa.jsonl"}[name]
    lines = [json.dumps(row | {"split": split}) for split in ("test", "train") for row in rows]
    (tmp_path / table).write_text("\n".join(lines))
    write_tar(tmp_path / "test-000.tar", {"0.jpg": b"zero"})
    write_tar(tmp_path / "test-001.tar", {"1.jpg": b"one"})
    source = open_benchmark(name, tmp_path)
    assert [(source[n].id, source[n].media) for n in range(2)] == [
        ("0.jpg", b"zero"),
        ("1.jpg", b"one"),
    ]
    if name == "flickr8k":
        assert source[1].captions == tuple("abcde")
    else:
        assert [source[n].qa[0].answers for n in range(2)] == [("a, b",), ("c",)]


def test_of_two_files_of_one_name_the_same_is_taken_everywhere(tmp_path):
    MAKERS["vatex"](tmp_path)
    name = "4cRBsV5nWLs_000015_000025"
    for suffix in (".avi", ".mkv"):
        (tmp_path / "videos" / f"{name}{suffix}").write_bytes(b"another")
    assert open_benchmark("vatex", tmp_path)[1].media == tmp_path / "videos" / f"{name}.avi"


def test_training_images_of_coco_are_in_two_folders(tmp_path):
    MAKERS["coco"](tmp_path)
    (tmp_path / "train2014").mkdir()
    (tmp_path / "train2014/COCO_train2014_000000000009.jpg").write_bytes(b"9")
    source = open_benchmark("coco", tmp_path, "train")
    assert [source[n].id for n in range(len(source))] == ["9"]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "split", "media", "texts"),
    [
        ("flickr8k", "test", 1000, 5000),
        ("flickr8k", "val", 1000, 5000),
        ("flickr8k", "train", 6000, 30000),
        ("daquar", "test", 653, 5673),
        ("daquar", "train", 794, 6795),
    ],
)
def test_real_sets_are_complete(name, split, media, texts, data_root):
    source = open_benchmark(name, data_root / name, split)
    assert source.official, source.note
    words = [source.text_only(n) for n in range(len(source))]
    assert len(words) == media
    assert sum(len(example.captions) + len(example.qa) for example in words) == texts
    assert len({example.id for example in words}) == media
    assert load_media(source[media - 1].media, frames=1).shape[-1] == 3  # type: ignore


@pytest.mark.data
def test_a_real_set_whose_answer_is_a_set_is_matched_as_a_whole(data_root):
    questions = {q.id: q for q in training_questions("daquar", data_root / "daquar")}
    assert len(questions) == 6795
    assert questions["12"].answers == ("book, scissor, papers, tape_dispenser",)
    assert BENCHMARKS["daquar"].splits["train"].per_item == 1
