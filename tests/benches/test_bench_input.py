"""The input benchmark counts the samples that each side has read, and both read the same."""

import collections
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.clips import clip, image, numbers
from support.patches import use_clock

from benches import bench_input
from benches.bench_input import CAPTION, NEEDS, as_text, bench, main, photos
from vadapter.data.media.frames import load_media, load_square
from vadapter.data.media.images import ImageTransform
from vadapter.data.tokenizers.bpe import BPETokenizer
from vadapter.errors import DataError


@pytest.fixture
def images(tmp_path):
    return photos(tmp_path, 6, (30, 40))


@pytest.fixture
def clips(tmp_path):
    paths = [tmp_path / f"{n}.mkv" for n in range(3)]
    for path in paths:
        path.write_bytes(clip([image(i) for i in range(16)]))
    return paths


@pytest.fixture
def reader(tmp_path):
    """What reads files in batches, by the side."""

    def make(side, files, batch, size=16):
        tokenizer = BPETokenizer.train([CAPTION], 300)
        if side in ("ours", "fast"):
            how = {"decode": "fast"} if side == "fast" else {}
            return bench_input.our_reader(tmp_path, files, tokenizer, size, 8, batch, **how)
        pytest.importorskip("torch")
        torch_files, why = bench_input.torch_reader()
        assert torch_files is not None, why
        return torch_files(files, tokenizer, size, 8, batch)

    return make


@pytest.fixture
def clock(monkeypatch):
    """CPU seconds, which pass only where a test adds them to `clock[0]`."""
    return use_clock(monkeypatch, name="process_time")


@pytest.fixture
def no_torch(monkeypatch, tmp_path_factory):
    """Importing torch fails as where it is not installed."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_a_rate_is_what_was_read_by_its_time_and_the_first_round_does_not_count(clock):
    seconds = iter([100.0, 2.0, 4.0])

    def read():
        yield from (3, 5)
        clock[0] += next(seconds)

    assert bench_input._rates({"ours": read}, 2) == {"ours": [4.0, 2.0]}


def test_the_sides_take_turns(clock):
    turns = []

    def read(side):
        turns.append(side)
        clock[0] += 1.0
        yield 1

    sides = {side: lambda side=side: read(side) for side in ("ours", "torch")}
    bench_input._rates(sides, 2)
    assert turns == ["ours", "torch"] * 3


@pytest.mark.parametrize("side", ["ours", "fast", "torch"])
@pytest.mark.parametrize("batch", [1, 3])
def test_each_side_decodes_every_image_once_a_pass_and_counts_it(
    images, reader, monkeypatch, side, batch
):
    decoded = collections.Counter()
    read = reader(side, images, batch)
    known = Image.open

    def opened(file, **kwargs):
        decoded[Path(getattr(file, "name", file)).name] += 1
        return known(file, **kwargs)

    monkeypatch.setattr(Image, "open", opened)
    for passes in (1, 2):
        assert list(read()) == [batch] * (6 // batch)
        assert decoded == {path.name: passes for path in images}


@pytest.mark.parametrize("side", ["ours", "torch"])
def test_each_side_scales_eight_frames_of_every_clip_and_counts_clips(
    clips, reader, monkeypatch, side
):
    scaled = []
    read = reader(side, clips, 1)
    known = Image.Image.resize

    def resize(frame, *args, **kwargs):
        scaled.append(np.asarray(frame))
        return known(frame, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", resize)
    assert list(read()) == [1, 1, 1]
    assert numbers(np.stack(scaled)) == [1, 3, 5, 7, 9, 11, 13, 15] * 3


def test_both_sides_make_the_same_pixels_of_an_image(images):
    theirs = bench_input._square(Image.open(images[0]).convert("RGB"), 16)
    np.testing.assert_array_equal(load_square(images[0], ImageTransform(16), frames=1)[0], theirs)


def test_the_frames_of_a_clip_are_uniform_on_both_sides(clips):
    theirs = np.stack([np.asarray(frame) for frame in bench_input._pyav(clips[0], 8)])
    assert numbers(theirs) == [1, 3, 5, 7, 9, 11, 13, 15]
    assert numbers(load_media(clips[0], frames=8)) == numbers(theirs)
    assert numbers(np.stack([np.asarray(f) for f in bench_input._pyav(clips[0], 1)])) == [8]


def test_a_clip_of_fewer_frames_than_shown_repeats_them(tmp_path):
    (tmp_path / "short.mkv").write_bytes(clip([image(0), image(1)]))
    shown = bench_input._pyav(tmp_path / "short.mkv", 8)
    assert numbers(np.stack([np.asarray(frame) for frame in shown])) == [0] * 4 + [1] * 4


def test_results_are_json_with_the_ratio_of_medians_and_the_cores_needed(images, clips):
    pytest.importorskip("torch")
    found = bench({"images": images, "clips": clips}, size=16, rounds=2)
    assert json.loads(json.dumps(found)) == found
    assert (found["size"], found["rounds"], found["without_torch"]) == (16, 2, "")
    assert {name: row["files"] for name, row in found["kinds"].items()} == {"images": 6, "clips": 3}
    for row in found["kinds"].values():
        assert row["ours"] > 0
        assert row["ratio"] > 0
        assert row["cores"] == {what: need / row["ours"] for what, need in NEEDS.items()}
    mean = sum(path.stat().st_size for path in images) / 6000
    assert found["kinds"]["images"]["kilobytes"] == pytest.approx(mean)
    text = as_text(found)
    assert "one H200 (230 samples/s)" in text
    assert "no torch column" not in text


def test_without_torch_it_times_this_loader_and_says_how_to_get_the_other(images, no_torch):
    found = bench({"images": images}, size=16, rounds=1)
    (row,) = found["kinds"].values()
    assert row["ours"] > 0
    assert "torch" not in row
    assert "ratio" not in row
    assert row["fast"] > 0
    assert row["difference"] == 0  # of 40 × 30 pixels, too small to be decoded smaller
    assert "no torch column: No module named 'torch'; pip install 'vad" in as_text(found)


def test_large_images_are_read_fast_too_and_the_difference_of_their_levels_is_stated(
    tmp_path, reader, no_torch
):
    files = photos(tmp_path / "large", 2, (120, 160))
    found = bench({"images": files}, size=16, rounds=1)
    (row,) = found["kinds"].values()
    assert 0 < row["difference"] < 4
    assert f"{row['fast']:.1f}" in as_text(found)


def test_a_file_that_cannot_be_read_stops_it(images, reader):
    images[2].write_bytes(b"<html>")
    with pytest.raises(DataError, match=r"unusable files: \[2\]"):
        list(reader("ours", images, 2)())


def test_made_images_are_detailed_and_the_same_every_time(tmp_path):
    paths = [photos(tmp_path / name, 2) for name in ("a", "b")]
    assert [p.read_bytes() for p in paths[0]] == [p.read_bytes() for p in paths[1]]
    assert paths[0][0].read_bytes() != paths[0][1].read_bytes()
    assert load_media(paths[0][0], frames=1).shape == (1, 480, 640, 3)
    assert 60_000 < paths[0][0].stat().st_size < 200_000


def test_the_command_prints_a_table_or_json_and_names_a_folder_without_files(
    images, tmp_path, capsys, no_torch
):
    main([f"--images={tmp_path}", "--rounds=1", "--size=16", "--limit=2", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["kinds"].values()
    assert row["files"] == 2
    main([f"--images={tmp_path}", "--rounds=1", "--size=16"])
    assert capsys.readouterr().out.startswith("Samples per CPU second on one thread, 16 pixels, ")
    with pytest.raises(DataError, match=r"no files of type .*\.mp4"):
        main([f"--images={tmp_path}", f"--clips={tmp_path}"])
