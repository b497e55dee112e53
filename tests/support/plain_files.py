"""Files of all kinds for tests: JSON, archives, and what stands for images and clips."""

import io
import json
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path


def write_json(path: Path, data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def write_media(folder: Path, names: list[str]) -> None:
    """Files that hold their own names; nothing here decodes them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(content(name))


def content(name: str) -> bytes:
    return f"media of {name}".encode()


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def edit(path: Path, change) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def move_into_zip(path: Path, archive: Path) -> None:
    """A file or a folder, as the only content of an archive beside it."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    names = {str(file.relative_to(path.parent)): file.read_bytes() for file in files}
    write_zip(archive, names)
    for file in files:
        file.unlink()
    if path.is_dir():
        path.rmdir()
