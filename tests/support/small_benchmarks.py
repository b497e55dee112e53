"""Small benchmarks in their official formats, with the images that `recipes.draw` has drawn.

flickr8k  15 test images with five captions each, and 3 of train
okvqa     3 questions about 2 images, and 2 of train about one
vqav2     the same without images of train, and 2 of test-dev, whose answers are not public
daquar    30 questions about 5 images, and 2 of train about one
"""

import json
import shutil
from pathlib import Path

from support.official_files import MAKERS, karpathy
from support.plain_files import write_json, write_media

PHOTOS = 15  # of flickr8k test
QUESTIONS = 30  # of daquar test


def write_benchmarks(root: Path, shapes: Path) -> Path:
    """Make root/NAME of each of them.

    Args:
      shapes: what `recipes.draw` filled.
    """
    for name in ("okvqa", "vqav2", "daquar"):
        MAKERS[name](root / name)
    write_media(root / "okvqa" / "train2014", ["COCO_train2014_000000000009.jpg"])
    _test_dev(root / "vqav2")
    _daquar(root / "daquar")
    files = sorted(shapes.glob("*.png"))
    for n, path in enumerate(sorted(p for p in root.rglob("*") if p.suffix in (".jpg", ".png"))):
        shutil.copy(files[n], path)
    _flickr8k(root / "flickr8k", shapes)
    return root


def _flickr8k(folder: Path, shapes: Path) -> None:
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    drawn = [json.loads(line) for line in (shapes / "images.jsonl").read_text().splitlines()]
    images = []
    for n, row in enumerate(drawn[: PHOTOS + 3]):
        name = f"{1000 + n}_{n:010x}.jpg"
        image = karpathy(name, "test" if n < PHOTOS else "train")
        for sentence, caption in zip(image["sentences"], row["captions"] * 3, strict=False):
            sentence["raw"] = caption
        images.append(image)
        shutil.copy(shapes / row["image"], folder / "Flicker8k_Dataset" / name)
    write_json(folder / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})


def _test_dev(folder: Path) -> None:
    asked = [{"image_id": n, "question": "What?", "question_id": 1000 + n} for n in (1, 2)]
    write_json(folder / "v2_OpenEnded_mscoco_test-dev2015_questions.json", {"questions": asked})
    write_media(folder / "test2015", [f"COCO_test2015_{n:012d}.jpg" for n in (1, 2)])


def _daquar(folder: Path) -> None:
    lines = [f"what is number {n} in the image{n % 5} ?\na box\n" for n in range(QUESTIONS)]
    (folder / "qa.894.raw.test.txt").write_text("".join(lines))
    write_media(folder / "nyu_depth_images", [f"image{n}.png" for n in range(5)])
