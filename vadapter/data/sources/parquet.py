"""Parquet files with embedded images, the usual format of the Hugging Face Hub."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.data.annotations import annotation_tables
from vadapter.data.example import Example, Source
from vadapter.data.shards import parquet_rows
from vadapter.data.shards.shard_set import find, open_shards
from vadapter.data.sources.common import kind_and_key, texts_or_fault
from vadapter.errors import DataError
from vadapter.io import storage


class ParquetImages(Source):
    """Images or clips that are embedded in parquet files, with their texts in other columns.

    Media are structs {bytes, path}, of which the bytes are used, or plain bytes. A row whose texts
    or bytes are unusable is masked when it is read. Example ids are FILE#ROW, or those of the
    column `id`.

    Args:
      folder: folder of the files.
      split: selects the files `<split>-NNN-of-NNN.parquet`.
      shards: instead, a pattern of files, see `CaptionTars`.
      columns: key of `annotation_tables` -> column, such as {"caption": "text"}.
      index: the index file, if it is not `index.vadapter` in the folder.

    Raises:
      ConfigError: neither split nor shards, or an unknown column.
      DataError: no files; a file is missing, corrupt or differs from its index; no rows.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str | None = None,
        *,
        shards: str | None = None,
        columns: Mapping[str, str] | None = None,
        index: str | Path | None = None,
    ):
        folder = storage.local(folder, "folder")
        names = find(folder, ".parquet", split, shards)
        self._shards = open_shards(folder, names, index)
        self._groups = self._shards.members()
        sizes = self._shards.columns["sizes"][self._groups]
        self._ends = sizes.cumsum()
        if not len(self):
            raise DataError(f"{folder}: 0 usable examples in split {split!r}; check its files")
        all_names = parquet_rows.column_names(folder / names[0])
        self._renamed = dict(columns or {})
        self.kind, self._media = kind_and_key(all_names, self._renamed, str(folder / names[0]))
        theirs = {path.split(".")[0] for path in self._renamed.values()}
        self._names = tuple(
            name for name in all_names if name in theirs | set(annotation_tables.KEYS)
        )
        files = [(f["name"], f["size"], f["digest"]) for f in self._shards.facts]
        described = json.dumps([self.kind, files, sorted(self._renamed.items()), self._names])
        self._digest = hashlib.sha256(described.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Example:
        name, row, data = self._read(index, self._names)
        media = data.get(self._media)
        media = media.get("bytes") if isinstance(media, Mapping) else media
        (captions, qa), _ = texts_or_fault(name, data)
        usable = media if isinstance(media, bytes) else None
        return Example(str(data.get("id", f"{name}#{row}")), usable, captions, qa)

    def text_only(self, index: int) -> Example:
        """Return the example without its media, whose column is not read."""
        name, row, data = self._read(index, self._texts())
        (captions, qa), _ = texts_or_fault(name, data)
        return Example(str(data.get("id", f"{name}#{row}")), None, captions, qa)

    def fault(self, index: int) -> str:
        """Return why an example's text is masked, "" if it is not."""
        name, row, data = self._read(index, self._texts())
        return texts_or_fault(f"{name}, row {row}", data)[1]

    def fingerprint(self) -> str:
        """Return a digest of the files' names, sizes and row counts, and of `columns`."""
        return self._digest

    def _texts(self) -> tuple[str, ...]:
        theirs = self._renamed.get(self._media, self._media).split(".")[0]
        return tuple(name for name in self._names if name != theirs)

    def _read(self, index: int, names: tuple[str, ...]) -> tuple[str, int, dict[str, Any]]:
        """Return (file, number of the row in it, the row under the keys of `annotation_tables`)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(self._ends.searchsorted(index, "right"))
        member = int(self._groups[place])
        shard, first, count = self._shards.span(member)
        row = index - (int(self._ends[place]) - count)
        group = int(self._shards.name(member).rpartition("/")[2])
        file = self._shards.shards[shard]
        data = parquet_rows.read_row(file, group, row, names)
        data = {
            key: v
            for key, v in annotation_tables.rename(data, self._renamed).items()
            if v is not None
        }
        return self._shards.facts[shard]["name"], first + row, data
