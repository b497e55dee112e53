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
    """Yield (location, row) of each image in the parsed JSON of a file.

    Raises:
      DataError: another format, an image without captions, a duplicate id, captions of no image.
    """
    if isinstance(document, list):
        for number, row in enumerate(document, 1):
            location = f"{path}, item {number}"
            yield location, require_object(row, location)
        return
    images = _list(document, "images", str(path))
    captions = _captions(path, document) if "annotations" in document else None
    seen = set()
    for number, image in enumerate(images, 1):
        location = f"{path}, image {number}"
        if captions is None:
            yield location, _sentences(image, location)
            continue
        key, name = (_field(image, key, location) for key in ("id", "file_name"))
        if key in seen:
            raise DataError(f"{location}: duplicate id {key!r}; keep one")
        seen.add(key)
        yield f"{location}, id {key!r}", {"image": name, "captions": captions.pop(key, [])}
    if captions:
        raise DataError(f"{path}: captions of {next(iter(captions))!r}, which is not an image id")


def _captions(path: Path, document: dict[str, Any]) -> dict[Any, list[Any]]:
    captions: dict[Any, list[Any]] = {}
    for number, note in enumerate(_list(document, "annotations", str(path)), 1):
        location = f"{path}, annotation {number}"
        of_image = captions.setdefault(_field(note, "image_id", location), [])
        of_image.append(_field(note, "caption", location))
    return captions


def _sentences(image: dict[str, Any], location: str) -> dict[str, Any]:
    name = _field(image, "filename", location)
    folder = image.get("filepath", "")
    sentences = _list(image, "sentences", location)
    captions = [_field(sentence, "raw", location) for sentence in sentences]
    row = {"image": f"{folder}/{name}" if folder else name, "captions": captions}
    return row | ({"split": image["split"]} if "split" in image else {})


def require_object(value: Any, location: str) -> dict[str, Any]:
    """Return the value. Raises DataError if it is not a JSON object."""
    if not isinstance(value, dict):
        raise DataError(f"{location}: expected a JSON object, got {type(value).__name__}")
    return value


def _list(value: Any, key: str, location: str) -> list[Any]:
    if not isinstance(require_object(value, location).get(key), list):
        raise DataError(
            f"{location}: no list {key!r}; expected COCO captions, Karpathy's or a list of rows"
        )
    return value[key]


def _field(value: Any, key: str, location: str) -> Any:
    if isinstance(require_object(value, location).get(key), dict | list | None):
        raise DataError(f"{location}: no {key!r}; fix or remove it")
    return value[key]
