"""`vadapter data index`: one pass over a folder of shards, so that training need not scan them.

The scan of each shard is appended to a journal as soon as it is finished, so that an interrupted
command resumes after the last finished shard; a line that a kill cut short is ignored. At the end
the index is written as one file and replaces the former one atomically. The journal of an index in
a bucket is stored on this machine, since objects cannot be appended to.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vadapter.console import Progress, quantity, size
from vadapter.data.shards import mmap_table
from vadapter.data.shards.shard_scan import SCANNERS, Scan, scan
from vadapter.data.shards.shard_set import INDEX, VERSION, assemble, differs
from vadapter.errors import ConfigError, DataError, Problems
from vadapter.io import storage

Say = Callable[[str], Any]


def build(folder: Path, out: Path | None = None, *, say: Say = print, every: float = 2.0) -> str:
    """Index all .tar and .parquet files below a folder and return a summary.

    The index is written to `out`, by default `index.vadapter` in the folder; `say` receives lines
    of progress, one `every` so many seconds.

    Raises:
      DataError: no shards, or unreadable shards, which are reported together after the others are
        finished; no index is written then.
      ConfigError: another process indexes the folder, or `out` is a folder.
    """
    out = out or folder / INDEX
    if not storage.remote(out) and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write")
    sizes = _shards(folder)
    journal = out.with_name(f"{out.name}.part")
    journal = storage.cached(out, journal.name) if storage.remote(out) else journal
    with _locked(journal) as file:
        if not journal.stat().st_size:
            _copy_index(out, file)
        lines = _valid_lines(folder, file)
        todo = {name: size for name, size in sizes.items() if name not in lines}
        problems = Problems()
        for name in _with_progress(folder, todo, len(sizes), say, every):
            with problems.gather():
                lines[name] = _append(file, _scan_and_hash(folder, name))
        problems.settle()
        columns, facts = assemble(_read(file, lines[name]) for name in sizes)
        mmap_table.write(out, columns, {"version": VERSION, "shards": facts})
        journal.unlink()
    members, pairs, bad, skips = (
        sum(fact[key] for fact in facts) for key in ("members", "pairs", "bad", "skips")
    )
    noun = "row group" if any(name.endswith(".parquet") for name in sizes) else "file"
    text = (
        f"{out}: {quantity(len(sizes), 'shard')} ({len(todo)} read now), "
        f"{quantity(members, noun)}, {quantity(pairs, 'pair')} of media and text"
    )
    if skips:
        name, reason = next(item for fact in facts for item in fact["skipped"].items())
        text += f"\n{quantity(skips, noun)} left out, for example {name}: {reason}"
    if bad:
        first = next(fact["first_bad"] for fact in facts if fact["bad"])
        text += f"\n{quantity(bad, 'pair')} without usable text, to be masked, the first: {first}"
    return text


def verify(folder: Path, out: Path | None = None, *, say: Say = print) -> str:
    """Read all shards of an index again and compare their SHA-256 with it.

    Raises:
      DataError: no index, or shards that have changed, all of them together.
    """
    out = out or folder / INDEX
    _, metadata = mmap_table.read(out)
    sizes = {fact["name"]: fact["size"] for fact in metadata["shards"]}
    digests = {fact["name"]: fact["sha256"] for fact in metadata["shards"]}
    problems = Problems()
    for name in _with_progress(folder, sizes, len(sizes), say):
        with problems.gather():
            if _sha256(folder / name) != digests[name]:
                raise DataError(
                    f"{folder / name}: contents changed since indexing (SHA-256 "
                    "mismatch); restore the file or index again"
                )
    problems.settle()
    return f"{out}: {quantity(len(sizes), 'shard')} unchanged"


def _shards(folder: Path) -> dict[str, int]:
    """Return name -> size in bytes of all shards below a folder."""
    if not storage.is_folder(folder):
        raise DataError(f"{folder}: no such folder; check the path")
    suffixes = (".tar",) if storage.remote(folder) else tuple(SCANNERS)
    files = storage.files(folder)
    sizes = {name: files[name]["size"] for name in sorted(files) if name.endswith(suffixes)}
    if not sizes:
        raise DataError(f"{folder}: no {' or '.join(SCANNERS)} files; check the path")
    return sizes


def _scan_and_hash(folder: Path, name: str) -> Scan:
    scanned = scan(folder, name)
    scanned.sha256 = _sha256(folder / name)
    if change := differs(folder / name, vars(scanned)):
        raise DataError(f"{folder / name}: changed while it was read, {change}; run this again")
    return scanned


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the shard") from error


@contextlib.contextmanager
def _locked(journal: Path) -> Iterator[BinaryIO]:
    """Open the journal to read and append, for this process alone."""
    with journal.open("a+b") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{journal} is being written by another process; wait for it"
            ) from None
        except OSError:
            pass  # some network file systems have no locks
        yield file


def _valid_lines(folder: Path, file: BinaryIO) -> dict[str, int]:
    """Return name -> byte offset of the journal's scans of shards that have not changed since.

    A line that was cut short is ended, so that the next one is valid.
    """
    file.seek(0)
    offsets, offset, line = {}, 0, b"\n"
    for line in file:
        with contextlib.suppress(ValueError, TypeError):
            scanned = Scan(**json.loads(line))
            if not differs(folder / scanned.name, vars(scanned)):
                offsets[scanned.name] = offset
        offset += len(line)
    if not line.endswith(b"\n"):
        file.write(b"\n")
    return offsets


def _append(file: BinaryIO, scanned: Scan) -> int:
    """Write a line to the journal and return its byte offset."""
    offset = file.seek(0, os.SEEK_END)
    file.write(json.dumps(dataclasses.asdict(scanned)).encode() + b"\n")
    file.flush()
    return offset


def _read(file: BinaryIO, offset: int) -> Scan:
    file.seek(offset)
    return Scan(**json.loads(file.readline()))


def _copy_index(out: Path, file: BinaryIO) -> None:
    """Fill a new journal from an earlier index, if that can be read."""
    try:
        columns, metadata = mmap_table.read(out)
    except DataError:
        return
    if metadata.get("version") != VERSION:
        return
    names = mmap_table.Strings(columns["names"], columns["name_ends"])
    texts = mmap_table.Strings(columns["texts"], columns["text_ends"])
    first = pair = 0
    for fact in metadata["shards"]:
        members = range(first, first + fact.pop("members"))
        pairs = range(pair, pair + fact.pop("pairs"))
        scanned = Scan(**fact)
        scanned.members = [
            (names[row].decode(), int(columns["offsets"][row]), int(columns["sizes"][row]))
            for row in members
        ]
        scanned.pairs = [  # media of -1, for none, stay -1
            (max(int(columns["media"][row]) - first, -1), texts[row].decode()) for row in pairs
        ]
        _append(file, scanned)
        first, pair = members.stop, pairs.stop


def _with_progress(
    folder: Path, sizes: dict[str, int], total: int, say: Say, every: float = 2.0
) -> Iterator[str]:
    """Yield the names of `sizes` one by one, and report the progress."""
    before = total - len(sizes)
    if before:
        say(f"resuming: {before:,} of {quantity(total, 'shard')} already done")
    progress = Progress(str(folder), sum(sizes.values()), every=every, say=say, amount=size)
    for number, name in enumerate(sizes, before + 1):
        yield name
        progress.advance(sizes[name], f"{number:,}/{total:,} shards")
