"""Parquet files with embedded images, the usual format of the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.data import annotation_tables
from vadapter.data.shards import parquet_rows
from vadapter.data.shards.shard_set import find, open_shards
from vadapter.data.sources.common import RowSource, digest_json
from vadapter.errors import DataError
from vadapter.io import storage


class ParquetImages(RowSource):
    """Images or clips that are embedded in parquet files, with their texts in other columns.

    Media are structs {bytes, path}, of which the bytes are used, or plain bytes. Example ids are
    FILE#ROW, or those of the column `id`.

    Args:
      split: selects the files `<split>-NNN-of-NNN.parquet`.
      shards: instead, a pattern of files, see `CaptionTars`.
      columns: key of `annotation_tables` -> column, such as {"caption": "text"}.
      index: the index file, if it is not `index.vadapter` in the folder.

    Raises:
      ConfigError: neither split nor shards, or an unknown column.
      DataError: no files; a file is missing, corrupt or differs from its index; no rows.
    """

    def __init__(
        self, folder: str | Path, split: str | None = None, *, shards: str | None = None,
        columns: Mapping[str, str] | None = None, index: str | Path | None = None,
    ):  # fmt: skip
        folder = storage.local(folder, "folder")
        files = find(folder, ".parquet", split, shards)
        self._shards = open_shards(folder, files, index)
        self._groups = self._shards.members()
        self._ends = self._shards.columns["sizes"][self._groups].cumsum()
        if not len(self):
            raise DataError(f"{folder}: 0 usable examples in split {split!r}; check its files")
        names = parquet_rows.column_names(folder / files[0])
        super().__init__(names, columns, str(folder / files[0]))
        used = {path.split(".")[0] for path in self._columns.values()} | {*annotation_tables.KEYS}
        self._names = tuple(name for name in names if name in used)
        media = self._columns.get(self._media, self._media).split(".")[0]
        self._text_names = tuple(name for name in self._names if name != media)
        facts = [(f["name"], f["size"], f["digest"]) for f in self._shards.facts]
        self._digest = digest_json([self.kind, facts, sorted(self._columns.items()), self._names])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _read(self, index: int, *, media: bool) -> tuple[str, str, dict[str, Any]]:
        place = int(self._ends.searchsorted(index, "right"))
        member = int(self._groups[place])
        shard, first, count = self._shards.span(member)
        row = index - (int(self._ends[place]) - count)
        group = int(self._shards.name(member).rpartition("/")[2])
        names = self._names if media else self._text_names
        data = parquet_rows.read_row(self._shards.shards[shard], group, row, names)
        data = annotation_tables.rename(data, self._columns)
        name, number = self._shards.facts[shard]["name"], first + row
        present = {key: value for key, value in data.items() if value is not None}
        return f"{name}#{number}", f"{name}, row {number}", present
