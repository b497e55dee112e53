"""Data sets prepared by TFDS as array_record, read without TensorFlow.

Reading needs no TensorFlow, and it is not installed; preparing a data set of TFDS may need it:

  tfds build NAME --file_format=array_record        (or download_and_prepare(file_format=…))

Of the features, Image, Text, numbers, Sequence, FeaturesDict and ragged lists of them are read
without TensorFlow; Video is not, since TFDS decodes it with TensorFlow: store clips as encoded
bytes.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.data.annotations import annotation_tables
from vadapter.data.example import Example, Source
from vadapter.data.sources.common import kind_and_key, texts_or_fault
from vadapter.errors import DataError

_TFDS_ERRORS = (ImportError, OSError, ValueError, LookupError, AssertionError, AttributeError,
                NotImplementedError)  # fmt: skip


class TfdsSource(Source):
    """A split of a prepared TFDS data set; nothing is downloaded or prepared.

    Images are decoded by the input pipeline, not by TFDS. A record whose texts are unusable is
    masked when it is read. Example ids are those of the feature `id`, or the position in the split.

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
        self,
        name: str,
        split: str,
        *,
        data_dir: str | Path | None = None,
        columns: Mapping[str, str] | None = None,
    ):
        import tensorflow_datasets as tfds  # slow to import: only where it is needed

        self._location = f"{name}, split {split!r}"
        self._renamed = dict(columns or {})
        folder = None if data_dir is None else str(data_dir)
        try:
            info: Any = tfds.builder(name, data_dir=folder).info
            features = list(info.features)
            self.kind, self._media = kind_and_key(features, self._renamed, self._location)
            chosen = info.splits[split]
            if not chosen.num_examples:
                raise DataError(f"{self._location}: 0 usable examples")
            files = [(Path(p).name, Path(p).stat().st_size) for p in chosen.filepaths]
            theirs = self._renamed.get(self._media, self._media)
            self._records: Any = tfds.data_source(
                name,
                split=split,
                data_dir=folder,
                download=False,
                decoders=_nested(theirs, tfds.decode.SkipDecoding()),
            )
        except _TFDS_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self._location}: not readable in {folder or 'the default folder'} ({reason}); "
                "prepare it there with file_format=array_record"
            ) from error
        described = [
            self.kind,
            info.full_name,
            split,
            len(self),
            files,
            sorted(self._renamed.items()),
        ]
        self._digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._read(index)
        media = record.get(self._media)
        (captions, qa), _ = texts_or_fault(self._location, record)
        usable = media if isinstance(media, bytes) else None
        return Example(str(record.get("id", index)), usable, captions, qa)

    def fault(self, index: int) -> str:
        """Return why an example's text is masked, "" if it is not."""
        return texts_or_fault(f"{self._location}, record {index}", self._read(index))[1]

    def fingerprint(self) -> str:
        """Return a digest of name, version, split, sizes of the files and `columns`."""
        return self._digest

    def _read(self, index: int) -> dict[str, Any]:
        """Return a record under the keys of `annotation_tables`, its texts decoded if UTF-8."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self._records[index]
        except Exception as error:  # array_record and protobuf raise many classes
            raise DataError(
                f"{self._location}: record {index} cannot be read ({error}); prepare it again"
            ) from error
        row = annotation_tables.rename(record, self._renamed)
        return {key: v if key == self._media else _plain(v) for key, v in row.items()}


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
