"""Benchmarks whose files are not as officially published: what is wrong is named, never scored."""

from pathlib import Path

import pytest
from support.official_files import MAKERS, flickr8k, msrvtt, shrunk, vqav2
from support.plain_files import edit, move_into_zip

from vadapter.data.benchmarks.source import BenchmarkSource, open_benchmark
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.errors import ConfigError, DataError

ALL = sorted(BENCHMARKS)


@pytest.mark.parametrize("name", ALL)
def test_a_missing_file_is_named_with_its_official_page(name, tmp_path):
    MAKERS[name](tmp_path)
    row = BENCHMARKS[name]
    for file in row.files:
        paths = [
            path
            for inner in ("", *file.folders)
            for wanted in file.names(row.default_split)
            if (path := tmp_path / inner / wanted).is_file()
        ]
        text = paths[0].read_bytes()
        paths[0].unlink()
        with pytest.raises(DataError, match=r"no .*put it there, from https://") as error:
            open_benchmark(name, tmp_path)
        assert paths[0].name in str(error.value)
        assert file.page in str(error.value)
        paths[0].write_bytes(text)
    folder = Path(open_benchmark(name, tmp_path)[0].media).parent  # type: ignore
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="put it there, from https://") as error:
        open_benchmark(name, tmp_path)
    assert folder.name in str(error.value)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    "text",
    [
        b"<html><body>Sign in to download</body></html>",
        b'{"unexpected": [1, 2]}',
        b"[1, 2]",
        b"",
        b"\xff\xfe\x00",
    ],
)
def test_files_in_another_than_the_official_format_are_named(name, text, tmp_path):
    MAKERS[name](tmp_path)
    row = BENCHMARKS[name]
    wanted = row.files[0].names(row.default_split)
    (path,) = (path for path in tmp_path.rglob("*") if path.name in wanted)
    path.write_bytes(text)
    with pytest.raises(DataError) as error:
        open_benchmark(name, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "again" in str(error.value)


@pytest.mark.parametrize("name", ALL)
def test_images_of_another_set_are_not_those_of_the_benchmark(name, tmp_path):
    records = MAKERS[name](tmp_path)
    folder = Path(open_benchmark(name, tmp_path)[0].media).parent  # type: ignore
    for path in list(folder.iterdir()):
        path.rename(folder / f"other_{path.name}")
    with pytest.raises(DataError, match=r"none of the 2 (images|clips)") as error:
        open_benchmark(name, tmp_path)
    assert records[0].media in str(error.value)


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="textvqa"):
        open_benchmark("textqva", tmp_path)
    vqav2(tmp_path)
    with pytest.raises(ConfigError, match="test-dev"):
        open_benchmark("vqav2", tmp_path, "testdev")
    with pytest.raises(DataError, match=r"no such folder.*visualqa"):
        open_benchmark("vqav2", tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["textvqa", "vqav2", "vizwiz", "msrvtt_qa", "ivqa"])
def test_a_question_without_answers_is_refused(name, tmp_path):
    MAKERS[name](tmp_path)

    def first(data):
        del data["data"][0]["answers"]

    def annotated(data):
        data["annotations"][1]["answers"] = []

    def listed(data):
        data[1]["answers"] = []

    def blank(data):
        data[1]["answer"] = ""

    changes = {
        "textvqa": ("TextVQA_0.5.1_val.json", first, "question 34602 has no answer;"),
        "vqav2": ("v2_mscoco_val2014_annotations.json", annotated, "question 42001 has no answer;"),
        "vizwiz": ("Annotations/val.json", listed, "VizWiz_val_00000001.jpg has no answer;"),
        "msrvtt_qa": ("test_qa.json", blank, "question 170860 has no answer;"),
    }
    if name == "ivqa":
        path = tmp_path / "test.csv"
        path.write_text(path.read_text() + "ccccccccccc,1,2,Why?" + "," * 10 + "\n")
        match = "question 2 has no answer;"
    else:
        file, change, match = changes[name]
        edit(tmp_path / file, change)
    with pytest.raises(DataError, match=match):
        open_benchmark(name, tmp_path)


def test_a_caption_that_is_not_text_and_an_image_without_any_are_refused(tmp_path):
    msrvtt(tmp_path)
    path = tmp_path / "test_videodatainfo.json"
    text = path.read_text()
    edit(path, lambda data: data["sentences"][3].update(caption=None))
    with pytest.raises(DataError, match="video7011 has the caption None"):
        open_benchmark("msrvtt", tmp_path)
    path.write_text(text)
    edit(path, lambda data: data.update(sentences=data["sentences"][::2]))
    with pytest.raises(DataError, match="video7011 has no caption"):
        open_benchmark("msrvtt", tmp_path)


def test_repeated_ids_are_refused(tmp_path):
    flickr8k(tmp_path / "a")
    edit(tmp_path / "a/dataset_flickr8k.json", lambda d: d["images"].append(d["images"][0]))
    with pytest.raises(DataError, match=r"2258277193_586949ec62\.jpg is listed twice"):
        open_benchmark("flickr8k", tmp_path / "a")
    for part, file in (
        ("questions", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("annotations", "v2_mscoco_val2014_annotations.json"),
    ):
        folder = tmp_path / part
        vqav2(folder)
        edit(folder / file, lambda d, part=part: d[part].append(d[part][0]))
        with pytest.raises(DataError, match="262148000"):
            open_benchmark("vqav2", folder)


def test_a_repeated_question_id_is_refused(tmp_path):
    MAKERS["textvqa"](tmp_path)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    edit(path, lambda data: data["data"][2].update(question_id=34602))
    with pytest.raises(DataError, match="question 34602 is listed twice"):
        open_benchmark("textvqa", tmp_path)


def test_questions_and_annotations_of_different_releases_are_refused(tmp_path):
    vqav2(tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    text = annotations.read_text()
    edit(annotations, lambda data: data["annotations"].pop())
    with pytest.raises(DataError, match="262148002 is not in v2_mscoco_val2014_annotations"):
        open_benchmark("vqav2", tmp_path)
    annotations.write_text(text)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    edit(path, lambda data: data["questions"].pop(0))
    with pytest.raises(DataError, match="lacks 1 annotated questions, such as 262148000"):
        open_benchmark("vqav2", tmp_path)


def test_a_clip_that_the_mapping_lacks_is_refused(tmp_path):
    MAKERS["msvd_qa"](tmp_path)
    (tmp_path / "youtube_mapping.txt").write_text("0lh_UWF9ZP4_62_69 vid1451\n")
    with pytest.raises(DataError, match=r"test_qa\.json: not in the official format.*1452"):
        open_benchmark("msvd_qa", tmp_path)


def test_a_question_with_too_few_answers_makes_the_split_unofficial(tmp_path):
    records = vqav2(tmp_path)
    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    edit(path, lambda data: data["annotations"][0]["answers"].pop())
    source = BenchmarkSource(shrunk("vqav2", records), tmp_path)
    assert not source.official
    assert "1 questions without exactly 10 answers" in source.note


def test_a_corrupt_zip_is_named(tmp_path):
    vqav2(tmp_path)
    move_into_zip(tmp_path / "val2014", tmp_path / "val2014.zip")
    data = (tmp_path / "val2014.zip").read_bytes()
    (tmp_path / "val2014.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"val2014\.zip: not a readable zip"):
        open_benchmark("vqav2", tmp_path)


def test_a_blank_caption_stays_beside_others_and_none_but_blank_ones_are_refused(tmp_path):
    msrvtt(tmp_path)
    path = tmp_path / "test_videodatainfo.json"
    edit(path, lambda data: data["sentences"][0].update(caption=" "))
    assert open_benchmark("msrvtt", tmp_path)[0].captions[0] == " "
    edit(path, lambda data: [sentence.update(caption=" ") for sentence in data["sentences"]])
    with pytest.raises(DataError, match="video7010 has no caption"):
        open_benchmark("msrvtt", tmp_path)
