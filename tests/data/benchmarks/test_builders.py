"""The builders of TensorFlow Datasets: array_record files that hold what the official files say."""

import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from support.official_files import MAKERS, vqav2
from support.plain_files import write_json

from vadapter.cli.main import main
from vadapter.data.benchmarks import builders
from vadapter.data.benchmarks.builders import prepare
from vadapter.data.benchmarks.source import open_benchmark
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.sources.tfds import TfdsSource
from vadapter.errors import ConfigError, DataError


def read_back(path, split: str):
    return tfds.builder_from_directory(str(path)).as_data_source(split)


def test_there_is_one_for_each_benchmark():
    assert set(builders.BUILDERS) == set(BENCHMARKS)
    assert len({builder.name for builder in builders.BUILDERS.values()}) == len(BENCHMARKS)
    for name, builder in builders.BUILDERS.items():
        for item in (*BENCHMARKS[name].files, *BENCHMARKS[name].media_sets):
            assert item.page in str(builder.MANUAL_DOWNLOAD_INSTRUCTIONS)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_prepared_data_equals_the_official_files(name, tmp_path):
    MAKERS[name](tmp_path / "official")
    path = prepare(name, tmp_path / "official", tmp_path / "out")
    split = BENCHMARKS[name].default_split
    prepared = [builders.to_example(row) for row in read_back(path, split)]
    source = open_benchmark(name, tmp_path / "official")
    direct = [source[n] for n in range(len(source))]
    assert len(prepared) == len(direct) == 2
    by_id = {example.id: example for example in prepared}
    for example in direct:
        copy = by_id[example.id]
        assert copy.captions == example.captions
        assert copy.qa == example.qa
        assert copy.media == example.media.read_bytes()  # type: ignore
    assert list(path.glob(f"*-{split}.array_record-*"))


def test_a_prepared_set_can_be_trained_on(tmp_path):
    direct = {}
    for name in ("vqav2", "msrvtt"):
        MAKERS[name](tmp_path / name)
        prepare(name, tmp_path / name, tmp_path / "out")
        source = open_benchmark(name, tmp_path / name)
        direct |= {source[n].id: source.text_only(n) for n in range(len(source))}
    asked = TfdsSource("vadapter_vqav2", "val", data_dir=tmp_path / "out", columns=builders.COLUMNS)
    said = TfdsSource("vadapter_msrvtt", "test", data_dir=tmp_path / "out")
    assert (asked.kind, said.kind) == ("image", "clip")
    for example in (*(asked[n] for n in range(2)), *(said[n] for n in range(2))):
        assert isinstance(example.media, bytes)
        same = direct.pop(example.id)
        assert example.captions == same.captions
        assert [(q.text, q.answer, q.kind, q.id) for q in example.qa] == [
            (q.text, q.answer, q.kind, q.id) for q in same.qa
        ]
    assert not direct


def test_the_prepared_set_is_marked_as_partial(tmp_path):
    vqav2(tmp_path / "official")
    builder = builders.make_builder("vqav2", tmp_path / "out")
    config = tfds.download.DownloadConfig(manual_dir=tmp_path / "official")
    builder.download_and_prepare(download_config=config)
    again = tfds.builder_from_directory(str(builder.data_dir))
    assert "2 of 40,504 images" in again.info.metadata["val"]


def test_questions_without_answers_keep_their_place(tmp_path):
    folder = tmp_path / "official"
    vqav2(folder)
    asked = [{"image_id": 1, "question": f"What {n}?", "question_id": n} for n in range(2)]
    write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    (folder / "test2015").mkdir()
    (folder / "test2015/COCO_test2015_000000000001.jpg").write_bytes(b"1")
    path = prepare("vqav2", folder, tmp_path / "out")
    (row,) = read_back(path, "test_dev")
    assert [(q.text, q.answers) for q in builders.to_example(row).qa] == [
        ("What 0?", ()),
        ("What 1?", ()),
    ]


def test_an_empty_folder_is_an_error_with_the_official_page(tmp_path):
    (tmp_path / "official").mkdir()
    with pytest.raises(DataError, match=r"no dataset_coco.json.*from https://"):
        prepare("coco", tmp_path / "official", tmp_path / "out")
    with pytest.raises(ConfigError, match="unknown"):
        prepare("cocoa", tmp_path / "official", tmp_path / "out")


def test_the_command_prints_where_it_wrote(tmp_path, capsys):
    MAKERS["flickr8k"](tmp_path / "official")
    code = main(
        ["data", "prepare", "flickr8k", f"--dir={tmp_path / 'official'}", f"--out={tmp_path}"]
    )
    assert code == 0
    assert str(tmp_path / "vadapter_flickr8k" / "1.0.0") in capsys.readouterr().out


def test_neither_building_nor_reading_needs_tensorflow(tmp_path):
    MAKERS["textvqa"](tmp_path / "official")
    program = f"""
import sys
from vadapter.data.benchmarks.builders import prepare
import tensorflow_datasets as tfds
path = prepare("textvqa", r"{tmp_path / "official"}", r"{tmp_path / "out"}")
rows = tfds.builder_from_directory(str(path)).as_data_source("val")
print(len(rows), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["2", "False"]
