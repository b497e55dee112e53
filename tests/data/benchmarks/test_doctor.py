"""`vadapter data doctor`: what is there, what is missing, and where it officially comes from."""

import shutil

import pytest
from support import guides
from support.official_files import MAKERS, vqav2

from vadapter.cli.main import main
from vadapter.data.benchmarks.table import BENCHMARKS


def run(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["data", "doctor", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_without_a_name_it_lists_all(capsys):
    code, text = run(capsys)
    assert code == 0
    for name, row in BENCHMARKS.items():
        (line,) = (line for line in text.splitlines() if line.split()[0] == name)
        media, texts, _ = row.splits[row.default_split]
        assert f"{media:,}" in line
        assert f"{texts:,}" in line
        assert row.homepage in line


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_an_empty_folder_misses_every_file_with_its_page(name, tmp_path, capsys):
    code, text = run(capsys, name, f"--dir={tmp_path}")
    assert code == 78
    for item in (*BENCHMARKS[name].files, *BENCHMARKS[name].media_sets):
        assert item.page in text
    assert text.count("MISSING") >= 2


@pytest.mark.parametrize("name", sorted(BENCHMARKS))
def test_a_small_copy_can_be_scored_and_is_called_partial(name, tmp_path, capsys):
    MAKERS[name](tmp_path)
    code, text = run(capsys, name, f"--dir={tmp_path}")
    assert code == 0
    assert "PARTIAL" in text
    assert "scores are not official" in text


def test_without_training_questions_there_are_no_examples_for_prompts(tmp_path, capsys):
    vqav2(tmp_path)
    (tmp_path / "v2_mscoco_train2014_annotations.json").unlink()
    code, text = run(capsys, "vqav2", f"--dir={tmp_path}")
    assert code == 78
    assert "no v2_mscoco_train2014_annotations.json" in text


def test_unreadable_files_are_reported(tmp_path, capsys):
    vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").write_text("<html>")
    code, text = run(capsys, "vqav2", f"--dir={tmp_path}")
    assert code == 78
    assert "UNUSABLE" in text
    assert "not JSON" in text
    shutil.rmtree(tmp_path / "val2014")
    (tmp_path / "v2_Questions_Val_mscoco.zip").write_bytes(b"PK torn")
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").unlink()
    code, text = run(capsys, "vqav2", f"--dir={tmp_path}")
    assert code == 78
    assert "v2_Questions_Val_mscoco.zip: not a readable zip" in text


@pytest.mark.data
@pytest.mark.parametrize("name", ["flickr8k", "daquar"])
def test_the_real_sets_are_complete(name, data_root, capsys):
    code, text = run(capsys, name, f"--dir={data_root / name}")
    assert code == 0
    assert "PARTIAL" not in text
    counts = BENCHMARKS[name].splits["test"]
    task = BENCHMARKS[name].task
    assert f"complete: {counts.media:,} images, {counts.texts:,} {task}s" in text


def test_an_unknown_name_suggests_the_nearest(capsys):
    code, text = run(capsys, "coko")
    assert code == 78
    assert "coco" in text


def test_the_readme_lists_counts_and_pages_of_all():
    readme = guides.read("vadapter/evaluate/README.md")
    for name, row in BENCHMARKS.items():
        (line,) = (line for line in readme.splitlines() if line.startswith(f"| {name} | "))
        media, texts, _ = row.splits[row.default_split]
        assert f"| {row.default_split} | {media:,} {row.media}s, {texts:,} {row.task}s |" in line
        assert f"({row.homepage})" in line


def test_cache_and_eval_use_the_same_folder(tmp_path, monkeypatch, capsys):
    vqav2(tmp_path / "data" / "vqav2")
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "vqav2") == (0, *run(capsys, "vqav2", "--dir=data/vqav2")[1:])
