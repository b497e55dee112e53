"""VQA v2.0: 214,354 validation questions about 40,504 COCO images, ten answers each.

Page: https://visualqa.org/download.html. License: questions and answers CC BY 4.0; images belong to
their Flickr owners. Answers of test-dev and test are not public: their score comes from the
challenge's server, for the submission file.

Files, or the official zips with them: v2_OpenEnded_mscoco_{train2014,val2014,test-dev2015,test2015}
_questions.json, v2_mscoco_{train2014,val2014}_annotations.json; train2014, val2014, test2015 as
folders or zips. Splits (images, questions): train 82,783, 443,757; val 40,504, 214,354; test-dev
36,807, 107,394; test 81,434, 447,793.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record

PAGE = "https://visualqa.org/download.html"
_ANSWERED = {"train": "train2014", "val": "val2014"}
_QUESTIONS = {**_ANSWERED, "test-dev": "test-dev2015", "test": "test2015"}
_IMAGES = {**_ANSWERED, "test-dev": "test2015", "test": "test2015"}

QUESTIONS = File(
    "v2_OpenEnded_mscoco_{split}_questions.json", PAGE, _QUESTIONS, ("v2_Questions_*_mscoco.zip",)
)
ANNOTATIONS = File(
    "v2_mscoco_{split}_annotations.json", PAGE, _ANSWERED, ("v2_Annotations_*_mscoco.zip",)
)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The images of a split with their questions; scores are broken down by "answer_type"."""
    images = f"COCO_{_IMAGES[split]}_{{:012d}}"
    return formats.vqa(folder, split, QUESTIONS, ANNOTATIONS, images, "answer_type")


BENCHMARK = Benchmark(
    name="vqav2",
    task="question",
    media="image",
    splits={
        "train": Counts(82_783, 443_757, 10),
        "val": Counts(40_504, 214_354, 10),
        "test-dev": Counts(36_807, 107_394, 0),
        "test": Counts(81_434, 447_793, 0),
    },
    split="val",
    homepage=PAGE,
    files=(QUESTIONS, ANNOTATIONS),
    places=(Place(("{split}",), PAGE, _IMAGES, ("{split}.zip",)),),
    read=read,
    training="train",
)
