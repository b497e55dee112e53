"""What the sources of files share: the kind of their media, their digest, bad texts."""

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

MAX_BAD = 0.001  # share of examples without usable text
FEW_BAD = 10  # so many are no reason to stop

log = logging.getLogger(__name__)


def kind_of(names: Iterable[str], where: str) -> str:
    """What all of the names are; a batch holds one kind, and so does a source."""
    suffixes = {PurePosixPath(name).suffix.lower() for name in names}
    if unknown := suffixes - MEDIA:
        raise DataError(
            f"{where}: files of type {', '.join(sorted(unknown))} are neither images "
            f"({', '.join(sorted(IMAGE_SUFFIXES))}) nor clips ({', '.join(sorted(CLIP_SUFFIXES))})"
        )
    if suffixes & CLIP_SUFFIXES and suffixes & IMAGE_SUFFIXES:
        raise DataError(f"{where}: images and clips mixed; split them into two sources")
    return "clip" if suffixes & CLIP_SUFFIXES else "image"


def kind_and_key(known: Collection[str], columns: Mapping[str, str], where: str) -> tuple[str, str]:
    """(kind, key) of a source whose rows hold their media: what its columns say.

    Args:
      known: the names of its columns, with or without what lies in them.
      columns: our key -> its column.

    Raises:
      ConfigError: `columns` names a key that is not ours, or a column that there is not.
      DataError: no column of media.
    """
    annotation_tables.rename({}, columns)
    for theirs in columns.values():
        if theirs.split(".")[0] not in known:
            raise ConfigError(
                f"{where}: no column {theirs!r}; there are {', '.join(sorted(known))}"
            )
    for key in ("image", "clip", "video"):
        if key in columns or key in known:
            return "image" if key == "image" else "clip", key
    raise DataError(
        f"{where}: none of the columns image, clip, video; map one with columns={{'image': NAME}}. "
        f"There are {', '.join(sorted(known))}"
    )


def texts_or_fault(where: str, row: dict[str, Any]) -> tuple[annotation_tables.Texts, str]:
    """The texts of a row, or none and why they cannot be used."""
    try:
        return annotation_tables.texts(where, row), ""
    except DataError as error:
        return ((), ()), str(error)


def settle_bad(bad: int, total: int, first: str, where: str, allowed: float) -> None:
    """Tells of examples without usable text, which are masked, and refuses too many.

    Raises:
      DataError: all of `total`, or more than ten and more than the share `allowed`.
    """
    if bad and bad == total:
        raise DataError(f"{where}: 0 usable examples of {total}; the first: {first}")
    if bad > max(allowed * total, FEW_BAD):
        raise DataError(
            f"{where}: {bad} of {total} examples have no usable text, more than {allowed:.1%}; the "
            f"first: {first}. Mend them, or allow more with max_bad={bad / total:.2g}"
        )
    if bad:
        log.warning("%s: %d of %d without usable text; the first: %s", where, bad, total, first)


def digest_of(kind: str, examples: list[Example], positions: Iterable[Any]) -> str:
    """The sha256 in hex of a source that holds its examples, and of where their media are."""
    digest = hashlib.sha256(kind.encode())
    for example, position in zip(examples, positions, strict=True):
        row = (example.id, position, example.captions, example.qa)
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()
