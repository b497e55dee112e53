"""Readers of the official annotation formats.

A reader takes (folder, split, *files), the files being those of the benchmark's row in `table`, and
returns the records of the split in the order of the files. It raises DataError for a file that is
missing or not in the format of its docstring.
"""

import collections
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from vadapter.data import annotation_tables
from vadapter.data.benchmarks.benchmark import File, Record
from vadapter.data.benchmarks.files import locate, opened
from vadapter.data.example import Question
from vadapter.errors import DataError

# (id, media) of an image or clip -> its questions, in order of appearance
_Questions = collections.defaultdict[tuple[str, str], list[Question]]


def _records(questions: _Questions) -> Iterator[Record]:
    for (id_, media), qa in questions.items():
        yield Record(id_, media, qa=tuple(qa))


# -- captions ----------------------------------------------------------------------------------


def karpathy(
    folder: Path, split: str, file: File, *, values: Mapping[str, tuple[str, ...]] | None = None
) -> Iterator[Record]:
    """Read `dataset_<name>.json` of Karpathy and Fei-Fei (CVPR 2015), or `captions.jsonl`.

    {"images": [{"filename", "split", "sentences": [{"raw", …}], "cocoid" (of COCO), …}], …}; the
    rows of `captions.jsonl` are described in `annotation_tables`. `values` maps a split to the
    values of "split" that belong to it, where it is not the name itself.
    """
    if rows_path := _rows_path(folder, split, file):
        yield from _rows(rows_path, split)
        return
    names = (values or {}).get(split, (split,))
    with opened(folder, file, split) as (_, document):
        for image in document["images"]:
            if image["split"] in names:
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                name = image["filename"]
                yield Record(str(image.get("cocoid", name)), PurePosixPath(name).stem, captions)


def msrvtt(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read `videodatainfo.json` of MSR-VTT.

    {"videos": [{"video_id", "split", …}], "sentences": [{"video_id", "caption", …}], …}
    """
    with opened(folder, file, split) as (_, document):
        official_split = "validate" if split == "val" else split
        captions: dict[str, list[str]] = {
            video["video_id"]: []
            for video in document["videos"]
            if video["split"] == official_split
        }
        for sentence in document["sentences"]:
            if sentence["video_id"] in captions:
                captions[sentence["video_id"]].append(sentence["caption"])
        for name, texts in captions.items():
            yield Record(name, name, tuple(texts))


def vatex(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read a file of VATEX: [{"videoID", "enCap": […], …}, …]."""
    with opened(folder, file, split) as (_, document):
        for clip in document:
            yield Record(clip["videoID"], clip["videoID"], tuple(clip["enCap"]))


# -- questions about images --------------------------------------------------------------------


def vqa(
    folder: Path, split: str, questions: File, annotations: File, *, images: Mapping[str, str],
    kind: str,
) -> Iterator[Record]:  # fmt: skip
    """Read questions and annotations in visualqa.org's format.

    {"questions": [{"image_id", "question", "question_id"}], …} and
    {"annotations": [{"question_id", "answers": [{"answer", …}], "answer_type", …}], …}, where
    "question_types" may hold the names of the question types. A split that `annotations` does not
    name has no public answers. `images` maps a split to the part of COCO that has its images, such
    as "val2014"; `kind` is the key of an annotation by which scores are broken down.

    Raises:
      DataError: also for a question without annotation, or an annotation without question.
    """
    answered = split in annotations.splits
    answers = _vqa_answers(folder, split, annotations, kind) if answered else {}
    qa = _Questions(list)
    with opened(folder, questions, split) as (location, document):
        for item in document["questions"]:
            key, image = item["question_id"], item["image_id"]
            if answered and key not in answers:
                raise DataError(
                    f"{location}: question {key} is not in {annotations.names(split)[0]}; download "
                    f"both files again: {annotations.page}"
                )
            question = Question(item["question"], *answers.pop(key, ((), "")), str(key))
            qa[str(image), f"COCO_{images[split]}_{image:012d}"].append(question)
    if answers:
        raise DataError(
            f"{location}: lacks {len(answers):,} annotated questions, such as "
            f"{next(iter(answers))}; download both files again: {questions.page}"
        )
    return _records(qa)


def _vqa_answers(
    folder: Path, split: str, annotations: File, kind: str
) -> dict[int, tuple[tuple[str, ...], str]]:
    """Return id of a question -> (its answers, its value of `kind`)."""
    answers: dict[int, tuple[tuple[str, ...], str]] = {}
    with opened(folder, annotations, split) as (location, document):
        names = document.get("question_types", {})  # of OK-VQA; VQAv2 has a list of other things
        names = names if isinstance(names, dict) else {}
        for item in document["annotations"]:
            key, words = item["question_id"], tuple(answer["answer"] for answer in item["answers"])
            if key in answers:
                raise DataError(f"{location}: question {key} is listed twice")
            answers[key] = words, str(names.get(item[kind], item[kind]))
    return answers


def textvqa(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read a file of TextVQA.

    {"data": [{"image_id", "question", "question_id", "answers": […] (not of test), …}], …}
    """
    qa = _Questions(list)
    with opened(folder, file, split) as (_, document):
        for item in document["data"]:
            answers, image = tuple(item.get("answers", ())), item["image_id"]
            question = Question(item["question"], answers, id=str(item["question_id"]))
            qa[image, image].append(question)
    return _records(qa)


def vizwiz(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read a file of VizWiz-VQA, whose questions are named after their images.

    [{"image", "question", "answers": [{"answer", …}] and "answer_type" (not of test)}, …]
    """
    with opened(folder, file, split) as (_, document):
        for item in document:
            answers = tuple(answer["answer"] for answer in item.get("answers", ()))
            name = item["image"]
            question = Question(item["question"], answers, item.get("answer_type", ""), name)
            yield Record(name, PurePosixPath(name).stem, qa=(question,))


_DAQUAR_IMAGE = re.compile(r" in (?:the |this )?(image\d+)\b")


def daquar(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read `qa.894.raw.<split>.txt` of DAQUAR, or `qa.jsonl`.

    The official file has a line with a question, which names its image, then one with the answer;
    the rows of `qa.jsonl` are described in `annotation_tables`. An answer that is a set is one text
    with its members separated by commas, since exact match compares the whole set.
    """
    if rows_path := _rows_path(folder, split, file):
        for record in _rows(rows_path, split):
            joined = (q._replace(answers=(", ".join(q.answers),)) for q in record.qa)
            yield record._replace(qa=tuple(joined))
        return
    qa = _Questions(list)
    with opened(folder, file, split) as (_, lines):
        for n, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            image = _DAQUAR_IMAGE.findall(question)[-1]
            text = _DAQUAR_IMAGE.sub("", question)
            qa[image, image].append(Question(text, (answer,), id=str(n)))
    yield from _records(qa)


# -- questions about clips ---------------------------------------------------------------------


def video_qa(folder: Path, split: str, file: File, mapping: File | None = None) -> Iterator[Record]:
    """Read `<split>_qa.json` of xudejing/video-question-answering.

    [{"answer", "id", "question", "video_id"}, …]; scores are broken down by the first word. The
    lines "<file name> vid<number>" of `mapping` name the clips; without it they are called
    video<number>.
    """
    names, prefix, qa = {}, "video", _Questions(list)
    if mapping is not None:
        prefix = "vid"
        with opened(folder, mapping, split) as (_, lines):
            names = {int(id_.removeprefix("vid")): name for name, id_ in map(str.split, lines)}
    with opened(folder, file, split) as (_, document):
        for item in document:
            number, text = item["video_id"], item["question"]
            name = f"{prefix}{number}"
            question = Question(
                text, (item["answer"],), text.split(" ")[0].lower(), str(item["id"])
            )
            qa[name, names[number] if mapping else name].append(question)
    return _records(qa)


def ivqa(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read a file of iVQA, whose questions are named by their place in it.

    CSV with the columns video_id, start, end, question, answer1 … answer5.
    """
    qa = _Questions(list)
    with opened(folder, file, split) as (_, rows):
        for n, row in enumerate(rows):
            name = f"{row['video_id']}_{row['start']}_{row['end']}"
            answers = tuple(answer for k in range(1, 6) if (answer := row[f"answer{k}"]))
            qa[name, name].append(Question(row["question"], answers, id=str(n)))
    return _records(qa)


# -- rows beside tar shards --------------------------------------------------------------------


def _rows_path(folder: Path, split: str, file: File) -> Path | None:
    """Return the path of the JSON lines beside tar shards, None if the official file is used."""
    stored = locate(folder, file, split)
    return stored if isinstance(stored, Path) and stored.suffix == ".jsonl" else None


def _rows(path: Path, split: str) -> Iterator[Record]:
    """Read JSON lines beside tar shards, see `annotation_tables`."""
    rows = annotation_tables.read_rows(path, split)
    for name, (captions, qa) in annotation_tables.gather(rows).items():
        yield Record(name, PurePosixPath(name).stem, captions, qa)
