"""Captions and questions from tables, checked so that what passes is text.

Keys of a row: image (or clip, or video), captions (or caption), question, answer or answers (of all
annotators; absent where they are not public), question_id, kind of question, shard, and split (a
row without one belongs to every split). `columns` maps keys to a table's own names, such as
{"image": "filepath", "answers": "answers.answer"}: a dot reaches into objects and lists of objects.

Formats, by the suffix of the file:

  .csv, .tsv   a header line; one caption per row, so an image may have many rows. TSV has no quotes
  .json        one document, see below
  others       JSON lines: one row per line; all captions of an image in one row

Documents:

  COCO         {"images": [{"id": 139, "file_name": "a.jpg"}, …],
                "annotations": [{"image_id": 139, "caption": "a room"}, …]}, all in every split;
                https://cocodataset.org/#format-data
  Karpathy     {"images": [{"filepath": "val2014", "filename": "a.jpg", "split": "test",
                "sentences": [{"raw": "a room"}, …]}, …]}, as dataset_coco.json and
                dataset_flickr8k.json; the image is FILEPATH/FILENAME
  a list       of rows

Every error names the file and the line.
"""

import csv
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from vadapter.data.example import Question
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

MAX_TEXT_BYTES = 16 << 20  # limit of one row
MEDIA_KEYS = ("image", "clip", "video")
KEYS = (*MEDIA_KEYS, "captions", "caption", "question", "answers", "answer", "question_id", "kind",
        "shard", "split", "id")  # fmt: skip

# location ("file, line n"), name of the image or clip, content
Row = tuple[str, str, dict[str, Any]]
_Located = Iterator[tuple[str, dict[str, Any]]]
Texts = tuple[tuple[str, ...], tuple[Question, ...]]  # captions, qa
Split = str | Sequence[str] | None


def read_rows(path: Path, split: Split, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the rows of a table that belong to a split, or to several; all rows if it is None.

    Raises:
      ConfigError: `columns` has an unknown key.
      DataError: the file is missing or empty, a row is unreadable, or no row belongs to the split.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    splits = None if split is None else {split} if isinstance(split, str) else set(split)
    seen = set()
    for location, row in READERS.get(path.suffix.lower(), _json_lines)(path):
        row = rename(row, columns)
        seen.add(str(row.get("split")))
        if splits is None or row.get("split") is None or row["split"] in splits:
            yield location, _media_name(location, row), row
    if not seen:
        raise DataError(f"{path}: no rows; the file is empty")
    if splits is not None and not seen & {*splits, "None"}:
        raise DataError(f"{path}: no rows of split {split!r}; splits: {', '.join(sorted(seen))}")


def rename(row: dict[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the row under the keys of this module; other columns keep their names.

    Raises:
      ConfigError: `columns` has an unknown key.
    """
    if unknown := set(columns or ()) - set(KEYS):
        raise ConfigError(f"columns: unknown key {sorted(unknown)[0]!r}; known: {', '.join(KEYS)}")
    named = {key: pick(row, column) for key, column in (columns or {}).items()}
    return row | {key: value for key, value in named.items() if value is not None}


def pick(value: Any, path: str) -> Any:
    """Return the value at path `a.b` of a row, None if absent; a list of objects gives a list."""
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


def _json_lines(path: Path) -> _Located:
    with _open(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_TEXT_BYTES), b""), 1):
            if line.strip():
                location = f"{path}, line {number}"
                yield location, parse(line, location)


def _json(path: Path) -> _Located:
    return _json_rows(path, _decode(path.read_bytes(), str(path)))


def _separated(path: Path, **form: Any) -> _Located:
    """Yield rows without their empty cells; a missing or additional cell is an error."""
    with _open(path) as file:
        reader = csv.DictReader(_text_lines(path, file), **form)
        try:
            for row in reader:
                location = f"{path}, line {reader.line_num}"
                if None in row or None in row.values():
                    raise DataError(f"{location}: not as many cells as the header; fix the row")
                yield location, {key: value for key, value in row.items() if value != ""}
        except csv.Error as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: {error}; fix the row") from error


def _text_lines(path: Path, lines: Iterable[bytes]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not UTF-8 ({error}); convert the file to UTF-8"
            ) from error


READERS: dict[str, Callable[[Path], _Located]] = {
    ".csv": functools.partial(_separated, delimiter=","),
    ".tsv": functools.partial(_separated, delimiter="\t", quoting=csv.QUOTE_NONE),
    ".json": _json,
}
ONE_CAPTION_A_ROW = (".csv", ".tsv")


def parse(data: bytes, location: str) -> dict[str, Any]:
    """Parse one JSON object."""
    return _require_object(_decode(data, location), location)


def _decode(data: bytes, location: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{location}: not UTF-8 ({error}); convert the file to UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); fix or remove it") from error


def _media_name(location: str, row: dict[str, Any]) -> str:
    for key in MEDIA_KEYS:
        if key in row:
            return _text(row[key], f"{location}: {key}")
    raise DataError(f"{location}: none of the keys image, clip, video; it has {', '.join(row)}")


def texts(location: str, row: dict[str, Any]) -> Texts:
    """Return the captions and the questions of one row, at least one of them.

    A row with several questions has lists of equal length, `answers` being a list of lists.

    Raises:
      DataError: no texts, or one that is not a string or is blank.
    """
    captions = _text_list(row, "captions", "caption", location)
    questions = _each(location, row) if isinstance(row.get("question"), list) else [row]
    qa = tuple(_question(location, one) for one in questions if "question" in one)
    if not captions and not qa:
        raise DataError(f"{location}: no captions and no question; add one or remove the row")
    return captions, qa


def _each(location: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    keys = [key for key in ("question", "answers", "answer", "question_id", "kind") if key in row]
    lists = [row[key] for key in keys]
    if not all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists):
        raise DataError(f"{location}: {', '.join(keys)} are not lists of equal length; fix the row")
    return [dict(zip(keys, values, strict=True)) for values in zip(*lists, strict=True)]


def _question(location: str, row: dict[str, Any]) -> Question:
    question = _text(row["question"], f"{location}: question")
    answers = _text_list(row, "answers", "answer", location)
    kind = _text(row["kind"], f"{location}: kind") if "kind" in row else ""
    return Question(question, answers, kind, str(row.get("question_id", "")))


def _text_list(row: dict[str, Any], plural: str, singular: str, location: str) -> tuple[str, ...]:
    values = row.get(plural, row.get(singular, []))
    values = values if isinstance(values, list) else [values]
    return tuple(_text(value, f"{location}: {singular}") for value in values)


def gather(rows: Iterable[Row], *, repeats: bool = False) -> dict[str, Texts]:
    """Return name of the image or clip -> texts, in order of appearance.

    Questions about an image may be in many rows. Its captions are in one row unless `repeats`, so
    that an image that is listed twice by mistake is noticed. The id of a question is in one row.

    Raises:
      DataError: an unusable text, an image with captions in two rows, a duplicate id of a question.
    """
    gathered: dict[str, tuple[list[str], list[Question]]] = {}
    captioned: dict[str, str] = {}  # name -> location of its captions
    questions: dict[str, str] = {}  # id -> location of its question
    for location, name, row in rows:
        captions, qa = texts(location, row)
        if captions and captioned.setdefault(name, location) != location and not repeats:
            raise DataError(
                f"{location}: {name!r} has captions already ({captioned[name]}); "
                "put all captions of an image into one row"
            )
        for id_ in (question.id for question in qa if question.id):
            if questions.setdefault(id_, location) != location:
                other = questions[id_]
                raise DataError(f"{location}: question_id {id_} is in {other} too; keep one")
        all_captions, all_qa = gathered.setdefault(name, ([], []))
        all_captions.extend(captions)
        all_qa.extend(qa)
    return {name: (tuple(captions), tuple(qa)) for name, (captions, qa) in gathered.items()}


def _text(value: Any, location: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{location}: expected a text, got {value!r:.60}; fix or remove it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{location}: unpaired surrogate ({error}); fix the text") from error
    return value


# -- JSON documents ---------------------------------------------------------------------------


def _json_rows(path: Path, document: Any) -> _Located:
    """Yield a row per image of a document: COCO captions, Karpathy's, or a list of rows."""
    if isinstance(document, list):
        for number, row in enumerate(document, 1):
            location = f"{path}, item {number}"
            yield location, _require_object(row, location)
        return
    images = _list(document, "images", str(path))
    captions = _coco_captions(path, document) if "annotations" in document else None
    seen = set()
    for number, image in enumerate(images, 1):
        location = f"{path}, image {number}"
        if captions is None:
            yield location, _karpathy_row(image, location)
            continue
        key, name = (_field(image, key, location) for key in ("id", "file_name"))
        if key in seen:
            raise DataError(f"{location}: duplicate id {key!r}; keep one")
        seen.add(key)
        yield f"{location}, id {key!r}", {"image": name, "captions": captions.pop(key, [])}
    if captions:
        raise DataError(f"{path}: captions of {next(iter(captions))!r}, which is not an image id")


def _coco_captions(path: Path, document: dict[str, Any]) -> dict[Any, list[Any]]:
    captions: dict[Any, list[Any]] = {}
    for number, note in enumerate(_list(document, "annotations", str(path)), 1):
        location = f"{path}, annotation {number}"
        of_image = captions.setdefault(_field(note, "image_id", location), [])
        of_image.append(_field(note, "caption", location))
    return captions


def _karpathy_row(image: dict[str, Any], location: str) -> dict[str, Any]:
    name = _field(image, "filename", location)
    folder = image.get("filepath", "")
    sentences = _list(image, "sentences", location)
    captions = [_field(sentence, "raw", location) for sentence in sentences]
    row = {"image": f"{folder}/{name}" if folder else name, "captions": captions}
    return row | ({"split": image["split"]} if "split" in image else {})


def _require_object(value: Any, location: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected a JSON object, got {type(value).__name__}")
    return value


def _list(value: Any, key: str, location: str) -> list[Any]:
    if not isinstance(_require_object(value, location).get(key), list):
        raise DataError(
            f"{location}: no list {key!r}; expected COCO captions, Karpathy's or a list of rows"
        )
    return value[key]


def _field(value: Any, key: str, location: str) -> Any:
    if isinstance(_require_object(value, location).get(key), dict | list | None):
        raise DataError(f"{location}: no {key!r}; fix or remove it")
    return value[key]
