"""Paths on this machine and in buckets, `gs://BUCKET/NAME`, behind one interface.

`as_path` returns a `pathlib.Path` for a local path and an `etils.epath.Path`, which has the same
methods over gcsfs, for a path in a bucket. Object stores cannot append, rename a folder or lock;
the functions here do what needs that (locks are in `vadapter.io.lock`). TensorStore and Orbax read
and write arrays in buckets by themselves.

An object is written as a whole or not at all. A folder exists while there is an object in it.
"""

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from vadapter.errors import ConfigError
from vadapter.io.buckets import filesystem, prepare, refusal

COMMIT = "commit_success.txt"  # the file that Orbax writes last into a folder of a bucket


def as_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a user has written: a `pathlib.Path`, or an `etils.epath.Path`.

    Raises:
      ConfigError: gcsfs is not installed, or the text is a URL of another kind.
    """
    if not isinstance(text, str | Path):
        return cast(Path, text)
    text = re.sub(r"^gs:/(?!/)", "gs://", str(text))  # as pathlib spells it
    if not (scheme := re.match(r"(\w+)://", text)):
        return Path(text)
    if scheme[1] != "gs":
        raise ConfigError(f"{text}: paths are local or gs://BUCKET/NAME; copy or mount it")
    if not re.match(r"gs://[^/]", text):
        raise ConfigError(f"{text}: has no bucket name; write gs://BUCKET/NAME")
    prepare()
    from etils import epath

    return cast(Path, epath.Path(text))


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return `as_path(path)`, a local path made absolute."""
    path = as_path(path)
    return path if remote(path) else path.absolute()  # epath would take gs: for a local folder


def remote(path: Any) -> bool:
    """Return whether a path from `as_path` is in a bucket."""
    return os.fspath(path).startswith("gs://")  # pathlib.Path turns // into /


# -- files -------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a reader sees the old file or the new one."""
    if remote(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


class Uploaded:
    """A file in a bucket that grows in memory, from `content` on; `flush` uploads all of it.

    If the process is killed, everything written after the last `flush` is lost.
    """

    def __init__(self, path: Path, content: bytes):
        self.name = str(path)
        self._path, self._content, self._new = path, bytearray(content), False

    def write(self, data: bytes) -> int:
        """Append bytes and return how many: all of them."""
        self._content += data
        self._new = self._new or bool(data)
        return len(data)

    def flush(self) -> None:
        """Upload the file if it has grown.

        Raises:
          OSError: the upload failed; nothing is lost, the next call tries again.
        """
        if self._new:
            try:
                write_bytes(self._path, bytes(self._content))
            except Exception as error:
                raise OSError(errno.EIO, refusal(error) or str(error), self.name) from error
            self._new = False


# -- folders -----------------------------------------------------------------------------------


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; a bucket that does not answer is an error, not False."""
    return path.exists() if remote(path) else path.is_dir()


def committed(folder: Path) -> bool:
    """Return whether a folder from Orbax is complete: renamed on a disk, marked in a bucket."""
    return (folder / COMMIT).exists() if remote(folder) else folder.is_dir()


def files(folder: Path) -> dict[str, dict[str, int]]:
    """Return all files below a folder: relative name -> facts, see `facts`."""
    if not remote(folder):
        paths = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): facts(path) for path in paths}
    objects = filesystem().find(str(folder), detail=True)
    base = str(folder).removeprefix("gs://").rstrip("/") + "/"
    return {name.removeprefix(base): _facts(info) for name, info in objects.items()}


def remove_tree(folder: Path) -> None:
    """Delete a folder and everything in it; do nothing if there is none."""
    if remote(folder):
        with contextlib.suppress(FileNotFoundError):
            filesystem().rm(str(folder), recursive=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def move_tree(source: Path, target: Path) -> None:
    """Rename a folder; in a bucket file by file, on the server."""
    if remote(source):
        filesystem().mv(str(source), str(target), recursive=True)
    else:
        target.parent.mkdir(exist_ok=True)
        source.rename(target)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a folder from Orbax to a new one; until it is complete, `target` is not `committed`."""
    part = target if remote(target) else target.with_name(f"{target.name}.part")
    remove_tree(part)  # of an interrupted copy
    try:
        for name in sorted(files(source), key=lambda name: name == COMMIT):
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
    """Return the TensorStore spec of a folder: no URL, where characters have other meanings."""
    if not remote(folder):
        return {"driver": "file", "path": f"{folder}/"}
    bucket, _, name = str(folder).removeprefix("gs://").partition("/")
    return {"driver": "gcs", "bucket": bucket, "path": f"{name}/"}


# -- data --------------------------------------------------------------------------------------


def facts(path: Path) -> dict[str, int]:
    """Return `size` in bytes and `mtime_ns` of a file; raises OSError if it does not exist.

    For an object `mtime_ns` is its generation, which changes with its content.
    """
    if remote(path):
        return _facts(filesystem().info(str(path)))
    status = path.stat()
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _facts(info: dict[str, Any]) -> dict[str, int]:
    return {"size": int(info["size"]), "mtime_ns": int(info.get("generation") or 0)}


def read_object(path: str, generation: int, *span: int) -> bytes:
    """Return the bytes of an object of that generation: all, or those of `span`, (start, stop).

    Raises:
      OSError: there is no such object, or the bucket does not answer.
    """
    try:
        return filesystem().cat_file(path, *span, generation=str(generation))
    except OSError:
        raise
    except Exception as error:
        raise OSError(errno.EIO, refusal(error) or str(error), path) from error


def local(text: str | os.PathLike[str], what: str) -> Path:
    """Return the path of the option `what`. Raises ConfigError if it is in a bucket."""
    path = as_path(text)
    if remote(path):
        raise ConfigError(f"{what}={path}: must be a local path; copy it from the bucket")
    return path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a local file to write, which then takes the place of `path` atomically."""
    if remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (part := Path(folder) / path.name)
            filesystem().put_file(str(part), str(path))
        return
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    try:
        yield part
        with part.open("r+b") as file:
            os.fsync(file.fileno())
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def user_cache(name: str) -> Path:
    """Return the folder of this user's caches of that name; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vadapter" / name


def cached(path: Path, suffix: str) -> Path:
    """Return the path of a local file that caches something about an object."""
    root = user_cache("objects")
    root.mkdir(parents=True, exist_ok=True, mode=0o700)
    return root / f"{hashlib.sha256(str(path).encode()).hexdigest()[:24]}-{suffix}"


def local_copy(path: Path) -> Path:
    """Return a local file: the path itself, or the object downloaded once per machine."""
    if not remote(path):
        return path
    target = cached(path, f"{facts(path)['mtime_ns']}-{path.name}")
    if not target.is_file():
        with replacing(target) as part:
            filesystem().get_file(str(path), str(part))
    return target
