"""Captions and questions from tables, checked so that what passes is text.

Keys of a row: image (or clip, or video), captions (or caption), question, answer or answers (of all
annotators; left out where they are not public), question_id, kind of question, shard, and split (a
row without one is in every split). Where a table calls them otherwise, `columns` says how, such as
{"image": "filepath", "answers": "answers.answer"}: a dot reaches into objects and lists of objects.

Forms, by the name of the file:

  .csv, .tsv   a header line; a caption a row, so an image may have many rows. TSV has no quotes
  .json        COCO captions or Karpathy's dataset_*.json, see `coco_json`; or a list of rows
  others       JSON lines: a row a line; all captions of an image in one row

Every error names the file and the line.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vadapter.data.annotations import coco_json
from vadapter.data.example import Question
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

MAX_TEXT_BYTES = 16 << 20  # of one row
KEYS = ("image", "clip", "video", "captions", "caption", "question", "answers", "answer",
        "question_id", "kind", "shard", "split", "id")  # fmt: skip

Row = tuple[str, dict[str, Any]]  # where it stands ("file, line n"), what it says
Texts = tuple[tuple[str, ...], tuple[Question, ...]]  # captions, qa
Split = str | Sequence[str] | None


def read_rows(path: Path, split: Split, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """The rows of a table that belong to a split.

    Args:
      split: its name, or several; None for all rows.
      columns: our key -> the table's.

    Raises:
      ConfigError: `columns` has a key that is not ours.
      DataError: the file is missing or empty, a row cannot be read, or none belongs to the split.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    wanted = None if split is None else {split} if isinstance(split, str) else set(split)
    seen = set()
    for where, row in READERS.get(path.suffix.lower(), _json_lines)(path):
        row = rename(row, columns)
        seen.add(str(row.get("split")))
        if wanted is None or row.get("split") is None or row["split"] in wanted:
            yield where, row
    if not seen:
        raise DataError(f"{path}: no rows; the file is empty")
    if wanted is not None and not seen & {*wanted, "None"}:
        raise DataError(f"{path}: no rows of split {split!r}; splits: {', '.join(sorted(seen))}")


def rename(row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The row with our keys; what `columns` does not name keeps its own.

    Raises:
      ConfigError: `columns` has a key that is not ours.
    """
    if unknown := set(columns or ()) - set(KEYS):
        raise ConfigError(f"columns: unknown key {sorted(unknown)[0]!r}; known: {', '.join(KEYS)}")
    named = {ours: pick(row, theirs) for ours, theirs in (columns or {}).items()}
    return row | {key: value for key, value in named.items() if value is not None}


def pick(value: Any, path: str) -> Any:
    """What stands at `a.b` of a row, for lists of objects a list; None if there is nothing."""
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list):
            value = [item.get(key) if isinstance(item, Mapping) else None for item in value]
        else:
            return None
    return value


def _open(path: Path) -> BinaryIO:
    return io.BytesIO(path.read_bytes()) if storage.remote(path) else path.open("rb")


def _json_lines(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES), b""), 1):
            if line.strip():
                where = f"{path}, line {number}"
                yield where, parse(line, where)


def _json(path: Path) -> Iterator[Row]:
    yield from coco_json.rows(path, decode(path.read_bytes(), str(path)))


def _separated(path: Path, **form: Any) -> Iterator[Row]:
    """A cell that is empty says nothing; one that is missing, or one too many, is an error."""
    with _open(path) as file:
        reader = csv.DictReader(_text_lines(path, file), **form)
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{where}: not as many cells as the header has; mend it")
                yield where, {key: value for key, value in row.items() if value != ""}
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: {error}; mend it") from error


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 ({error}); convert the file to UTF-8"
            ) from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _json,
}
ONE_CAPTION_A_ROW = (".csv", ".tsv")


def parse(data: bytes, where: str) -> dict[str, Any]:
    """One JSON object."""
    row = decode(data, where)
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, got {type(row).__name__}")
    return row


def decode(data: bytes, where: str) -> Any:
    """One JSON value."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); mend or remove it") from error


def media_name(where: str, row: dict[str, Any]) -> str:
    """The image or clip a row is about."""
    for key in ("image", "clip", "video"):
        if key in row:
            return _text(row[key], f"{where}: {key}")
    raise DataError(f"{where}: none of the keys image, clip, video; it has {', '.join(row)}")


def texts(where: str, row: dict[str, Any]) -> Texts:
    """The captions and the questions of one row, at least one of them.

    Several questions are lists of one length, `answers` being a list of lists.
    """
    captions = row.get("captions", row.get("caption", []))
    captions = captions if isinstance(captions, list) else [captions]
    captions = tuple(_text(caption, f"{where}: caption") for caption in captions)
    asked = _each(where, row) if isinstance(row.get("question"), list) else [row]
    qa = tuple(_question(where, one) for one in asked if "question" in one)
    if not captions and not qa:
        raise DataError(f"{where}: no captions and no question; add one or remove the row")
    return captions, qa


def _each(where: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    keys = [key for key in ("question", "answers", "answer", "question_id", "kind") if key in row]
    lists = [row[key] for key in keys]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise DataError(f"{where}: {', '.join(keys)} are not lists of one length; mend it")
    return [dict(zip(keys, values, strict=True)) for values in zip(*lists, strict=True)]


def _question(where: str, row: dict[str, Any]) -> Question:
    question = _text(row["question"], f"{where}: question")
    answers = row.get("answers", row.get("answer", []))
    answers = answers if isinstance(answers, list) else [answers]
    answers = tuple(_text(answer, f"{where}: answer") for answer in answers)
    kind = _text(row["kind"], f"{where}: kind") if "kind" in row else ""
    return Question(question, answers, kind, str(row.get("question_id", "")))


def gather(
    rows: Iterable[tuple[str, str, dict[str, Any]]], *, repeats: bool = False
) -> dict[str, Texts]:
    """The texts of each name, in order of first appearance, from (where, name, row).

    Questions about one image may stand in many rows; its captions stand in one, so that an image
    listed twice by mistake is noticed, unless `repeats`. The id of a question stands in one row.
    """
    gathered: dict[str, tuple[list[str], list[Question]]] = {}
    captioned: dict[str, str] = {}  # where the captions of a name stand
    asked: dict[str, str] = {}  # where the question of an id stands
    for where, name, row in rows:
        captions, qa = texts(where, row)
        if captions and captioned.setdefault(name, where) != where and not repeats:
            raise DataError(
                f"{where}: {name!r} has captions already ({captioned[name]}); "
                "put all captions of an image into one row"
            )
        for id_ in (question.id for question in qa if question.id):
            if asked.setdefault(id_, where) != where:
                raise DataError(f"{where}: question_id {id_} is in {asked[id_]} too; keep one")
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
