"""Parquet files, read by row group.

A row group is the unit of reading: a sample costs reading and decompressing the requested columns
of its group, and the last few groups are cached. Files for training should have small groups
(`row_group_size=100`, as image data sets on the Hugging Face Hub have).
"""

import functools
import threading
from pathlib import Path
from typing import Any

from vadapter.data.shards.tar import Shard
from vadapter.errors import DataError

MAX_GROUP_BYTES = 1 << 30
_CACHED_GROUPS = 4  # per process
_lock = threading.Lock()  # a ParquetFile is not thread-safe, nor may two threads load one group


def row_groups(path: Path) -> list[int]:
    """Return the number of rows of each row group. Raises DataError if one exceeds 1 GiB."""
    footer = _open(path).metadata
    groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
    if large := [g.total_byte_size for g in groups if g.total_byte_size > MAX_GROUP_BYTES]:
        raise DataError(
            f"{path}: a row group of {large[0]:,} bytes, which each of its samples would read; "
            "write the file again with row_group_size=100"
        )
    return [group.num_rows for group in groups]


def column_names(path: Path) -> list[str]:
    """Return the names of the columns."""
    return list(_open(path).schema_arrow.names)


def read_row(file: Shard, group: int, row: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the columns `names` of row `row` of a row group.

    Raises:
      DataError: the file is missing, has changed or is corrupt.
    """
    with _lock:
        table = _group(file, group, names)
    return {name: table.column(name)[row].as_py() for name in names}


@functools.lru_cache(maxsize=_CACHED_GROUPS)
def _group(file: Shard, group: int, names: tuple[str, ...]) -> Any:
    try:
        status = Path(file.path).stat()
        if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
            raise DataError(f"{file.path}: changed since it was indexed; restart to use it")
        return _file(file).read_row_group(group, columns=list(names), use_threads=False)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(
            f"{file.path}: row group {group} cannot be read ({error}); restore the file"
        ) from error


@functools.lru_cache(maxsize=64)
def _file(file: Shard) -> Any:
    return _open(Path(file.path))


def _open(path: Path) -> Any:
    """Open a file. Raises DataError if it is missing, corrupt or not a parquet file."""
    import pyarrow.parquet as parquet  # slow to import: only where it is needed

    if not path.is_file():
        raise DataError(f"{path}: no such file; check the path")
    try:
        return parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error})") from error
