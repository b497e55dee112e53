"""OK-VQA: 5,046 questions about 5,033 COCO val2014 images that need knowledge, ten answers each.

Page: https://okvqa.allenai.org/download.html. License: annotations CC BY 4.0; images belong to
their Flickr owners. The answers are those of five annotators, stemmed, each twice, as the official
files have them ("answer"; "raw_answer" is not read).

Files, or <name>.zip with them: OpenEnded_mscoco_{train2014,val2014}_questions.json,
mscoco_{train2014,val2014}_annotations.json; train2014 and val2014 as folders or zips. Splits
(images, questions): train 8,998, 9,009; val 5,033, 5,046.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record

PAGE = "https://okvqa.allenai.org/download.html"
_NAMES = {"train": "train2014", "val": "val2014"}

QUESTIONS = File(
    "OpenEnded_mscoco_{split}_questions.json", PAGE, _NAMES, ("OpenEnded_mscoco_*.json.zip",)
)
ANNOTATIONS = File(
    "mscoco_{split}_annotations.json", PAGE, _NAMES, ("mscoco_*_annotations.json.zip",)
)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The images of a split with their questions; scores are broken down by "question_type"."""
    images = f"COCO_{_NAMES[split]}_{{:012d}}"
    return formats.vqa(folder, split, QUESTIONS, ANNOTATIONS, images, "question_type")


BENCHMARK = Benchmark(
    name="okvqa",
    task="question",
    media="image",
    splits={"train": Counts(8_998, 9_009, 10), "val": Counts(5_033, 5_046, 10)},
    split="val",
    homepage=PAGE,
    files=(QUESTIONS, ANNOTATIONS),
    places=(Place(("{split}",), PAGE, _NAMES, ("{split}.zip",)),),
    read=read,
    training="train",
)
