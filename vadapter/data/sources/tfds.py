"""Data sets that TFDS prepared as array_record, read without TensorFlow.

Reading needs no TensorFlow, and it is not installed; preparing a data set of TFDS may need it:

  tfds build NAME --file_format=array_record        (or download_and_prepare(file_format=…))

Of the features, Image, Text, numbers, Sequence, FeaturesDict and ragged lists of them are read
without TensorFlow; Video is not, since TFDS asks TensorFlow for it: store clips as encoded bytes.
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

    Images are decoded here, not by TFDS. A record whose texts are unusable is masked when it is
    read. Example ids are those of the feature `id`, or the place in the split.

    Args:
      name: of the data set, such as `coco_captions/2014` or `mine:1.0.0`.
      split: such as `train`, `train[:10%]`.
      data_dir: where it was prepared; TFDS' own default if None.
      columns: our key -> its feature, such as {"captions": "captions.text"}; see
        `vadapter.data.annotations.annotation_tables`.

    Raises:
      ConfigError: an unknown feature.
      DataError: not prepared there, not as array_record, or no such split.
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

        self._where = f"{name}, split {split!r}"
        self._renamed = dict(columns or {})
        folder = None if data_dir is None else str(data_dir)
        try:
            info = tfds.builder(name, data_dir=folder).info
            known = list(info.features)
            self.kind, self._media = kind_and_key(known, self._renamed, self._where)
            chosen = info.splits[split]
            if not chosen.num_examples:
                raise DataError(f"{self._where}: 0 usable examples")
            files = [(Path(p).name, Path(p).stat().st_size) for p in chosen.filepaths]
            theirs = self._renamed.get(self._media, self._media)
            self._records = tfds.data_source(
                name,
                split=split,
                data_dir=folder,
                download=False,
                decoders=_nested(theirs, tfds.decode.SkipDecoding()),
            )
        except _TFDS_ERRORS as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self._where}: not readable in {folder or 'the default folder'} ({reason}); "
                "prepare it there with file_format=array_record"
            ) from error
        said = [self.kind, info.full_name, split, len(self), files, sorted(self._renamed.items())]
        self._digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._read(index)
        media = record.get(self._media)
        (captions, qa), _ = texts_or_fault(self._where, record)
        usable = media if isinstance(media, bytes) else None
        return Example(str(record.get("id", index)), usable, captions, qa)

    def fault(self, index: int) -> str:
        """Why an example's text is masked, "" if it is not."""
        return texts_or_fault(f"{self._where}, record {index}", self._read(index))[1]

    def fingerprint(self) -> str:
        """Of name, version, split, sizes of the files and columns; not of what they say."""
        return self._digest

    def _read(self, index: int) -> dict[str, Any]:
        """A record with our keys; texts are decoded where they are UTF-8."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            record = self._records[index]
        except Exception as error:  # array_record and protobuf have many
            raise DataError(
                f"{self._where}: record {index} cannot be read ({error}); prepare it again"
            ) from error
        row = annotation_tables.rename(record, self._renamed)
        return {key: v if key == self._media else _plain(v) for key, v in row.items()}


def _nested(path: str, value: Any) -> dict[str, Any]:
    """{"a": {"b": value}} for `a.b`."""
    return functools.reduce(lambda inner, key: {key: inner}, reversed(path.split(".")), value)


def _plain(value: Any) -> Any:
    """Python values for numpy's: str for UTF-8 bytes, lists for arrays, objects for their lists."""
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
