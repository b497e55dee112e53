"""DAQUAR, full: 5,673 test questions about 653 indoor photos of NYU Depth v2.

Page: https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/
vision-and-language/visual-turing-challenge. License: for research.

Files: qa.894.raw.{train,test}.txt with nyu_depth_images/ (or nyu_depth_images.tar), or qa.jsonl
with tar shards <split>-NNN.tar, as `CaptionTars` reads them. Splits (photos with questions,
questions): train 794, 6,795; test 653, 5,673, as the files have them; the paper counts 6,794 and
5,674. An answer that is a set is one text, its members separated by commas.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import locate, official, read_text
from vadapter.data.example import Question

PAGE = (
    "https://www.mpi-inf.mpg.de/departments/computer-vision-and-machine-learning/research/"
    "vision-and-language/visual-turing-challenge"
)
_SPLITS = same("train", "test")
_IMAGE = re.compile(r" in (?:the |this )?(image\d+)\b")

FILE = File("qa.jsonl", PAGE, _SPLITS, also=("qa.894.raw.{split}.txt",))


def read(folder: Path, split: str) -> Iterator[Record]:
    """The photos of a split with their questions."""
    found = locate(folder, FILE, split)
    if found is None or found[0].suffix == ".jsonl":
        return map(_join, formats.rows(folder, split, FILE))
    return _read_lines(folder, split)


def _join(record: Record) -> Record:
    """With the members of each answer as one text; exact match is of the whole."""
    qa = (question._replace(answers=(", ".join(question.answers),)) for question in record.qa)
    return record._replace(qa=tuple(qa))


def _read_lines(folder: Path, split: str) -> Iterator[Record]:
    """The official form: a line with a question that names its photo, then one with the answer."""
    where, text = read_text(folder, FILE, split)
    lines = [line.strip() for line in text.splitlines() if line.strip()]

    def asked() -> Iterator[tuple[str, str, Question]]:
        for n, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            photo = _IMAGE.findall(question)[-1]
            yield photo, photo, Question(_IMAGE.sub("", question), (answer,), "", str(n))

    with official(where):
        yield from formats.by_media(asked())


BENCHMARK = Benchmark(
    name="daquar",
    task="question",
    media="image",
    splits={"train": Counts(794, 6_795, 1), "test": Counts(653, 5_673, 1)},
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=(
        Place(("nyu_depth_images",), PAGE, _SPLITS, ("{split}-*.tar", "nyu_depth_images.tar")),
    ),
    read=read,
    training="train",
)
