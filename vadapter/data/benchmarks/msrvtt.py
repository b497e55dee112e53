"""MSR-VTT captions: 2,990 test clips with twenty captions each.

Page: https://www.microsoft.com/en-us/research/publication/
msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/ (its download links come
and go). License: for research; the clips belong to their YouTube owners.

Files: train_val_videodatainfo.json and test_videodatainfo.json, or the zips with them;
TrainValVideo/ and TestVideo/, or train_val_videos.zip and test_videos.zip; all clips may also lie
in videos/all/. Splits (clips, captions): train 6,513, 130,260; val 497, 9,940; test 2,990, 59,800.
"""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, File, Place, Record, same
from vadapter.data.benchmarks.files import official, read_json

PAGE = (
    "https://www.microsoft.com/en-us/research/publication/"
    "msr-vtt-a-large-video-description-dataset-for-bridging-video-and-language/"
)
_NAMES = {"train": "train", "val": "validate", "test": "test"}  # ours -> theirs
_FILES = {"train": "train_val", "val": "train_val", "test": "test"}

FILE = File(
    "{split}_videodatainfo.json",
    PAGE,
    _FILES,
    ("train_val_annotation.zip", "test_videodatainfo*.zip"),
)
PLACES = (
    Place(("TrainValVideo", "videos/all"), PAGE, same("train", "val"), ("train_val_videos.zip",)),
    Place(("TestVideo", "videos/all"), PAGE, same("test"), ("test_videos.zip",)),
)


def read(folder: Path, split: str) -> Iterator[Record]:
    """The clips of a split with their captions.

    {"videos": [{"video_id", "split", …}], "sentences": [{"video_id", "caption", …}], …}
    """
    where, data = read_json(folder, FILE, split)
    with official(where):
        captions: dict[str, list[str]] = {
            video["video_id"]: [] for video in data["videos"] if video["split"] == _NAMES[split]
        }
        for sentence in data["sentences"]:
            if sentence["video_id"] in captions:
                captions[sentence["video_id"]].append(sentence["caption"])
    for name, texts in captions.items():
        yield Record(name, name, tuple(texts))


BENCHMARK = Benchmark(
    name="msrvtt",
    task="caption",
    media="clip",
    splits={
        "train": Counts(6_513, 130_260, 20),
        "val": Counts(497, 9_940, 20),
        "test": Counts(2_990, 59_800, 20),
    },
    split="test",
    homepage=PAGE,
    files=(FILE,),
    places=PLACES,
    read=read,
)
