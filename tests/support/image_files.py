"""Small data sets as files: tables beside images, tar shards, img2dataset's layout."""

import io
import json
import os
import tarfile
from pathlib import Path

from PIL import Image

from vadapter.data.example import Source
from vadapter.data.media.frames import load_media
from vadapter.data.sources.tars import CaptionTars


def write_tar(path: Path, files: dict[str, bytes], *, format: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def spoil_header(path: Path) -> None:
    """Make the first header of a tar invalid, and keep its size, time and contents."""
    status, raw = path.stat(), bytearray(path.read_bytes())
    raw[150] ^= 1  # of the checksum
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def image(level: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def write_rows(path: Path, rows: list) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(lines))
    return path


def row(index: int, **more) -> dict:
    return {
        "image": f"{index}.png",
        "captions": [f"number {index}", "gray"],
        "split": "train",
    } | more


def tars(folder: Path, rows: list | None = None, count: int = 5) -> Path:
    """Two shards of `count` images and captions.jsonl."""
    for shard in range(2):
        files = {f"{i}.png": image(i * 20) for i in range(count) if i % 2 == shard}
        write_tar(folder / f"train-00{shard}.tar", files)
    rows = [row(i) for i in range(count)] if rows is None else rows
    write_rows(folder / "captions.jsonl", rows)
    return folder


def folder_of(path: Path, rows: list | None = None, count: int = 5) -> Path:
    for i in range(count):
        (path / f"{i}.png").write_bytes(image(i * 20))
    return write_rows(
        path / "table.jsonl", [row(i) for i in range(count)] if rows is None else rows
    )


def contents(source: Source) -> list:
    return [
        (e.id, int(load_media(e.media, frames=1).mean()), e.captions, e.qa)  # type: ignore
        for e in (source[i] for i in range(len(source)))
    ]


EXPECTED = [(f"{i}.png", i * 20, (f"number {i}", "gray"), ()) for i in range(5)]


def pairs(folder: Path, count: int = 4, each: int = 3) -> Path:
    """Shards 00000.tar … of images and captions, as img2dataset writes them."""
    folder.mkdir(exist_ok=True)
    for shard in range(count):
        files = {}
        for i in range(each):
            key = f"{shard:05d}{i:04d}"
            note = {
                "caption": f"not the txt {i}",
                "url": "http://x",
                "key": key,
                "status": "success",
            }
            files |= {
                f"{key}.png": image(shard * 20 + i),
                f"{key}.txt": f"shard {shard}, image {i}".encode(),
                f"{key}.json": json.dumps(note).encode(),
            }
        write_tar(folder / f"{shard:05d}.tar", files)
    return folder


def read(folder: Path, **more) -> CaptionTars:
    return CaptionTars(folder, shards="*.tar", **more)
