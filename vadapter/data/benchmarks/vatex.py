"""VATEX, English captions: 6,000 public test clips with ten captions each.

Page: https://eric-xw.github.io/vatex-website/download.html. License: captions CC BY 4.0; the clips
belong to their YouTube owners and are not distributed, so that a copy is seldom complete.

Files: vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json;
one's own clips in videos/, each named by its "videoID" (<YouTube id>_<start>_<end>, six digits)
with any suffix of a clip. Splits (clips, captions): train 25,991, 259,910; val 3,000, 30,000; test
6,000, 60,000.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_json

PAGE = "https://eric-xw.github.io/vatex-website/download.html"
_FILES = {"train": "training_v1.0", "val": "validation_v1.0", "test": "public_test_english_v1.1"}

FILE = File("vatex_{split}.json", PAGE, _FILES)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The clips of a split with their English captions: [{"videoID", "enCap": […], …}, …]."""
    where, data = read_json(folder, FILE, split)
    with official(where):
        for clip in data:
            yield Record(clip["videoID"], clip["videoID"], tuple(clip["enCap"]))


BENCHMARK = Benchmark(
    name="vatex",
    task="caption",
    media="clip",
    splits={
        "train": Counts(25_991, 259_910, 10),
        "val": Counts(3_000, 30_000, 10),
        "test": Counts(6_000, 60_000, 10),
    },
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=(Place(("videos",), PAGE, same(*_FILES)),),
    read=read,
)
