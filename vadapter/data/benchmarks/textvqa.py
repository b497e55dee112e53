"""TextVQA v0.5.1: 5,000 validation questions about 3,166 images with text, ten answers each.

Page: https://textvqa.org/dataset/. License: questions and answers CC BY 4.0; images are those of
Open Images (CC BY 2.0). Some images are stored rotated; they are read as they are stored, and no
OCR tokens are. Answers of the test split are not public.

Files: TextVQA_0.5.1_{train,val,test}.json; train_images/ (train and val) and test_images/, or
train_val_images.zip and test_images.zip. Splits (images, questions): train 21,953, 34,602; val
3,166, 5,000; test 3,289, 5,734.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_json
from vadapter.data.benchmarks.formats import by_media
from vadapter.data.example import Question

PAGE = "https://textvqa.org/dataset/"

FILE = File("TextVQA_0.5.1_{split}.json", PAGE, same("train", "val", "test"))


def read(folder: Path, split: str) -> Iterator[Record]:
    """The images of a split with their questions.

    {"data": [{"image_id", "question", "question_id", "answers": […] (not of test), …}], …}
    """
    where, data = read_json(folder, FILE, split)

    def asked() -> Iterator[tuple[str, str, Question]]:
        for item in data["data"]:
            answers = tuple(item.get("answers", ()))
            question = Question(item["question"], answers, "", str(item["question_id"]))
            yield item["image_id"], item["image_id"], question

    with official(where):
        yield from by_media(asked())


BENCHMARK = Benchmark(
    name="textvqa",
    task="question",
    media="image",
    splits={
        "train": Counts(21_953, 34_602, 10),
        "val": Counts(3_166, 5_000, 10),
        "test": Counts(3_289, 5_734, 0),
    },
    split="val",
    homepage=PAGE,
    files=(FILE,),
    places=(
        Place(("train_images",), PAGE, same("train", "val"), ("train_val_images.zip",)),
        Place(("test_images",), PAGE, same("test"), ("test_images.zip",)),
    ),
    read=read,
    training="train",
)
