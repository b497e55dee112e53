"""Results that are kept in a folder of the user's, so that the next process need not compute them.

What a result follows from is its key, to which the content of this package and the versions of the
libraries that it computes with are added: another version computes again. A file that is missing,
corrupt or cannot be written is as if nothing were kept. Programs are among the results, so that the
folder must be one that nobody else can write to.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vadapter.errors import ConfigError

MAX_FILES = 512  # kept; the oldest are removed
_LIBRARIES = ("jax", "jaxlib", "flax", "einops", "qwix")
_DIGEST = hashlib.sha256().digest_size

_folder: Path | None = None


def keep_in(folder: Path | None) -> None:
    """Keep results in a folder, which is created if necessary; None: keep nothing.

    Raises:
      ConfigError: others can write to the folder, and could put programs of theirs into it.
    """
    global _folder
    _folder = None
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        info = folder.stat()
    except OSError:
        return  # no writable home: compute again
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{folder}: other users can write to the compilation cache, and so run code as you; "
            "chmod 700 it, or set VADAPTER_COMPILE_CACHE to a directory of your own"
        )
    _folder = folder


def folder() -> Path | None:
    """Return the folder of `keep_in`; None if nothing is kept."""
    return _folder


def kept(kind: str, key: Any, make: Callable[[], Any]) -> Any:
    """Return the JSON value `make()`, computed once for every key.

    Args:
      kind: the beginning of the name of the file.
      key: a JSON value of all that the result follows from.
    """
    value = load(kind, key)
    if value is None:
        value = make()
        save(kind, key, value)
    return value


def load(kind: str, key: Any) -> Any:
    """Return the JSON value that `save` has kept; None without."""
    data = read(kind, key)
    return None if data is None else json.loads(data)


def save(kind: str, key: Any, value: Any) -> None:
    """Keep a JSON value."""
    write(kind, key, json.dumps(value).encode())


def read(kind: str, key: Any) -> bytes | None:
    """Return what `write` has kept; None if there is nothing, or it is corrupt."""
    if _folder is None:
        return None
    try:
        content = _path(_folder, kind, key).read_bytes()
    except OSError:
        return None
    digest, data = content[:_DIGEST], content[_DIGEST:]
    return data if hashlib.sha256(data).digest() == digest else None


def write(kind: str, key: Any, data: bytes) -> None:
    """Keep bytes; a reader sees all of them or none, whatever other processes write."""
    if _folder is None:
        return
    path = _path(_folder, kind, key)
    with contextlib.suppress(OSError):  # a full disk: nothing is kept
        path.parent.mkdir(exist_ok=True, mode=0o700)
        descriptor, part = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(hashlib.sha256(data).digest() + data)
            os.replace(part, path)
        except OSError:
            os.unlink(part)
            raise
        _remove_oldest(path.parent)


def _path(folder: Path, kind: str, key: Any) -> Path:
    text = json.dumps([version(), key], sort_keys=True)
    return folder / "results" / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _remove_oldest(folder: Path) -> None:
    """Remove the files that were written first, beyond `MAX_FILES`."""
    files = list(folder.iterdir())
    if len(files) <= MAX_FILES:
        return
    times = {}
    for path in files:
        with contextlib.suppress(OSError):  # removed by another process
            times[path] = path.stat().st_mtime
    for path in sorted(times, key=times.__getitem__)[:-MAX_FILES]:
        path.unlink(missing_ok=True)


@functools.cache
def version() -> str:
    """Return a digest of the source of this package and the versions of the libraries."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{name}=={importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()
