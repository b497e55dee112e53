"""Paths on this machine and in buckets, `gs://BUCKET/NAME`, behind one interface.

`as_path` gives a `pathlib.Path` of a local path and an `etils.epath.Path` of a bucket's, which has
the same methods over gcsfs. Object stores have no append, no rename of a folder and no locks; what
needs these calls the functions here (locks are in `vadapter.io.lock`). TensorStore and Orbax
read and write arrays in buckets by themselves.

An object is written as a whole or not at all. A folder exists while an object is below it.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from vadapter.errors import ConfigError
from vadapter.io.buckets import filesystem, prepare, refusal

COMMIT = "commit_success.txt"  # what Orbax writes last into a folder of a bucket


def as_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user's text names.

    Returns:
      A `pathlib.Path`, or of `gs://…` an `etils.epath.Path`, which is none but acts like one.

    Raises:
      ConfigError: gcsfs is missing, or it is a URL of another kind.
    """
    if not isinstance(text, str | Path):
        return cast(Path, text)
    text = re.sub(r"^gs:/(?!/)", "gs://", str(text))  # as pathlib spells it
    if not (scheme := re.match(r"(\w+)://", text)):
        return Path(text)
    if scheme[1] != "gs":
        raise ConfigError(f"{text}: paths are local or gs://BUCKET/NAME; copy or mount it")
    if not re.match(r"gs://[^/]", text):
        raise ConfigError(f"{text}: names no bucket; give gs://BUCKET/NAME")
    prepare()
    from etils import epath

    return cast(Path, epath.Path(text))


def absolute(path: str | os.PathLike[str]) -> Path:
    """As `as_path`; a local path from the root on."""
    path = as_path(path)
    return path if remote(path) else path.absolute()  # epath takes gs: for a folder here


def remote(path: Any) -> bool:
    """Whether a path of `as_path` is in a bucket."""
    return os.fspath(path).startswith("gs://")  # which no pathlib.Path does


# -- files -------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half of it."""
    if remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


class Uploaded:
    """A file of a bucket that grows in memory and is uploaded whole by `flush`.

    What was written after the last `flush` is lost when the process is killed.

    Args:
      path: in a bucket; content: what it starts with.
    """

    def __init__(self, path: Path, content: bytes):
        self.name = str(path)
        self._path, self._content, self._new = path, bytearray(content), False

    def write(self, data: bytes) -> int:
        """Appends; returns the number of bytes, all of them."""
        self._content += data
        self._new = self._new or bool(data)
        return len(data)

    def flush(self) -> None:
        """Uploads what is new.

        Raises:
          OSError: it could not; nothing is lost, the next call tries again.
        """
        if self._new:
            try:
                write_bytes(self._path, bytes(self._content))
            except Exception as error:
                raise OSError(errno.EIO, refusal(error) or str(error), self.name) from error
            self._new = False


# -- folders -----------------------------------------------------------------------------------


def is_folder(path: Path) -> bool:
    """Whether a folder is there; a bucket that does not answer is an error, not a no."""
    return path.exists() if remote(path) else path.is_dir()


def committed(folder: Path) -> bool:
    """Whether a folder that Orbax writes is complete: locally it is renamed, else marked."""
    return (folder / COMMIT).exists() if remote(folder) else folder.is_dir()


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """All files below a folder of a bucket: name relative to it -> facts, see `facts`."""
    found = filesystem().find(str(folder), detail=True)
    base = str(folder).removeprefix("gs://").rstrip("/") + "/"
    return {name.removeprefix(base): _facts(info) for name, info in found.items()}


def remove_tree(folder: Path) -> None:
    """Deletes a folder, if it is there, with all that is in it."""
    if remote(folder):
        with contextlib.suppress(FileNotFoundError):
            filesystem().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_tree(source: Path, target: Path) -> None:
    """Renames a folder; one of a bucket file by file, on the server."""
    if remote(source):
        filesystem().mv(str(source), str(target), recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def copy_tree(source: Path, target: Path) -> None:
    """Copies a folder that Orbax wrote: `target` is complete or not `committed`.

    Args:
      target: must not exist; its parent must.
    """
    part = target if remote(target) else target.with_name(f"{target.name}.part")
    remove_tree(part)  # of an interrupted copy
    try:
        if remote(source):
            names = list(files(source))
        else:
            names = [p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()]
        for name in sorted(names, key=lambda name: name == COMMIT):
            _copy(source / name, part / name)
        if remote(target):
            (target / COMMIT).touch()
        else:
            part.rename(target)
    except Exception:
        remove_tree(part)
        raise


def _copy(source: Path, target: Path) -> None:
    if remote(source) and remote(target):
        filesystem().cp_file(str(source), str(target))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as one, target.open("wb") as other:
        shutil.copyfileobj(one, other, 16 << 20)


def kvstore(folder: Path) -> dict[str, str]:
    """Where TensorStore finds a folder.

    No URL: in those, some characters of file names have a meaning.
    """
    if not remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, name = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


# -- data --------------------------------------------------------------------------------------


def facts(path: Path) -> dict[str, int]:
    """`size` in bytes and `mtime_ns` of a file; an object has its generation instead of a time:
    another one is another content.

    Raises:
      OSError: there is none.
    """
    if remote(path):
        return _facts(filesystem().info(str(path)))
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _facts(info: dict[str, Any]) -> dict[str, int]:
    return {"size": int(info["size"]), "mtime_ns": int(info.get("generation") or 0)}


def read_range(path: str, start: int, size: int, generation: int) -> bytes:
    """Bytes of an object of that generation.

    Raises:
      OSError: it is gone, or cannot be reached.
    """
    return _fetch(path, generation, start, start + size)


def read_object(path: str, generation: int) -> bytes:
    """All bytes of an object, as `read_range`."""
    return _fetch(path, generation)


def _fetch(path: str, generation: int, *span: int) -> bytes:
    try:
        return filesystem().cat_file(path, *span, generation=str(generation))
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, refusal(error) or str(error), path) from error


def local(text: str | os.PathLike[str], what: str) -> Path:
    """A path that cannot be in a bucket.

    Raises:
      ConfigError: it is.
    """
    path = as_path(text)
    if remote(path):
        raise ConfigError(f"{what}={path}: has to be a local path; copy what is in the bucket")
    return path


@contextlib.contextmanager
def written_locally(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`: itself, or one that is uploaded on leaving."""
    if not remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield (made := Path(folder) / path.name)
        filesystem().put_file(str(made), str(path))


def cached(path: Path, suffix: str) -> Path:
    """A file of this machine that stands for an object, in a folder of the user's own."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vadapter" / "objects"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}-{suffix}"


def local_copy(path: Path) -> Path:
    """A file to map into memory: the path itself, or this object downloaded once a machine."""
    if not remote(path):
        return path
    target = cached(path, f"{facts(path)['mtime_ns']}-{path.name}")
    if not target.is_file():
        descriptor, part = tempfile.mkstemp(dir=target.parent)
        os.close(descriptor)
        try:
            filesystem().get_file(str(path), part)
            os.replace(part, target)
        finally:
            Path(part).unlink(missing_ok=True)
    return target
