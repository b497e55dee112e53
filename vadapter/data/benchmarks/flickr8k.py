"""Flickr8k: 1,000 test photos with five captions each.

Page: https://hockenmaier.cs.illinois.edu/8k-images.html; Karpathy's file has the same splits:
https://cs.stanford.edu/people/karpathy/deepimagesent/. License: captions for non-commercial
research and education; photos belong to their Flickr owners.

Files: dataset_flickr8k.json (or caption_datasets.zip with it) with Flicker8k_Dataset/ (or
Flickr8k_Dataset.zip), or captions.jsonl with tar shards <split>-NNN.tar, as `CaptionTars` reads
them. Splits (photos, captions): train 6,000, 30,000; val 1,000, 5,000; test 1,000, 5,000.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.coco import SPLIT_PAGE
from vadapter.data.benchmarks.files import locate

PAGE = "https://hockenmaier.cs.illinois.edu/8k-images.html"
_SPLITS = same("train", "val", "test")

FILE = File(
    "captions.jsonl",
    SPLIT_PAGE,
    _SPLITS,
    ("caption_datasets.zip",),
    also=("dataset_flickr8k.json",),
)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The photos of a split with their captions; the id is the name of the photo's file."""
    found = locate(folder, FILE, split)
    if found is None or found[0].suffix == ".jsonl":
        return formats.rows(folder, split, FILE)
    return formats.karpathy(folder, split, FILE, (split,))


BENCHMARK = Benchmark(
    name="flickr8k",
    task="caption",
    media="image",
    splits={
        "train": Counts(6_000, 30_000, 5),
        "val": Counts(1_000, 5_000, 5),
        "test": Counts(1_000, 5_000, 5),
    },
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=(
        Place(("Flicker8k_Dataset",), PAGE, _SPLITS, ("{split}-*.tar", "Flickr8k_Dataset.zip")),
    ),
    read=read,
)
