"""VizWiz-VQA: 4,319 validation photos of blind people, one question and ten answers each.

Page: https://vizwiz.org/tasks-and-datasets/vqa/. License: CC BY 4.0. Answers of the test split are
not public. "unanswerable" is an answer like any other.

Files: {train,val,test}.json, also in Annotations/ or Annotations.zip; train, val, test as folders
or zips. Splits (images and questions): train 20,523; val 4,319; test 8,000. A few answers are
blank, and stay so.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_json
from vadapter.data.example import Question

PAGE = "https://vizwiz.org/tasks-and-datasets/vqa/"
_SPLITS = same("train", "val", "test")

FILE = File("{split}.json", PAGE, _SPLITS, ("Annotations.zip",), ("Annotations", "annotations"))


def read(folder: Path, split: str) -> Iterator[Record]:
    """The images of a split, each with its question, which is named after its image.

    [{"image", "question", "answers": [{"answer", …}] and "answer_type" (not of test)}, …]
    """
    where, data = read_json(folder, FILE, split)
    with official(where):
        for item in data:
            answers = tuple(answer["answer"] for answer in item.get("answers", ()))
            name = item["image"]
            question = Question(item["question"], answers, item.get("answer_type", ""), name)
            yield Record(name, PurePosixPath(name).stem, qa=(question,))


BENCHMARK = Benchmark(
    name="vizwiz",
    task="question",
    media="image",
    splits={
        "train": Counts(20_523, 20_523, 10),
        "val": Counts(4_319, 4_319, 10),
        "test": Counts(8_000, 8_000, 0),
    },
    split="val",
    homepage=PAGE,
    files=(FILE,),
    places=(Place(("{split}",), PAGE, _SPLITS, ("{split}.zip",)),),
    read=read,
    training="train",
)
