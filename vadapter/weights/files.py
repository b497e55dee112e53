"""Weights files, which may come from anywhere: errors that name them, stamps and digests."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from io import BufferedReader
from pathlib import Path

from vadapter.errors import CheckpointError

Stamp = tuple[int, int]  # size in bytes and time of the last change in ns

_LOOKALIKES = {  # first bytes of what is often found under the name of a weights file
    b"<": "it is an HTML page, perhaps a login or license page",
    b"version https://git-lfs": "it is a Git LFS pointer; run `git lfs pull` to fetch the weights",
    b"PK": "it is a zip archive, as torch and numpy write them",
    b"\x80": "it is a pickle, which is never loaded",
}


def require_file(path: Path) -> Path:
    """Return `path`; raise a CheckpointError that names folder and setting if it is no file."""
    if path.is_file():
        return path
    missing = "" if path.parent.is_dir() else " (the folder does not exist)"
    raise CheckpointError(
        f"No weights file {path.name!r} in {path.parent}{missing}. Put the file there, or set the "
        "weights path of the recipe (VADAPTER_DATA for the standard data folder) to its folder."
    )


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn whatever a corrupt or crafted file raises into a CheckpointError that names it."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as e:
        # A message may quote the file: names of megabytes, control characters.
        reason = "".join(c if c.isprintable() else "?" for c in str(e)[:400])
        raise CheckpointError(
            f"Cannot read the weights {path}: {reason}. Download it again, or set another path."
        ) from e


def reject_lookalikes(head: bytes) -> None:
    """Raise ValueError if the first bytes of a file are those of a well-known other format."""
    for start, format_ in _LOOKALIKES.items():
        if head.lstrip().startswith(start):
            raise ValueError(format_)


def stamp(file: Path | BufferedReader) -> Stamp:
    """Return a file's size and time of change, which tell whether it was rewritten."""
    stat = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return stat.st_size, stat.st_mtime_ns


def sha256(files: Iterable[BufferedReader]) -> str:
    """Return the SHA-256 (hex) of the concatenated files, closing each."""
    digest = hashlib.sha256()
    for file in files:
        with file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()
