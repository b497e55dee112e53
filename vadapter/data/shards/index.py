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
from typing import Any, BinaryIO, NamedTuple

from vadapter.console import Progress, quantity, size
from vadapter.data.shards import mmap_table
from vadapter.data.shards.shard_scan import SCANNERS, Scan, scan
from vadapter.data.shards.shard_set import INDEX, VERSION, assemble, differs
from vadapter.errors import ConfigError, DataError, Problems
from vadapter.io import storage

_CHUNK = 8 << 20

Say = Callable[[str], Any]


def build(folder: Path, out: Path | None = None, *, say: Say = print, every: float = 2.0) -> str:
    """Index all shards below a folder.

    Args:
      folder: searched for .tar and .parquet files, at any depth.
      out: the index file, `index.vadapter` in the folder if None.
      say: receives lines of progress.
      every: seconds between them.

    Returns:
      A summary: counts, what was left out, and pairs that will be masked.

    Raises:
      DataError: no shards, or unreadable shards, which are reported together after the others are
        finished; no index is written then.
      ConfigError: another process indexes the folder, or `out` is a folder.
    """
    out = out or folder / INDEX
    if not storage.remote(out) and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write")
    names = _shards(folder)
    journal = out.with_name(f"{out.name}.part")
    journal = storage.cached(out, journal.name) if storage.remote(out) else journal
    with _locked(journal) as file:
        if not journal.stat().st_size:
            _copy_index(out, file)
        entries = _entries(file)
        todo = [name for name in names if not _unchanged(folder / name, entries.get(name))]
        problems = Problems()
        for name in _with_progress(folder, todo, len(names), say, every):
            with problems.gather():
                entries[name] = _append(file, _scan_and_hash(folder, name))
        problems.settle()
        columns, facts = assemble(_read(file, entries[name]) for name in names)
        mmap_table.write(out, columns, {"version": VERSION, "shards": facts})
        journal.unlink()
    members, pairs, bad, skips = (
        sum(fact[key] for fact in facts) for key in ("members", "pairs", "bad", "skips")
    )
    text = (
        f"{out}: {quantity(len(names), 'shard')} ({len(todo)} read now), "
        f"{quantity(members, 'member')}, {quantity(pairs, 'pair')} with texts in them"
    )
    if skips:
        reasons = (reason for fact in facts for reason in fact["skipped"].items())
        text += "\n{} left out, for example {}: {}".format(
            quantity(skips, "member"), *next(reasons, ("", ""))
        )
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
    digests = {fact["name"]: fact["sha256"] for fact in metadata["shards"]}
    problems = Problems()
    for name in _with_progress(folder, list(digests), len(digests), say):
        with problems.gather():
            if _sha256(folder / name) != digests[name]:
                raise DataError(
                    f"{folder / name}: contents changed since indexing (SHA-256 "
                    "mismatch); restore the file or index again"
                )
    problems.settle()
    return f"{out}: {quantity(len(digests), 'shard')} unchanged"


def _shards(folder: Path) -> list[str]:
    if not storage.is_folder(folder):
        raise DataError(f"{folder}: no such folder; check the path")
    if storage.remote(folder):
        names = sorted(name for name in storage.files(folder) if name.endswith(".tar"))
    else:
        names = sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.suffix in SCANNERS and path.is_file()
        )
    if not names:
        raise DataError(f"{folder}: no {' or '.join(SCANNERS)} files; check the path")
    return names


def _scan_and_hash(folder: Path, name: str) -> Scan:
    scanned = scan(folder, name)
    scanned.sha256 = _sha256(folder / name)
    if (change := differs(folder / name, dataclasses.asdict(scanned))) is not None:
        raise DataError(f"{folder / name}: changed while it was read, {change}; run this again")
    return scanned


def _sha256(path: Path) -> str:
    total = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); restore the shard") from error
    return total.hexdigest()


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


class _Entry(NamedTuple):
    """The byte offset of a shard's line in the journal, and the size and time of its file."""

    place: int
    size: int
    mtime_ns: int


def _entries(file: BinaryIO) -> dict[str, _Entry]:
    """Return the entries of a journal; end a line that was cut short, so that the next is valid."""
    file.seek(0)
    entries, place, line = {}, 0, b"\n"
    for line in file:
        with contextlib.suppress(ValueError, TypeError):
            scanned = Scan(**json.loads(line))
            entries[scanned.name] = _Entry(place, scanned.size, scanned.mtime_ns)
        place += len(line)
    if not line.endswith(b"\n"):
        file.write(b"\n")
    return entries


def _append(file: BinaryIO, scanned: Scan) -> _Entry:
    place = file.seek(0, os.SEEK_END)
    file.write(json.dumps(dataclasses.asdict(scanned)).encode() + b"\n")
    file.flush()
    return _Entry(place, scanned.size, scanned.mtime_ns)


def _read(file: BinaryIO, entry: _Entry) -> Scan:
    file.seek(entry.place)
    return Scan(**json.loads(file.readline()))


def _unchanged(path: Path, entry: _Entry | None) -> bool:
    return entry is not None and differs(path, entry._asdict()) is None


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
        count, pairs = fact.pop("members"), fact.pop("pairs")
        members = [
            (names[row].decode(), int(columns["offsets"][row]), int(columns["sizes"][row]))
            for row in range(first, first + count)
        ]
        media = [int(m) - first if m >= 0 else -1 for m in columns["media"][pair : pair + pairs]]
        words = [texts[row].decode() for row in range(pair, pair + pairs)]
        both = list(zip(media, words, strict=True))
        _append(file, Scan(**fact, members=members, pairs=both))
        first, pair = first + count, pair + pairs


def _with_progress(
    folder: Path, names: list[str], total: int, say: Say, every: float = 2.0
) -> Iterator[str]:
    """Yield the names one by one, and report the progress."""
    paths = {name: folder / name for name in names}
    sizes = {n: storage.facts(path)["size"] for n, path in paths.items() if path.is_file()}
    before = total - len(names)
    if before:
        say(f"resuming: {before:,} of {quantity(total, 'shard')} already done")
    progress = Progress(str(folder), sum(sizes.values()), every=every, say=say, amount=size)
    for number, name in enumerate(names, before + 1):
        yield name
        progress.advance(sizes.get(name, 0), f"{number:,}/{total:,} shards")
