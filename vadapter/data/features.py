"""The files of a feature cache, and the source that reads examples from them.

A cache is a folder of array_record files (shards) NNNNN.array_record. Each has the visual tokens of
consecutive examples, one record for each example, and a last record that identifies the cache and
the shard. An incomplete shard has another name. array_record stores a hash of every record and
verifies it when the record is read. A record is

  int8       the scale of every token, f32[M,F,N], then i8[M,F,N,D]: token = scale · i8
  bfloat16   bf16[M,F,N,D]

with NaN for an image that could not be decoded (`Features.readable` is then False).

Legend: M 1, or 2 with the mirror image; F frames, N visual tokens a frame, D encoder width.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import grain
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from vadapter.data.config import Stored
from vadapter.data.example import Example, Features, Source
from vadapter.errors import ConfigError, DataError

# Part of a cache's key; increase it when the layout of a folder changes.
FORMAT = 1
SHARD_BYTES = 64 << 20  # at least, so that a kill costs little work
MAX_SHARDS = 256  # at most, since every process keeps all of them open
ROUND = 256  # examples in a shard, a multiple of it: batches end where shards do
SLACK_BYTES = 256 << 10  # a shard's headers and padding, at most

_WIDTH = {"bfloat16": (2, 0), "int8": (1, 4)}  # bytes of an element and of a token's scale
_WRITE = "group_size:1,uncompressed"  # each record can be read alone
_READ = {"max_parallelism": "0"}


@dataclasses.dataclass(frozen=True)
class Cache:
    """The folder that stores the tokens of a data set, complete or not."""

    folder: Path
    key: str  # digest (hex) of everything that the tokens depend on
    count: int  # of examples
    shape: tuple[int, int, int, int]  # (M, F, N, D) of an example's tokens
    stored: Stored  # dtype

    @property
    def record_bytes(self) -> int:
        """The size of one record."""
        width, scale = _WIDTH[self.stored]
        return math.prod(self.shape[:3]) * (self.shape[3] * width + scale)

    @functools.cached_property
    def rows(self) -> int:
        """The number of examples in a shard; the last shard may have fewer."""
        least = max(SHARD_BYTES / self.record_bytes, self.count / MAX_SHARDS)
        return math.ceil(least / ROUND) * ROUND

    @property
    def shards(self) -> range:
        """The numbers of all shards."""
        return range(-(-self.count // self.rows))

    def span(self, shard: int) -> range:
        """Return the indices of a shard's examples."""
        return range(shard * self.rows, min((shard + 1) * self.rows, self.count))

    def path(self, shard: int) -> Path:
        """Return the file of a complete shard."""
        return self.folder / f"{shard:05d}.array_record"

    def missing(self) -> list[int]:
        """Return the shards that do not exist yet."""
        return [shard for shard in self.shards if not self.path(shard).exists()]

    def write(self, shard: int, records: Iterator[bytes]) -> None:
        """Write a shard with records from an iterator; its file appears when complete.

        Raises:
          ConfigError: the disk is full or cannot be written.
        """
        path = self.path(shard)
        part = path.with_suffix(".part")  # overwritten if left by a killed process
        with _disk(part):
            writer = ArrayRecordWriter(str(part), _WRITE)
        try:
            for _ in self.span(shard):
                record = next(records)
                with _disk(part):
                    writer.write(record)
            with _disk(part):
                writer.write(self._seal(shard))
                writer.close()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                writer.close()
            part.unlink(missing_ok=True)
            raise
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)

    def unpack(self, record: bytes) -> np.ndarray:
        """Return the tokens of a record, bf16[M,F,N,D]."""
        if self.stored == "bfloat16":
            return np.frombuffer(record, ml_dtypes.bfloat16).reshape(self.shape)
        tokens = math.prod(self.shape[:3])
        scales = np.frombuffer(record, np.float32, tokens).reshape(*self.shape[:3], 1)
        values = np.frombuffer(record, np.int8, offset=scales.nbytes).reshape(self.shape)
        return (values * scales).astype(ml_dtypes.bfloat16)

    def corrupt(self, shard: int, why: str) -> DataError:
        """Return the error that names a shard and says what to do."""
        return DataError(
            f"{self.path(shard)}: {why}. Delete it and rerun the command: only this shard is "
            "computed again."
        )

    def _seal(self, shard: int) -> bytes:
        return json.dumps({"cache": self.key, "shard": shard, "of": len(self.shards)}).encode()

    def verify(self, shard: int) -> None:
        """Raise DataError if a shard is missing, truncated, corrupt or of another cache."""
        path, expected = self.path(shard), len(self.span(shard)) + 1
        if not path.exists():
            raise DataError(
                f"{path} is missing: the cached tokens are incomplete. Rerun the command to "
                "compute the rest."
            )
        try:
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
            count = reader.num_records()
            seal = reader.read([expected - 1])[0] if count == expected else b""
            reader.close()
        except RuntimeError as error:
            raise self.corrupt(shard, f"truncated or corrupt ({_short(error)})") from error
        if count != expected:
            raise self.corrupt(shard, f"truncated or corrupt ({count} records of {expected})")
        if seal != self._seal(shard):
            raise self.corrupt(shard, f"a shard of another cache, {seal[:100].decode()}")


@dataclasses.dataclass
class _Part:
    """The records of a shard that are examples, under the names that grain reads."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class FeatureSource(Source):
    """A source whose media are `Features` instead of images, and the cache of their tokens."""

    _digest = ""  # has its own `fingerprint`

    def __init__(self, source: Source, cache: Cache):
        """Open the cache; raise DataError unless all of its shards are intact."""
        self.source, self.cache, self.kind = source, cache, source.kind
        for shard in cache.shards:
            cache.verify(shard)
        sizes = [(str(cache.path(shard)), len(cache.span(shard))) for shard in cache.shards]
        parts = [_Part(path, 0, size, size + 1) for path, size in sizes]
        self._records = grain.sources.ArrayRecordDataSource(parts, _READ)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        """Return an example; raise DataError if its record is corrupt or its file was deleted.

        A cache of one record has the tokens of all examples, whose images are blank.
        """
        record = index if self.cache.count > 1 else 0
        try:
            tokens = self.cache.unpack(self._records[record])
        except RuntimeError as error:
            shard, row = divmod(record, self.cache.rows)
            raise self.cache.corrupt(shard, f"record {row}: {_short(error)}") from error
        features = Features(tokens, readable=not np.isnan(tokens.flat[0]))
        return dataclasses.replace(self.source.text_only(index), media=features)

    def text_only(self, index: int) -> Example:
        """Return the example without its tokens."""
        return self.source.text_only(index)

    def fault(self, index: int) -> str:
        """Return why the texts of an example cannot be used; "" if they can."""
        return self.source.fault(index)

    def texts(self) -> Iterator[str]:
        """Yield all texts of the source."""
        return self.source.texts()

    def fingerprint(self) -> str:
        """Return the fingerprint of the images, which with the encoder determine the tokens."""
        return self.source.fingerprint()


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConfigError(
            f"{path}: {_short(error)}. Free disk space or fix the permissions, then rerun the "
            "command: complete shards are kept."
        ) from error


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
