"""Annotation formats that several benchmarks share. Each function yields the records of a split."""

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from vadapter.data.annotations import annotation_tables
from vadapter.data.benchmarks.benchmark import File, Record
from vadapter.data.benchmarks.files import locate, missing, official, read_json
from vadapter.data.example import Question
from vadapter.errors import DataError


def by_media(questions: Iterable[tuple[str, str, Question]]) -> Iterator[Record]:
    """(id, media, question) in any order -> one record for each image or clip, in order of first
    appearance."""
    gathered: dict[tuple[str, str], list[Question]] = {}
    for name, media, question in questions:
        gathered.setdefault((name, media), []).append(question)
    for (name, media), qa in gathered.items():
        yield Record(name, media, qa=tuple(qa))


def karpathy(folder: Path, split: str, file: File, wanted: tuple[str, ...]) -> Iterator[Record]:
    """`dataset_<name>.json` of Karpathy and Fei-Fei (CVPR 2015).

    {"images": [{"filename", "split", "sentences": [{"raw", …}], "cocoid" (of COCO), …}], …}

    Args:
      wanted: the values of "split" that belong to the split.
    """
    where, data = read_json(folder, file, split)
    with official(where):
        for image in data["images"]:
            if image["split"] in wanted:
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                name = image["filename"]
                yield Record(str(image.get("cocoid", name)), PurePosixPath(name).stem, captions)


def vqa(
    folder: Path, split: str, questions: File, annotations: File, images: str, kind: str
) -> Iterator[Record]:
    """Questions and annotations of visualqa.org's format.

    {"questions": [{"image_id", "question", "question_id"}], …} and
    {"annotations": [{"question_id", "answers": [{"answer", …}], "answer_type", …}], …}, where
    "question_types" may say what the types of questions stand for.

    Args:
      images: their name, such as "COCO_val2014_{:012d}".
      kind: the key of an annotation that scores are broken down by.

    Raises:
      DataError: a question without annotation, or an annotation without question.
    """
    answers: dict[int, tuple[tuple[str, ...], str]] = {}
    if split in annotations.splits:
        where, data = read_json(folder, annotations, split)
        with official(where):
            names = data.get("question_types", {})
            names = names if isinstance(names, dict) else {}
            for item in data["annotations"]:
                if item["question_id"] in answers:
                    raise DataError(f"{where}: question {item['question_id']} stands there twice")
                given = tuple(answer["answer"] for answer in item["answers"])
                answers[item["question_id"]] = given, str(names.get(item[kind], item[kind]))
    where, data = read_json(folder, questions, split)

    def asked() -> Iterator[tuple[str, str, Question]]:
        for item in data["questions"]:
            key, image = item["question_id"], item["image_id"]
            if split in annotations.splits and key not in answers:
                raise DataError(
                    f"{where}: question {key} is not in {annotations.names(split)[0]}; get both "
                    f"files again: {annotations.page}"
                )
            given, sort = answers.pop(key, ((), ""))
            question = Question(item["question"], given, sort, str(key))
            yield str(image), images.format(image), question

    with official(where):
        records = list(by_media(asked()))
    if answers:
        raise DataError(
            f"{where}: lacks {len(answers):,} annotated questions, such as {next(iter(answers))}; "
            f"get both files again: {questions.page}"
        )
    yield from records


def video_qa(
    folder: Path, split: str, file: File, names: dict[int, str] | None
) -> Iterator[Record]:
    """`<split>_qa.json` of xudejing/video-question-answering.

    [{"answer", "id", "question", "video_id"}, …]; scores are broken down by the first word.

    Args:
      names: number of a video -> its file; None where they are called video<number>.
    """
    where, data = read_json(folder, file, split)

    def asked() -> Iterator[tuple[str, str, Question]]:
        for item in data:
            video, text = item["video_id"], item["question"]
            kind = text.split(" ")[0].lower()
            question = Question(text, (item["answer"],), kind, str(item["id"]))
            if names is None:
                yield f"video{video}", f"video{video}", question
            else:
                yield f"vid{video}", names[video], question

    with official(where):
        yield from by_media(asked())


def rows(folder: Path, split: str, file: File) -> Iterator[Record]:
    """JSON lines beside tar shards, see `annotation_tables`."""
    found = locate(folder, file, split)
    if found is None:
        raise DataError(missing(folder, file, split))
    lines = (
        (at, annotation_tables.media_name(at, row), row)
        for at, row in annotation_tables.read_rows(found[0], split)
    )
    for name, (captions, qa) in annotation_tables.gather(lines).items():
        yield Record(name, PurePosixPath(name).stem, captions, qa)
