"""Captions and questions from JSON lines, checked so that what passes is text.

Keys of a row: image (or clip, or video), captions (or caption), question, answer or answers (of all
annotators; left out where they are not public), question_id, kind of question, shard, and split (a
row without one is in every split).
Every error names the file and the line.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vadapter.data.example import Question
from vadapter.errors import DataError

MAX_TEXT_BYTES = 16 << 20  # of one row

Row = tuple[str, dict[str, Any]]  # where it stands ("file, line n"), what it says
Texts = tuple[tuple[str, ...], tuple[Question, ...]]  # captions, qa


def read_rows(path: Path, split: str | None) -> Iterator[Row]:
    """The rows of a JSON lines file that belong to a split, or all of them if it is None.

    Raises:
      DataError: the file is missing or empty, a line is not UTF-8 or not a JSON object, or no row
        belongs to the split.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    seen = set()
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES), b""), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            row = parse(line, where)
            seen.add(str(row.get("split")))
            if split is None or row.get("split", split) == split:
                yield where, row
    if not seen:
        raise DataError(f"{path}: no rows; the file is empty")
    if split is not None and not seen & {split, "None"}:
        raise DataError(f"{path}: no rows of split {split!r}; splits: {', '.join(sorted(seen))}")


def parse(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object."""
    try:
        row = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); mend or remove it") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, got {type(row).__name__}")
    return row


def media_name(where: str, row: dict[str, Any]) -> str:
    """The image or clip a row is about."""
    for key in ("image", "clip", "video"):
        if key in row:
            return _text(row[key], f"{where}: {key}")
    raise DataError(f"{where}: none of the keys image, clip, video; it has {', '.join(row)}")


def texts(where: str, row: dict[str, Any]) -> Texts:
    """The captions and the question of one row; at least one of them."""
    captions = row.get("captions", row.get("caption", []))
    captions = captions if isinstance(captions, list) else [captions]
    captions = tuple(_text(caption, f"{where}: caption") for caption in captions)
    qa = ()
    if "question" in row:
        question = _text(row["question"], f"{where}: question")
        answers = row.get("answers", row.get("answer", []))
        answers = answers if isinstance(answers, list) else [answers]
        answers = tuple(_text(answer, f"{where}: answer") for answer in answers)
        kind = _text(row["kind"], f"{where}: kind") if "kind" in row else ""
        qa = (Question(question, answers, kind, str(row.get("question_id", ""))),)
    if not captions and not qa:
        raise DataError(f"{where}: no captions and no question; add one or remove the row")
    return captions, qa


def gather(rows: Iterable[tuple[str, str, dict[str, Any]]]) -> dict[str, Texts]:
    """The texts of each name, in order of first appearance, from (where, name, row).

    Questions about one image may stand in many rows; its captions stand in one, so that an image
    listed twice by mistake is noticed.
    """
    gathered: dict[str, tuple[list[str], list[Question]]] = {}
    captioned: dict[str, str] = {}  # where the captions of a name stand
    for where, name, row in rows:
        captions, qa = texts(where, row)
        if captions and captioned.setdefault(name, where) != where:
            raise DataError(
                f"{where}: {name!r} has captions already ({captioned[name]}); "
                "put all captions of an image into one row"
            )
        all_captions, all_qa = gathered.setdefault(name, ([], []))
        all_captions.extend(captions)
        all_qa.extend(qa)
    return {name: (tuple(captions), tuple(qa)) for name, (captions, qa) in gathered.items()}


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: a text is expected, got {value!r:.60}; mend or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: holds half a character ({error}); mend it") from error
    return value
