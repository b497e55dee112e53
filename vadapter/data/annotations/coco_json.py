"""Captions in JSON files of one document.

COCO       {"images": [{"id": 139, "file_name": "a.jpg"}, …],
            "annotations": [{"image_id": 139, "caption": "a room"}, …]}, all in every split;
            https://cocodataset.org/#format-data
Karpathy   {"images": [{"filepath": "val2014", "filename": "a.jpg", "split": "test",
            "sentences": [{"raw": "a room"}, …]}, …]}, as dataset_coco.json and
            dataset_flickr8k.json; the image is FILEPATH/FILENAME
a list     of rows as in `vadapter.data.annotations.annotation_tables`
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.errors import DataError


def rows(path: Path, document: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of each image, for `tables.read_rows`.

    Args:
      path: to be named in errors.
      document: what the file says.

    Raises:
      DataError: another form, an image without captions, an id twice, captions of no image.
    """
    if isinstance(document, list):
        for number, row in enumerate(document, 1):
            yield f"{path}, item {number}", _object(row, f"{path}, item {number}")
        return
    document = _object(document, str(path))
    images = _list(document, "images", str(path))
    captions = _captions(path, document) if "annotations" in document else None
    seen = set()
    for number, image in enumerate(images, 1):
        where = f"{path}, image {number}"
        if captions is None:
            yield where, _sentences(_object(image, where), where)
            continue
        key, name = (_field(_object(image, where), key, where) for key in ("id", "file_name"))
        if key in seen:
            raise DataError(f"{where}: the id {key!r} is there twice; keep one")
        seen.add(key)
        yield f"{where}, id {key!r}", {"image": name, "captions": captions.pop(key, [])}
    if captions:
        raise DataError(f"{path}: captions of {next(iter(captions))!r}, which is no image's id")


def _captions(path: Path, document: dict[str, Any]) -> dict[Any, list[Any]]:
    captions: dict[Any, list[Any]] = {}
    for number, note in enumerate(_list(document, "annotations", str(path)), 1):
        where = f"{path}, annotation {number}"
        note = _object(note, where)
        captions.setdefault(_field(note, "image_id", where), []).append(
            _field(note, "caption", where)
        )
    return captions


def _sentences(image: dict[str, Any], where: str) -> dict[str, Any]:
    name = _field(image, "filename", where)
    folder = image.get("filepath", "")
    said = [
        _field(_object(sentence, where), "raw", where)
        for sentence in _list(image, "sentences", where)
    ]
    row = {"image": f"{folder}/{name}" if folder else name, "captions": said}
    return row | ({"split": image["split"]} if "split" in image else {})


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object is expected, got {type(value).__name__}")
    return value


def _list(value: dict[str, Any], key: str, where: str) -> list[Any]:
    if not isinstance(value.get(key), list):
        raise DataError(f"{where}: no list {key!r}; COCO's captions, Karpathy's or a list of rows?")
    return value[key]


def _field(value: dict[str, Any], key: str, where: str) -> Any:
    if isinstance(value.get(key), dict | list | None):
        raise DataError(f"{where}: no {key!r}; mend or remove it")
    return value[key]
