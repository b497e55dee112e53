"""MSVD-QA: 13,157 test questions about 504 clips of MSVD, one answer of a word each.

Pages: https://github.com/xudejing/video-question-answering (questions) and
https://www.cs.utexas.edu/~ml/clamp/videoDescription/ (clips). License: for research; the clips
belong to their YouTube owners.

Files: {train,val,test}_qa.json; youtube_mapping.txt, whose lines "<name> vid<number>" say which
clip a "video_id" is; YouTubeClips/ or YouTubeClips.tar with <name>.avi. Splits (clips with
questions, questions): train 1,161, 30,933; val 245, 6,415; test 504, 13,157.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import formats
from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_text

PAGE = "https://github.com/xudejing/video-question-answering"
CLIPS_PAGE = "https://www.cs.utexas.edu/~ml/clamp/videoDescription/"
_SPLITS = same("train", "val", "test")

FILE = File("{split}_qa.json", PAGE, _SPLITS)
NAMES = File("youtube_mapping.txt", PAGE, _SPLITS)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The clips of a split with their questions; scores are broken down by the first word."""
    where, text = read_text(folder, NAMES, split)
    with official(where):
        pairs = [line.split() for line in text.splitlines() if line.strip()]
        names = {int(number.removeprefix("vid")): name for name, number in pairs}
    yield from formats.video_qa(folder, split, FILE, names)


BENCHMARK = Benchmark(
    name="msvd_qa",
    task="question",
    media="clip",
    splits={
        "train": Counts(1_161, 30_933, 1),
        "val": Counts(245, 6_415, 1),
        "test": Counts(504, 13_157, 1),
    },
    split="test",
    homepage=PAGE,
    files=(FILE, NAMES),
    places=(Place(("YouTubeClips",), CLIPS_PAGE, _SPLITS, ("YouTubeClips.tar",)),),
    read=read,
    training="train",
)
