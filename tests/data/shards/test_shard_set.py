"""Which files a split or a pattern names, and what is missing."""

import pytest

from vadapter.data.shards.shard_set import find
from vadapter.errors import ConfigError, DataError


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()


def test_a_split_is_its_numbered_shards_in_order_of_their_numbers(tmp_path):
    touch(tmp_path, *(f"train-{i}.tar" for i in range(11)), "train-x-0.tar", "val-0.tar", "a.tar")
    assert find(tmp_path, ".tar", "train", None) == [f"train-{i}.tar" for i in range(11)]
    assert find(tmp_path, ".tar", "train-x", None) == ["train-x-0.tar"]


def test_the_hubs_names_say_how_many_there_are(tmp_path):
    names = [f"train-{i:05d}-of-00003-1a2b3c.parquet" for i in range(3)]
    touch(tmp_path, *names)
    assert find(tmp_path, ".parquet", "train", None) == names
    (tmp_path / names[2]).unlink()
    with pytest.raises(DataError, match="number 2 of 'train' is missing \\(2 exist\\)"):
        find(tmp_path, ".parquet", "train", None)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("t-000.tar", "t-002.tar"), "number 1 of 't' is missing"),
        (("t-002.tar", "t-003.tar"), "number 1 of 't' is missing"),
        (("t-000.tar", "t-00.tar"), "number 0 of 't' is duplicated"),
        (("u-000.tar", "v-000.tar"), r"no shards t-NNN\.tar; splits in the folder: u, v"),
        ((), "check the path"),
    ],
)
def test_a_gap_in_the_numbers_is_named(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        find(tmp_path, ".tar", "t", None)


def test_shards_may_be_counted_from_one(tmp_path):
    touch(tmp_path, "t-1.tar", "t-2.tar")
    assert find(tmp_path, ".tar", "t", None) == ["t-1.tar", "t-2.tar"]


def test_a_glob_matches_existing_files_and_a_range_requires_all(tmp_path):
    touch(tmp_path, "00000.tar", "00001.tar", "00003.tar", "b/00000.tar")
    assert find(tmp_path, ".tar", None, "*.tar") == ["00000.tar", "00001.tar", "00003.tar"]
    assert find(tmp_path, ".tar", None, "*/*.tar") == ["b/00000.tar"]
    assert find(tmp_path, ".tar", "train", "0000{0..1}.tar") == ["00000.tar", "00001.tar"]
    assert find(tmp_path, ".tar", None, "{00000..00001}.tar") == ["00000.tar", "00001.tar"]
    with pytest.raises(DataError, match=r"no shard 00002\.tar \(1 of 4 are missing\)"):
        find(tmp_path, ".tar", None, "{00000..00003}.tar")
    with pytest.raises(DataError, match=r"no shards x\*\.tar; check the path"):
        find(tmp_path, ".tar", None, "x*.tar")


@pytest.mark.parametrize("pattern", ["../*.tar", "/data/*.tar", "a/../../b.tar"])
def test_a_pattern_stays_in_the_folder(tmp_path, pattern):
    with pytest.raises(ConfigError, match="leaves the folder"):
        find(tmp_path, ".tar", None, pattern)


def test_neither_split_nor_pattern_is_a_mistake(tmp_path):
    with pytest.raises(ConfigError, match=r"name the split, or the shards by a pattern"):
        find(tmp_path, ".tar", None, None)
