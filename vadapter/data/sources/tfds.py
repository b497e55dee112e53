"""Data sets prepared by TFDS as array_record, read without TensorFlow.

Reading needs no TensorFlow, and it is not installed; preparing a data set of TFDS may need it:

  tfds build NAME --file_format=array_record        (or download_and_prepare(file_format=…))

Of the features, Image, Text, numbers, Sequence, FeaturesDict and ragged lists of them are read
without TensorFlow; Video is not, since TFDS decodes it with TensorFlow: store clips as encoded
bytes.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.data import annotation_tables
from vadapter.data.sources.common import RowSource, digest_json
from vadapter.errors import DataError

_TFDS_ERRORS = (ImportError, OSError, ValueError, LookupError, AssertionError, AttributeError,
                NotImplementedError)  # fmt: skip


class TfdsSource(RowSource):
    """A split of a prepared TFDS data set; nothing is downloaded or prepared.

    Images are decoded by the input pipeline, not by TFDS. Example ids are those of the feature
    `id`, or the position in the split.

    Args:
      name: name of the data set, such as `coco_captions/2014` or `mine:1.0.0`.
      split: such as `train`, `train[:10%]`.
      data_dir: folder that it was prepared in; the default of TFDS if None.
      columns: key of `annotation_tables` -> feature, such as {"captions": "captions.text"}.

    Raises:
      ConfigError: an unknown feature.
      DataError: not prepared in `data_dir`, not as array_record, or no such split.
    """

    def __init__(
        self, name: str, split: str, *, data_dir: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ):  # fmt: skip
        import tensorflow_datasets as tfds  # slow to import: only where it is needed

        self._location = f"{name}, split {split!r}"
        folder = None if data_dir is None else str(data_dir)
        try:
            info: Any = tfds.builder(name, data_dir=folder).info
            super().__init__(list(info.features), columns, self._location)
            part = info.splits[split]
            if not part.num_examples:
                raise DataError(f"{self._location}: 0 usable examples")
            files = [(Path(p).name, Path(p).stat().st_size) for p in part.filepaths]
            media = self._columns.get(self._media, self._media)
            decoders = _nested(media, tfds.decode.SkipDecoding())
            self._records: Any = tfds.data_source(
                name, split=split, data_dir=folder, download=False, decoders=decoders
            )
        except _TFDS_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self._location}: not readable in {folder or 'the default folder'} ({reason}); "
                "prepare it there with file_format=array_record"
            ) from error
        described = [self.kind, info.full_name, split, len(self), files]
        self._digest = digest_json([*described, sorted(self._columns.items())])

    def __len__(self) -> int:
        return len(self._records)

    def _read(self, index: int, *, media: bool) -> tuple[int, str, dict[str, Any]]:
        del media  # a record is read as a whole
        try:
            record = self._records[index]
        except Exception as error:  # array_record and protobuf raise many classes
            raise DataError(
                f"{self._location}: record {index} cannot be read ({error}); prepare it again"
            ) from error
        row = annotation_tables.rename(record, self._columns)
        row = {key: value if key == self._media else _plain(value) for key, value in row.items()}
        return index, f"{self._location}, record {index}", row


def _nested(path: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the path `a.b`."""
    return functools.reduce(lambda inner, key: {key: inner}, reversed(path.split(".")), value)


def _plain(value: Any) -> Any:
    """Return plain Python values for numpy's: str for UTF-8 bytes, lists for arrays."""
    if isinstance(value, Mapping):
        return {key: _plain(v) for key, v in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value
