"""Readers of the official annotation formats.

A reader takes (folder, split, *files), the files being those of the benchmark's row in `table`, and
yields the records of the split in the order of the files. It raises DataError for a file that is
missing or not in the format of its docstring.
"""

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vadapter.data.annotations import annotation_tables
from vadapter.data.benchmarks.benchmark import File, Record
from vadapter.data.benchmarks.files import (
    locate,
    official_format,
    read_csv,
    read_json,
    read_text,
)
from vadapter.data.example import Question
from vadapter.errors import DataError

Reader = Callable[..., Iterator[Record]]


def _document(parse: Callable[..., Iterable[Record]]) -> Reader:
    """Turn a function of a parsed JSON document and the split into a reader."""

    @functools.wraps(parse)
    def reader(folder: Path, split: str, file: File) -> Iterator[Record]:
        path, document = read_json(folder, file, split)
        with official_format(path):
            yield from parse(document, split)

    return reader


def _by_media(questions: Iterable[tuple[str, str, Question]]) -> Iterator[Record]:
    """Yield a record per image or clip, in order of appearance, from (id, media, question)."""
    gathered: dict[tuple[str, str], list[Question]] = {}
    for id_, media, question in questions:
        gathered.setdefault((id_, media), []).append(question)
    for (id_, media), qa in gathered.items():
        yield Record(id_, media, qa=tuple(qa))


# -- captions ----------------------------------------------------------------------------------


def karpathy(
    folder: Path, split: str, file: File, *, values: Mapping[str, tuple[str, ...]] | None = None
) -> Iterator[Record]:
    """Read `dataset_<name>.json` of Karpathy and Fei-Fei (CVPR 2015), or `captions.jsonl`.

    {"images": [{"filename", "split", "sentences": [{"raw", …}], "cocoid" (of COCO), …}], …}; the
    rows of `captions.jsonl` are described in `annotation_tables`.

    Args:
      folder, split, file: see above.
      values: split -> the values of "split" that belong to it, where it is not the name itself.
    """
    if rows_path := _rows_path(folder, split, file):
        yield from _rows(rows_path, split)
        return
    path, document = read_json(folder, file, split)
    wanted = (values or {}).get(split, (split,))
    with official_format(path):
        for image in document["images"]:
            if image["split"] in wanted:
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                name = image["filename"]
                yield Record(str(image.get("cocoid", name)), PurePosixPath(name).stem, captions)


@_document
def msrvtt(document: Any, split: str) -> Iterator[Record]:
    """Read `videodatainfo.json` of MSR-VTT.

    {"videos": [{"video_id", "split", …}], "sentences": [{"video_id", "caption", …}], …}
    """
    theirs = "validate" if split == "val" else split
    captions: dict[str, list[str]] = {
        video["video_id"]: [] for video in document["videos"] if video["split"] == theirs
    }
    for sentence in document["sentences"]:
        if sentence["video_id"] in captions:
            captions[sentence["video_id"]].append(sentence["caption"])
    for name, texts in captions.items():
        yield Record(name, name, tuple(texts))


@_document
def vatex(document: Any, split: str) -> Iterator[Record]:
    """Read a file of VATEX: [{"videoID", "enCap": […], …}, …]."""
    del split
    for clip in document:
        yield Record(clip["videoID"], clip["videoID"], tuple(clip["enCap"]))


# -- questions about images --------------------------------------------------------------------


def vqa(
    folder: Path,
    split: str,
    questions: File,
    annotations: File,
    *,
    images: Mapping[str, str],
    kind: str,
) -> Iterator[Record]:
    """Read questions and annotations in visualqa.org's format.

    {"questions": [{"image_id", "question", "question_id"}], …} and
    {"annotations": [{"question_id", "answers": [{"answer", …}], "answer_type", …}], …}, where
    "question_types" may hold the names of the question types.

    Args:
      folder, split, questions, annotations: see above; a split that `annotations` does not name has
        no public answers.
      images: split -> the part of COCO that has its images, such as "val2014".
      kind: key of an annotation by which scores are broken down.

    Raises:
      DataError: also for a question without annotation, or an annotation without question.
    """
    answered = split in annotations.splits
    answers = _vqa_answers(folder, split, annotations, kind) if answered else {}
    path, document = read_json(folder, questions, split)

    def parse() -> Iterator[tuple[str, str, Question]]:
        for item in document["questions"]:
            key, image = item["question_id"], item["image_id"]
            if answered and key not in answers:
                raise DataError(
                    f"{path}: question {key} is not in {annotations.names(split)[0]}; download "
                    f"both files again: {annotations.page}"
                )
            given, value = answers.pop(key, ((), ""))
            question = Question(item["question"], given, value, str(key))
            yield str(image), f"COCO_{images[split]}_{image:012d}", question

    with official_format(path):
        records = list(_by_media(parse()))
    if answers:
        raise DataError(
            f"{path}: lacks {len(answers):,} annotated questions, such as {next(iter(answers))}; "
            f"download both files again: {questions.page}"
        )
    yield from records


def _vqa_answers(
    folder: Path, split: str, annotations: File, kind: str
) -> dict[int, tuple[tuple[str, ...], str]]:
    """Return id of a question -> (its answers, its value of `kind`)."""
    answers: dict[int, tuple[tuple[str, ...], str]] = {}
    path, document = read_json(folder, annotations, split)
    with official_format(path):
        names = document.get("question_types", {})  # of OK-VQA; VQAv2 has a list of other things
        names = names if isinstance(names, dict) else {}
        for item in document["annotations"]:
            if item["question_id"] in answers:
                raise DataError(f"{path}: question {item['question_id']} is listed twice")
            given = tuple(answer["answer"] for answer in item["answers"])
            answers[item["question_id"]] = given, str(names.get(item[kind], item[kind]))
    return answers


@_document
def textvqa(document: Any, split: str) -> Iterator[Record]:
    """Read a file of TextVQA.

    {"data": [{"image_id", "question", "question_id", "answers": […] (not of test), …}], …}
    """
    del split
    return _by_media(
        (
            item["image_id"],
            item["image_id"],
            Question(
                item["question"], tuple(item.get("answers", ())), "", str(item["question_id"])
            ),
        )
        for item in document["data"]
    )


@_document
def vizwiz(document: Any, split: str) -> Iterator[Record]:
    """Read a file of VizWiz-VQA, whose questions are named after their images.

    [{"image", "question", "answers": [{"answer", …}] and "answer_type" (not of test)}, …]
    """
    del split
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
            qa = (q._replace(answers=(", ".join(q.answers),)) for q in record.qa)
            yield record._replace(qa=tuple(qa))
        return
    path, text = read_text(folder, file, split)
    lines = [line.strip() for line in text.splitlines() if line.strip()]

    def parse() -> Iterator[tuple[str, str, Question]]:
        for n, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=True)):
            image = _DAQUAR_IMAGE.findall(question)[-1]
            yield image, image, Question(_DAQUAR_IMAGE.sub("", question), (answer,), "", str(n))

    with official_format(path):
        yield from _by_media(parse())


# -- questions about clips ---------------------------------------------------------------------


def video_qa(folder: Path, split: str, file: File, mapping: File | None = None) -> Iterator[Record]:
    """Read `<split>_qa.json` of xudejing/video-question-answering.

    [{"answer", "id", "question", "video_id"}, …]; scores are broken down by the first word.

    Args:
      folder, split, file: see above.
      mapping: a file whose lines "<file name> vid<number>" name the clips; None where they are
        called video<number>.
    """
    names = None if mapping is None else _video_names(folder, split, mapping)
    path, document = read_json(folder, file, split)

    def parse() -> Iterator[tuple[str, str, Question]]:
        for item in document:
            number, text = item["video_id"], item["question"]
            kind = text.split(" ")[0].lower()
            question = Question(text, (item["answer"],), kind, str(item["id"]))
            if names is None:
                yield f"video{number}", f"video{number}", question
            else:
                yield f"vid{number}", names[number], question

    with official_format(path):
        yield from _by_media(parse())


def _video_names(folder: Path, split: str, mapping: File) -> dict[int, str]:
    path, text = read_text(folder, mapping, split)
    with official_format(path):
        pairs = [line.split() for line in text.splitlines() if line.strip()]
        return {int(number.removeprefix("vid")): name for name, number in pairs}


def ivqa(folder: Path, split: str, file: File) -> Iterator[Record]:
    """Read a file of iVQA, whose questions are named by their place in it.

    CSV with the columns video_id, start, end, question, answer1 … answer5.
    """
    path, rows = read_csv(folder, file, split)

    def parse() -> Iterator[tuple[str, str, Question]]:
        for n, row in enumerate(rows):
            name = f"{row['video_id']}_{row['start']}_{row['end']}"
            given = (row[f"answer{k}"] for k in range(1, 6))
            answers = tuple(answer for answer in given if answer)
            yield name, name, Question(row["question"], answers, "", str(n))

    with official_format(path):
        yield from _by_media(parse())


# -- rows beside tar shards --------------------------------------------------------------------


def _rows_path(folder: Path, split: str, file: File) -> Path | None:
    """Return the path of the JSON lines beside tar shards, None if the official file is used."""
    located = locate(folder, file, split)
    return located[0] if located is not None and located[0].suffix == ".jsonl" else None


def _rows(path: Path, split: str) -> Iterator[Record]:
    """Read JSON lines beside tar shards, see `annotation_tables`."""
    rows = (
        (place, annotation_tables.media_name(place, row), row)
        for place, row in annotation_tables.read_rows(path, split)
    )
    for name, (captions, qa) in annotation_tables.gather(rows).items():
        yield Record(name, PurePosixPath(name).stem, captions, qa)
