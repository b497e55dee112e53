"""Images or clips as single files beside a table."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vadapter.data import tables
from vadapter.data.example import Example
from vadapter.data.sources.common import digest_of, kind_of
from vadapter.errors import DataError


class ImageFolder:
    """Images or clips as single files, with captions or questions in one table.

    Args:
      table: JSON lines, CSV, TSV, COCO captions or Karpathy's JSON, see `vadapter.data.tables`.
      folder: what the names in it are relative to; the folder of `table` if None.
      split: keep the rows of this split, or of several; all of them if None.
      columns: our key -> the table's, where it calls them otherwise.

    Raises:
      ConfigError: `columns` has a key that is not ours.
      DataError: no rows, a file that is missing or lies outside the folder, an unusable text.
    """

    def __init__(
        self,
        table: str | Path,
        folder: str | Path | None = None,
        *,
        split: tables.Split = None,
        columns: Mapping[str, str] | None = None,
    ):
        table = Path(table)
        folder = table.parent if folder is None else Path(folder)
        repeats = table.suffix.lower() in tables.ONE_CAPTION_A_ROW
        rows = _check_files(tables.read_rows(table, split, columns), folder)
        texts = tables.gather(rows, repeats=repeats)
        if not texts:
            raise DataError(f"{table}: 0 usable examples in split {split!r}; check its rows")
        self.kind = kind_of(texts, str(table))
        self._examples = [Example(name, folder / name, *both) for name, both in texts.items()]
        sizes = [(folder / name).stat().st_size for name in texts]
        self._digest = digest_of(self.kind, self._examples, sizes)

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        return self._examples[index]

    def fingerprint(self) -> str:
        """Of names, sizes and texts; not of the pixels, nor of where the folder is."""
        return self._digest


def _check_files(
    rows: Iterable[tables.Row], folder: Path
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for where, row in rows:
        name = tables.media_name(where, row)
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DataError(f"{where}: {name!r} leaves the folder; use names inside {folder}")
        if not (folder / name).is_file():
            raise DataError(f"{where}: no file {folder / name}; add it or remove the row")
        yield where, name, row
