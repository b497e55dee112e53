"""iVQA: 2,000 test clips of instruction videos, one question and five answers each.

Page: https://antoyang.github.io/just-ask.html#ivqa. License: for research; the clips belong to
their YouTube owners and are not distributed, so that a copy is seldom complete.

Files: {train,val,test}.csv with the columns video_id, start, end, question, answer1 … answer5;
one's own clips in video/, cut and named <video_id>_<start>_<end> with any suffix of a clip. Splits
(clips and questions): train 5,994; val 2,000; test 2,000.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_csv
from vadapter.data.benchmarks.formats import by_media
from vadapter.data.example import Question

PAGE = "https://antoyang.github.io/just-ask.html#ivqa"
_SPLITS = same("train", "val", "test")
_ANSWERS = [f"answer{n}" for n in range(1, 6)]

FILE = File("{split}.csv", PAGE, _SPLITS)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The clips of a split, each with its question, which is named by its place in the file."""
    where, data = read_csv(folder, FILE, split)

    def asked() -> Iterator[tuple[str, str, Question]]:
        for n, row in enumerate(data):
            name = f"{row['video_id']}_{row['start']}_{row['end']}"
            answers = tuple(row[key] for key in _ANSWERS if row[key])
            yield name, name, Question(row["question"], answers, "", str(n))

    with official(where):
        yield from by_media(asked())


BENCHMARK = Benchmark(
    name="ivqa",
    task="question",
    media="clip",
    splits={
        "train": Counts(5_994, 5_994),
        "val": Counts(2_000, 2_000),
        "test": Counts(2_000, 2_000),
    },
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=(Place(("video",), PAGE, _SPLITS),),
    read=read,
    training="train",
)
