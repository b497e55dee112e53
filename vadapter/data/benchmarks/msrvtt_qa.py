"""MSRVTT-QA: 72,821 test questions about MSR-VTT's 2,990 test clips, one answer of a word each.

Page: https://github.com/xudejing/video-question-answering (questions); the clips are those of
`msrvtt`. License: for research; the clips belong to their YouTube owners.

Files: {train,val,test}_qa.json; the clips as for `msrvtt`. Splits (clips, questions): train 6,513,
158,581; val 497, 12,278; test 2,990, 72,821.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Record, same
from vadapter.data.benchmarks.msrvtt import PLACES

PAGE = "https://github.com/xudejing/video-question-answering"

FILE = File("{split}_qa.json", PAGE, same("train", "val", "test"))


def read(folder: Path, split: str) -> Iterator[Record]:
    """The clips of a split with their questions; scores are broken down by the first word."""
    return formats.video_qa(folder, split, FILE, None)


BENCHMARK = Benchmark(
    name="msrvtt_qa",
    task="question",
    media="clip",
    splits={
        "train": Counts(6_513, 158_581, 1),
        "val": Counts(497, 12_278, 1),
        "test": Counts(2_990, 72_821, 1),
    },
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=PLACES,
    read=read,
    training="train",
)
