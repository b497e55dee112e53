"""Small folders in the official form of each benchmark, and what they are to be read as.

A maker writes the default split and, of questions, the training split, with the keys that the
official files have (also those that are not read), and returns the default split's records.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from support.plain_files import write_json, write_media

from vadapter.data.benchmarks.benchmark import Benchmark, Counts, Record
from vadapter.data.benchmarks.table import BENCHMARKS
from vadapter.data.example import Question

TEN = ("net", "net", "net", "netting", "net", "mesh", "net", "pitch", "net", "net")


def karpathy(name: str, split: str, cocoid: int | None = None, captions: int = 5) -> dict:
    sentences = [
        {"tokens": ["a", "man"], "raw": f"A man, number {n}.", "imgid": 0, "sentid": n}
        for n in range(captions)
    ]
    image = {"sentids": [0], "imgid": 0, "sentences": sentences, "split": split, "filename": name}
    return image | ({} if cocoid is None else {"filepath": "val2014", "cocoid": cocoid})


def sentences(count: int) -> tuple[str, ...]:
    return tuple(f"A man, number {n}." for n in range(count))


def coco(folder: Path) -> list[Record]:
    names = [f"COCO_val2014_{n:012d}.jpg" for n in (391895, 60623)]
    images = [
        karpathy(names[0], "test", 391895),
        karpathy("COCO_val2014_000000522418.jpg", "val", 522418),
        karpathy("COCO_train2014_000000000009.jpg", "restval", 9),
        karpathy(names[1], "test", 60623, captions=6),
    ]
    write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})
    write_media(folder / "val2014", names)
    return [
        Record("391895", "COCO_val2014_000000391895", sentences(5)),
        Record("60623", "COCO_val2014_000000060623", sentences(6)),
    ]


def msrvtt(folder: Path) -> list[Record]:
    def info(videos: dict[int, str]) -> dict:
        return {
            "info": {"contributor": "Microsoft MSM group", "version": "1.0", "year": "2016"},
            "videos": [
                {
                    "category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "id": n,
                    "video_id": f"video{n}", "start time": 137.72, "end time": 149.44,
                    "split": split,
                }
                for n, split in videos.items()
            ],
            # of all videos in turn: the official file is not grouped either
            "sentences": [
                {"caption": f"a car {k}", "video_id": f"video{n}", "sen_id": k}
                for k in range(20)
                for n in videos
            ],
        }  # fmt: skip

    test = info({7010: "test", 7011: "test"})
    write_json(folder / "test_videodatainfo.json", test)
    write_json(folder / "train_val_videodatainfo.json", info({0: "train", 6513: "validate"}))
    write_media(folder / "TestVideo", ["video7010.mp4", "video7011.mp4"])
    captions = tuple(f"a car {k}" for k in range(20))
    return [Record(name, name, captions) for name in ("video7010", "video7011")]


def vatex(folder: Path) -> list[Record]:
    names = ["Ptf_2VRj-V0_000122_000132", "4cRBsV5nWLs_000015_000025"]
    captions = [f"A person {n}." for n in range(10)]
    clips = [{"videoID": name, "enCap": captions} for name in names]
    write_json(folder / "vatex_public_test_english_v1.1.json", clips)
    write_media(folder / "videos", [f"{names[0]}.mp4", f"{names[1]}.webm"])
    return [Record(name, name, tuple(captions)) for name in names]


def _vqa(folder: Path, prefix: str, split: str, questions: dict[int, int], **more) -> None:
    """Files of visualqa.org's format; `questions` is question -> image."""
    head = {"info": {"year": 2017}, "data_type": "mscoco", "data_subtype": split, "license": {}}
    asked = [
        {"image_id": image, "question": f"What is {key}?", "question_id": key}
        for key, image in questions.items()
    ]
    annotations = [
        {
            "question_type": "four", "multiple_choice_answer": "net", "answer_type": "other",
            "image_id": image, "question_id": key,
            "answers": [
                {"answer": word, "raw_answer": f"{word}s", "answer_confidence": "maybe",
                 "answer_id": n}
                for n, word in enumerate(TEN, 1)
            ],
        }
        for key, image in questions.items()
    ]  # fmt: skip
    write_json(
        folder / f"{prefix}OpenEnded_mscoco_{split}_questions.json",
        head | {"task_type": "Open-Ended", "questions": asked},
    )
    write_json(
        folder / f"{prefix}mscoco_{split}_annotations.json",
        head | {"annotations": annotations} | more,
    )


def _vqa_records(kind: str) -> list[Record]:
    questions = {
        image: tuple(Question(f"What is {key}?", TEN, kind, str(key)) for key in keys)
        for image, keys in {262148: (262148000, 262148002), 42: (42001,)}.items()
    }
    return [
        Record(str(image), f"COCO_val2014_{image:012d}", qa=qa) for image, qa in questions.items()
    ]


_VAL = {262148000: 262148, 42001: 42, 262148002: 262148}
_VAL_IMAGES = ["COCO_val2014_000000262148.jpg", "COCO_val2014_000000000042.jpg"]


def vqav2(folder: Path) -> list[Record]:
    _vqa(folder, "v2_", "val2014", _VAL)
    _vqa(folder, "v2_", "train2014", {9001: 9, 9002: 9})
    write_media(folder / "val2014", _VAL_IMAGES)
    return _vqa_records("other")


def okvqa(folder: Path) -> list[Record]:
    kinds = {"four": "Sports and Recreation", "other": "Other"}
    _vqa(folder, "", "val2014", _VAL, question_types=kinds)
    _vqa(folder, "", "train2014", {9001: 9, 9002: 9}, question_types=kinds)
    write_media(folder / "val2014", _VAL_IMAGES)
    return _vqa_records("Sports and Recreation")


def textvqa(folder: Path) -> list[Record]:
    def item(image: str, key: int, name: str) -> dict:
        return {
            "question": f"what brand is {key}?", "image_id": image, "question_id": key,
            "image_classes": ["Belt"], "flickr_original_url": "https://farm5/o.jpg",
            "flickr_300k_url": "https://c2/z.jpg", "image_width": 1024, "image_height": 664,
            "answers": list(TEN), "question_tokens": ["what"], "set_name": name,
        }  # fmt: skip

    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    images = ["003a8ae2ef43b901", "0004c9478eeda995"]
    items = [item(images[0], 34602, "val"), item(images[0], 34603, "val")]
    items += [item(images[1], 34604, "val")]
    write_json(folder / "TextVQA_0.5.1_val.json", head | {"data": items})
    train = [item("aa0a", 0, "train"), item("aa0a", 1, "train")]
    write_json(folder / "TextVQA_0.5.1_train.json", head | {"data": train})
    write_media(folder / "train_images", [f"{name}.jpg" for name in images])
    keys = {images[0]: (34602, 34603), images[1]: (34604,)}
    return [
        Record(
            image, image, qa=tuple(Question(f"what brand is {k}?", TEN, "", str(k)) for k in some)
        )
        for image, some in keys.items()
    ]


def vizwiz(folder: Path) -> list[Record]:
    def item(name: str, words: tuple[str, ...]) -> dict:
        return {
            "image": name, "question": f"What is {name}?", "answer_type": "other", "answerable": 1,
            "answers": [{"answer_confidence": "yes", "answer": word} for word in words],
        }  # fmt: skip

    names = [f"VizWiz_val_{n:08d}.jpg" for n in range(2)]
    write_json(folder / "Annotations" / "val.json", [item(name, TEN) for name in names])
    train = [item("VizWiz_train_00000000.jpg", ("", *TEN[1:])), item("VizWiz_train_1.jpg", TEN)]
    write_json(folder / "Annotations" / "train.json", train)
    write_media(folder / "val", names)
    return [
        Record(name, name[:-4], qa=(Question(f"What is {name}?", TEN, "other", name),))
        for name in names
    ]


def _video_qa(path: Path, videos: dict[int, int], **more) -> None:
    rows = [
        {"answer": "couch", "id": key, "question": f"what is {key}?", "video_id": video} | more
        for key, video in videos.items()
    ]
    write_json(path, rows)


def msrvtt_qa(folder: Path) -> list[Record]:
    _video_qa(folder / "test_qa.json", {170859: 7010, 170860: 7010, 170861: 7011}, category_id=14)
    _video_qa(folder / "train_qa.json", {0: 0, 1: 0}, category_id=14)
    write_media(folder / "TestVideo", ["video7010.mp4", "video7011.mp4"])
    ask = lambda key: Question(f"what is {key}?", ("couch",), "what", str(key))  # noqa: E731
    return [
        Record("video7010", "video7010", qa=(ask(170859), ask(170860))),
        Record("video7011", "video7011", qa=(ask(170861),)),
    ]


def msvd_qa(folder: Path) -> list[Record]:
    names = {1451: "0lh_UWF9ZP4_62_69", 1452: "-4wsuPCjDBc_5_15", 1: "mv89psg6zh4_33_46"}
    lines = "".join(f"{name} vid{number}\n" for number, name in names.items())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "youtube_mapping.txt").write_text(lines)
    _video_qa(folder / "test_qa.json", {37348: 1451, 37349: 1452})
    _video_qa(folder / "train_qa.json", {0: 1, 1: 1})
    clips = [f"{names[number]}.avi" for number in (1451, 1452)]
    write_media(folder / "YouTubeClips", clips)
    ask = lambda key: Question(f"what is {key}?", ("couch",), "what", str(key))  # noqa: E731
    return [
        Record("vid1451", names[1451], qa=(ask(37348),)),
        Record("vid1452", names[1452], qa=(ask(37349),)),
    ]


def ivqa(folder: Path) -> list[Record]:
    head = "video_id,start,end,question,answer1,conf1,answer2,conf2,answer3,conf3,answer4,conf4"
    head += ",answer5,conf5\n"
    answers = "bowl,yes,bowl,yes,glass bowl,maybe,bowl,yes,dish,yes\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.csv").write_text(
        f'{head}TDD6qC0PKy8,354,366,"What, in red, is held?",{answers}'
        f"k8z_x-01234,5,17,What is cut?,{answers}"
    )
    (folder / "train.csv").write_text(
        f"{head}aaaaaaaaaaa,1,9,What?,{answers}bbbbbbbbbbb,1,9,Who?,{answers}"
    )
    names = ["TDD6qC0PKy8_354_366", "k8z_x-01234_5_17"]
    write_media(folder / "video", [f"{names[0]}.webm", f"{names[1]}.mp4"])
    given = ("bowl", "bowl", "glass bowl", "bowl", "dish")
    return [
        Record(names[0], names[0], qa=(Question("What, in red, is held?", given, "", "0"),)),
        Record(names[1], names[1], qa=(Question("What is cut?", given, "", "1"),)),
    ]


def flickr8k(folder: Path) -> list[Record]:
    names = ["2258277193_586949ec62.jpg", "3385593926_d3e9c21170.jpg"]
    images = [karpathy(names[0], "test"), karpathy("x.jpg", "val"), karpathy(names[1], "test")]
    images += [karpathy("y.jpg", "train")]
    write_json(folder / "dataset_flickr8k.json", {"images": images, "dataset": "flickr8k"})
    write_media(folder / "Flicker8k_Dataset", names)
    return [Record(name, name[:-4], sentences(5)) for name in names]


def daquar(folder: Path) -> list[Record]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qa.894.raw.test.txt").write_text(
        "what is on the left side of the oven in the image1 ?\ngarbage_bin\n"
        "what is on the desk in the image3 ?\nbook, papers\n"
        "how many chairs are there in the image1 ?\n2\n"
    )
    (folder / "qa.894.raw.train.txt").write_text("what is it in the image5 ?\nbed\n" * 2)
    write_media(folder / "nyu_depth_images", ["image1.png", "image3.png"])
    return [
        Record(
            "image1",
            "image1",
            qa=(
                Question("what is on the left side of the oven ?", ("garbage_bin",), "", "0"),
                Question("how many chairs are there ?", ("2",), "", "2"),
            ),
        ),
        Record(
            "image3", "image3", qa=(Question("what is on the desk ?", ("book, papers",), "", "1"),)
        ),
    ]


MAKERS: dict[str, Callable[[Path], list[Record]]] = {
    make.__name__: make
    for make in (
        coco, msrvtt, vatex, vqav2, textvqa, vizwiz, okvqa, msrvtt_qa, msvd_qa, ivqa, flickr8k,
        daquar,
    )
}  # fmt: skip


def shrunk(name: str, records: list[Record]) -> Benchmark:
    """The benchmark, as if the official split were `records`."""
    row = BENCHMARKS[name]
    texts = sum(len(record.captions) + len(record.qa) for record in records)
    each = None if name == "coco" else row.splits[row.default_split].per_item
    counts = Counts(len(records), texts, each)
    return dataclasses.replace(row, splits={**row.splits, row.default_split: counts})
