"""`vadapter data index`: reads a folder of shards once, so that training need not.

What is known of each shard is appended to a journal as soon as it is read, so a shard that is done
is not read again however the command was stopped; a line torn by a kill is left out. When all are
done the index is written as one file, and replaces the one before at one stroke. Of an index in a
bucket the journal lies on this machine.
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

_EVERY = 2.0  # seconds between lines of progress
_CHUNK = 8 << 20

Say = Callable[[str], Any]


def build(folder: Path, out: Path | None = None, *, say: Say = print) -> str:
    """Indexes all shards below a folder.

    Args:
      folder: searched for .tar and .parquet files, at any depth.
      out: the index file, `index.vadapter` in the folder if None.
      say: is told the progress.

    Returns:
      What was found, in words.

    Raises:
      DataError: no shards, or shards that cannot be read: all of them at once, when the others are
        done; there is no index then.
      ConfigError: the folder is being indexed already, or `out` is a folder.
    """
    out = out or folder / INDEX
    if not storage.remote(out) and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write")
    names = _shards(folder)
    journal = out.with_name(f"{out.name}.part")
    journal = storage.cached(out, journal.name) if storage.remote(out) else journal
    with _only_one(journal) as file:
        if not journal.stat().st_size:
            _copy(out, file)
        known = _done(file)
        todo = [name for name in names if not _fits(folder / name, known.get(name))]
        problems = Problems()
        for name in _watched(folder, todo, len(names), say):
            with problems.gather():
                known[name] = _append(file, _scan_whole(folder, name))
        problems.settle()
        made, facts = assemble(_read(file, known[name]) for name in names)
        mmap_table.write(out, made, {"version": VERSION, "shards": facts})
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
    """Reads all shards of an index again and compares their bytes with it.

    Raises:
      DataError: no index, or shards that have changed, all of them at once.
    """
    out = out or folder / INDEX
    _, metadata = mmap_table.read(out)
    digests = {fact["name"]: fact["sha256"] for fact in metadata["shards"]}
    problems = Problems()
    for name in _watched(folder, list(digests), len(digests), say):
        with problems.gather():
            if _sha256(folder / name) != digests[name]:
                raise DataError(f"{folder / name}: not the bytes that were indexed; restore it")
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


def _scan_whole(folder: Path, name: str) -> Scan:
    made = scan(folder, name)
    made.sha256 = _sha256(folder / name)
    if (why := differs(folder / name, dataclasses.asdict(made))) is not None:
        raise DataError(f"{folder / name}: changed while it was read, {why}; run this again")
    return made


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
def _only_one(journal: Path) -> Iterator[BinaryIO]:
    """The journal, opened to read and append by this process alone."""
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
    """Where a shard's line stands in the journal, and the file it is about."""

    place: int
    size: int
    mtime_ns: int


def _done(file: BinaryIO) -> dict[str, _Entry]:
    """The shards of a journal; a torn line is ended, so that the next one starts afresh."""
    file.seek(0)
    known, place, line = {}, 0, b"\n"
    for line in file:
        with contextlib.suppress(ValueError, TypeError):
            made = Scan(**json.loads(line))
            known[made.name] = _Entry(place, made.size, made.mtime_ns)
        place += len(line)
    if not line.endswith(b"\n"):
        file.write(b"\n")
    return known


def _append(file: BinaryIO, made: Scan) -> _Entry:
    place = file.seek(0, os.SEEK_END)
    file.write(json.dumps(dataclasses.asdict(made)).encode() + b"\n")
    file.flush()
    return _Entry(place, made.size, made.mtime_ns)


def _read(file: BinaryIO, entry: _Entry) -> Scan:
    file.seek(entry.place)
    return Scan(**json.loads(file.readline()))


def _fits(path: Path, entry: _Entry | None) -> bool:
    return entry is not None and differs(path, entry._asdict()) is None


def _copy(out: Path, file: BinaryIO) -> None:
    """Starts a journal with what an earlier index knows, if it can be read."""
    try:
        made, metadata = mmap_table.read(out)
    except DataError:
        return
    if metadata.get("version") != VERSION:
        return
    names = mmap_table.Strings(made["names"], made["name_ends"])
    texts = mmap_table.Strings(made["texts"], made["text_ends"])
    first = pair = 0
    for fact in metadata["shards"]:
        count, pairs = fact.pop("members"), fact.pop("pairs")
        members = [
            (names[row].decode(), int(made["offsets"][row]), int(made["sizes"][row]))
            for row in range(first, first + count)
        ]
        media = [int(m) - first if m >= 0 else -1 for m in made["media"][pair : pair + pairs]]
        words = [texts[row].decode() for row in range(pair, pair + pairs)]
        both = list(zip(media, words, strict=True))
        _append(file, Scan(**fact, members=members, pairs=both))
        first, pair = first + count, pair + pairs


def _watched(folder: Path, names: list[str], total: int, say: Say) -> Iterator[str]:
    """Yield the names one by one, and report the progress."""
    paths = {name: folder / name for name in names}
    sizes = {n: storage.facts(path)["size"] for n, path in paths.items() if path.is_file()}
    before = total - len(names)
    if before:
        say(f"resuming: {before:,} of {quantity(total, 'shard')} already done")
    progress = Progress(str(folder), sum(sizes.values()), every=_EVERY, say=say, amount=size)
    for number, name in enumerate(names, before + 1):
        yield name
        progress.advance(sizes.get(name, 0), f"{number:,}/{total:,} shards")
