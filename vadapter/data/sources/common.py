"""Helpers of the sources: kind of media, columns, digests, and unusable texts."""

import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from vadapter.data.annotations import annotation_tables
from vadapter.data.example import Example
from vadapter.data.media.images import CLIP_SUFFIXES, IMAGE_SUFFIXES
from vadapter.data.shards.shard_scan import MEDIA
from vadapter.errors import ConfigError, DataError

MAX_BAD = 0.001  # accepted share of examples without usable text
FEW_BAD = 10  # accepted number of them, whatever the share

log = logging.getLogger(__name__)


def kind_of(names: Iterable[str], location: str) -> str:
    """Return "image" or "clip" for file names; a batch holds one kind, and so does a source."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if unknown := suffixes - MEDIA:
        raise DataError(
            f"{location}: files of type {', '.join(sorted(unknown))} are neither images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) nor clips ({', '.join(sorted(CLIP_SUFFIXES))})"
        )
    if suffixes & CLIP_SUFFIXES and suffixes & IMAGE_SUFFIXES:
        raise DataError(f"{location}: images and clips are mixed; split them into two sources")
    return "clip" if suffixes & CLIP_SUFFIXES else "image"


def kind_and_key(
    names: Collection[str], columns: Mapping[str, str], location: str
) -> tuple[str, str]:
    """Return (kind, key of the media) of a source whose rows hold their media.

    Args:
      names: names of its columns.
      columns: key of `annotation_tables` -> column, which may be a path such as `qa.text`.
      location: the source, for messages.

    Raises:
      ConfigError: `columns` has an unknown key, or names a missing column.
      DataError: no column holds media.
    """
    annotation_tables.rename({}, columns)
    for theirs in columns.values():
        if theirs.split(".")[0] not in names:
            raise ConfigError(
                f"{location}: no column {theirs!r}; columns: {', '.join(sorted(names))}"
            )
    for key in ("image", "clip", "video"):
        if key in columns or key in names:
            return "image" if key == "image" else "clip", key
    raise DataError(
        f"{location}: no column image, clip or video; map one with columns={{'image': NAME}}. "
        f"Columns: {', '.join(sorted(names))}"
    )


def texts_or_fault(location: str, row: dict[str, Any]) -> tuple[annotation_tables.Texts, str]:
    """Return the texts of a row and "", or no texts and why they are unusable."""
    try:
        return annotation_tables.texts(location, row), ""
    except DataError as error:
        return ((), ()), str(error)


def check_bad(bad: int, total: int, first: str, location: str, allowed: float) -> None:
    """Log examples without usable text, which are masked, and refuse too many.

    Args:
      bad: number of such examples.
      total: number of all examples.
      first: why the first of them is unusable.
      location: the source, for messages.
      allowed: accepted share.

    Raises:
      DataError: all of `total`, or more than ten and more than the share `allowed`.
    """
    if bad and bad == total:
        raise DataError(f"{location}: 0 usable examples of {total}; the first: {first}")
    if bad > max(allowed * total, FEW_BAD):
        raise DataError(
            f"{location}: {bad} of {total} examples have no usable text, more than {allowed:.1%}; "
            f"the first: {first}. Fix them, or accept more with max_bad={bad / total:.2g}"
        )
    if bad:
        log.warning("%s: %d of %d without usable text; the first: %s", location, bad, total, first)


def digest_of(kind: str, examples: list[Example], positions: Iterable[Any]) -> str:
    """Return the SHA-256 (hex) of examples without media, and of the positions of their media."""
    digest = hashlib.sha256(kind.encode())
    for example, position in zip(examples, positions, strict=True):
        row = (example.id, position, example.captions, example.qa)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
