"""What the sources share: kinds of media, digests, and rows that hold their media."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from vadapter.data import annotation_tables
from vadapter.data.example import Example, Source
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES, MEDIA_SUFFIXES
from vadapter.errors import ConfigError, DataError


def kind_of(names: Iterable[str], location: str) -> str:
    """Return "image" or "clip" for file names; a batch holds one kind, and so does a source."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if unknown := suffixes - MEDIA_SUFFIXES:
        raise DataError(
            f"{location}: files of type {', '.join(sorted(unknown))} are neither images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) nor clips ({', '.join(sorted(CLIP_SUFFIXES))})"
        )
    if suffixes & CLIP_SUFFIXES and suffixes & IMAGE_SUFFIXES:
        raise DataError(f"{location}: images and clips are mixed; split them into two sources")
    return "clip" if suffixes & CLIP_SUFFIXES else "image"


def digest_of(kind: str, rows: Iterable[Any]) -> str:
    """Return the SHA-256 (hex) of a kind of media and of rows as JSON."""
    digest = hashlib.sha256(kind.encode())
    for row in rows:
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """Return the SHA-256 (hex) of a value as JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


class RowSource(Source):
    """A source whose rows hold their media; a row with unusable texts or media is masked.

    `names` are those of its columns; `columns` maps keys of `annotation_tables` to columns, which
    may be paths such as `qa.text`; `location` names the source in messages.

    Raises:
      ConfigError: `columns` has an unknown key, or names a missing column.
      DataError: no column holds media.
    """

    def __init__(self, names: Collection[str], columns: Mapping[str, str] | None, location: str):
        self._columns = dict(columns or {})
        annotation_tables.rename({}, self._columns)
        listed = ", ".join(sorted(names))
        for column in self._columns.values():
            if column.split(".")[0] not in names:
                raise ConfigError(f"{location}: no column {column!r}; columns: {listed}")
        keys = [key for key in annotation_tables.MEDIA_KEYS if key in self._columns or key in names]
        if not keys:
            raise DataError(
                f"{location}: no column image, clip or video; map one with "
                f"columns={{'image': NAME}}. Columns: {listed}"
            )
        self._media = keys[0]  # key of the media
        self.kind = "image" if self._media == "image" else "clip"

    def _read(self, index: int, *, media: bool) -> tuple[Any, str, dict[str, Any]]:
        """Return (an id, the location, the row under the keys of `annotation_tables`) of a row.

        The id is that of a row without one; the media need not be read unless `media`.
        """
        raise NotImplementedError

    def __getitem__(self, index: int) -> Example:
        return self._example(index, media=True)[0]

    def text_only(self, index: int) -> Example:
        """Return the example without its media."""
        return self._example(index, media=False)[0]

    def fault(self, index: int) -> str:
        """Return why an example's text is masked, "" if it is not."""
        return self._example(index, media=False)[1]

    def _example(self, index: int, *, media: bool) -> tuple[Example, str]:
        """Return an example, and why its texts are unusable: it then has none."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        id_, location, row = self._read(index, media=media)
        try:
            texts, fault = annotation_tables.texts(location, row), ""
        except DataError as error:
            texts, fault = ((), ()), str(error)
        value = row.get(self._media) if media else None
        value = value.get("bytes") if isinstance(value, Mapping) else value
        usable = value if isinstance(value, bytes) else None
        return Example(str(row.get("id", id_)), usable, *texts), fault
