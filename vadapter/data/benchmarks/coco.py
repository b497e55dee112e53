"""COCO captions, Karpathy's split: 5,000 test images with five captions each, a few with more.

Page: https://cs.stanford.edu/people/karpathy/deepimagesent/ (split, captions) and
https://cocodataset.org/#download (images). License: annotations CC BY 4.0; images belong to their
Flickr owners.

Files: dataset_coco.json or caption_datasets.zip with it; val2014/ or val2014.zip, and train2014
for training. Splits (images, captions): train 113,287, 566,747 (with the "restval" images); val
5,000, 25,010; test 5,000, 25,010.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
SPLIT_PAGE = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
IMAGES_PAGE = "https://cocodataset.org/#download"

FILE = File("dataset_coco.json", SPLIT_PAGE, same(*SPLITS), ("caption_datasets.zip",))


def read(folder: Path, split: str) -> Iterator[Record]:
    """The images of a split with their captions; the id is COCO's."""
    return formats.karpathy(folder, split, FILE, SPLITS[split])


BENCHMARK = Benchmark(
    name="coco",
    task="caption",
    media="image",
    splits={
        "train": Counts(113_287, 566_747),
        "val": Counts(5_000, 25_010),
        "test": Counts(5_000, 25_010),
    },
    split="test",
    homepage=SPLIT_PAGE,
    files=(FILE,),
    places=(
        Place(("val2014",), IMAGES_PAGE, same(*SPLITS), ("val2014.zip",)),
        Place(("train2014",), IMAGES_PAGE, same("train"), ("train2014.zip",)),
    ),
    read=read,
)
