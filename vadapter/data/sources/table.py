"""Images or clips as single files beside a table."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from vadapter.data import annotation_tables
from vadapter.data.example import Example, Source
from vadapter.data.sources.common import digest_of, kind_of
from vadapter.errors import DataError
from vadapter.io import storage


class ImageFolder(Source):
    """Images or clips as single files, with captions or questions in one table.

    Args:
      table: JSON lines, CSV, TSV, COCO captions or Karpathy's JSON, see `annotation_tables`.
      folder: folder of the media; that of `table` if None. Either may be `gs://…`; a folder there
        is listed once.
      split: name of a split, or several; all rows if None.
      columns: key of `annotation_tables` -> column, where the table uses other names.

    Raises:
      ConfigError: `columns` has an unknown key.
      DataError: no rows, a file that is missing or outside the folder, an unusable text.
    """

    def __init__(
        self, table: str | Path, folder: str | Path | None = None, *,
        split: annotation_tables.Split = None, columns: Mapping[str, str] | None = None,
    ):  # fmt: skip
        table = storage.as_path(table)
        folder = table.parent if folder is None else storage.as_path(folder)
        listed = storage.files(folder) if storage.remote(folder) else None
        repeats = table.suffix.lower() in annotation_tables.ONE_CAPTION_A_ROW
        rows = _check_files(annotation_tables.read_rows(table, split, columns), folder, listed)
        texts = annotation_tables.gather(rows, repeats=repeats)
        if not texts:
            raise DataError(f"{table}: 0 usable examples in split {split!r}; check its rows")
        self.kind = kind_of(texts, str(table))
        self._examples = [
            Example(name, folder / name, captions, qa) for name, (captions, qa) in texts.items()
        ]
        facts = [listed[name] if listed else storage.facts(folder / name) for name in texts]
        self._generations = [fact["mtime_ns"] for fact in facts] if listed else []
        sized = zip(texts, (fact["size"] for fact in facts), strict=True)
        # Neither of pixels nor of the folder.
        self._digest = digest_of(self.kind, ((name, size, *texts[name]) for name, size in sized))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> Example:
        example = self._examples[index]
        if not self._generations:
            return example
        try:
            data = storage.read_object(str(example.media), self._generations[index])
        except OSError as error:
            raise DataError(
                f"{example.media}: cannot be read ({error}); if it has changed, restart"
            ) from error
        return dataclasses.replace(example, media=data)

    def text_only(self, index: int) -> Example:
        """Return the example without its media where that has to be fetched."""
        example = self._examples[index]
        return dataclasses.replace(example, media=None) if self._generations else example


def _check_files(
    rows: Iterable[annotation_tables.Row], folder: Path, listed: Collection[str] | None
) -> Iterator[annotation_tables.Row]:
    for location, name, row in rows:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\0" in name:
            raise DataError(f"{location}: {name!r} leaves the folder; use names inside {folder}")
        if name not in listed if listed is not None else not (folder / name).is_file():
            raise DataError(f"{location}: no file {folder / name}; add it or remove the row")
        yield location, name, row
