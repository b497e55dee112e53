"""Images or clips in tar shards, with their texts beside the shards or in them."""

import dataclasses
import json
import logging
from pathlib import Path

import numpy as np

from vadapter.data import annotation_tables
from vadapter.data.example import Example, Question, Source
from vadapter.data.shards.shard_set import ShardSet, find, open_shards
from vadapter.data.sources.common import digest_json, digest_of, kind_of
from vadapter.errors import DataError
from vadapter.io import storage

_TABLES = ("captions.jsonl", "qa.jsonl")
_FEW_BAD = 10  # accepted number of examples without usable text, whatever their share

log = logging.getLogger(__name__)


class CaptionTars(Source):
    """Images or clips in tar shards, with captions, questions or both.

    The texts come from captions.jsonl and qa.jsonl beside the shards or, without them, from the
    shards, as webdataset and img2dataset write them, see `shard_scan`. All questions about an image
    form one example.

    Shards are read in place. Texts in the shards take a few bytes of memory per example, or with an
    index (`vadapter data index`) none, since they are mapped; texts in tables take about 1 kB.

    Args:
      folder: folder of the shards; may be `gs://…`.
      split: selects the shards `<split>-NNN.tar` and the rows of the tables.
      shards: instead, a pattern of shards: a glob such as `*.tar`, or a range such as
        `{00000..00099}.tar`.
      index: the index file, if it is not `index.vadapter` in the folder.
      max_bad: accepted share of unusable texts in the shards, which are masked.

    Raises:
      ConfigError: neither split nor shards.
      DataError: no shards; a shard is missing, truncated or differs from its index; no rows, a row
        whose image is missing, an unusable text in a table, too many of them in shards.
    """

    def __init__(
        self, folder: str | Path, split: str | None = None, *, shards: str | None = None,
        index: str | Path | None = None, max_bad: float = 0.001,
    ):  # fmt: skip
        folder = storage.as_path(folder)
        self._shards = open_shards(folder, find(folder, ".tar", split, shards), index)
        self._shards.require_unique()
        paths = [folder / name for name in _TABLES if (folder / name).is_file()]
        if paths:
            rows = [row for path in paths for row in annotation_tables.read_rows(path, split)]
            self._rows: _TableRows | _PairRows = _TableRows(self._shards, rows, folder)
        else:
            self._rows = _PairRows(self._shards, folder, max_bad)
        self.kind, self._digest = self._rows.kind, self._rows.digest
        if not len(self._rows):
            raise DataError(f"{folder}: 0 usable examples in split {split!r}; check its rows")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        example, member, _ = self._rows[index]
        media = self._shards.read(member) if member >= 0 else None
        return dataclasses.replace(example, media=media)

    def text_only(self, index: int) -> Example:
        """Return the example without its media."""
        return self._rows[index][0]

    def fault(self, index: int) -> str:
        """Return why an example's text is masked, "" if it is not."""
        return self._rows[index][2]


_Row = tuple[Example, int, str]  # without media; the member with its media, or -1; its fault


class _TableRows:
    """Examples whose texts come from tables beside the shards, where unusable ones are refused."""

    def __init__(self, shards: ShardSet, rows: list[annotation_tables.Row], folder: Path):
        names = [name for _, name, _ in rows]
        member_of = dict(zip(names, shards.find(names), strict=True))
        for row in rows:
            _check_member(shards, row, member_of[row[1]])
        texts = annotation_tables.gather(rows)
        self._examples = [
            Example(name, None, captions, qa) for name, (captions, qa) in texts.items()
        ]
        self._members = np.array([member_of[name] for name in texts], np.int64)
        self.kind = kind_of(texts, str(folder))
        # Of names, positions, sizes and texts, but neither of pixels nor of the folder.
        spans = ((name, shards.span(member_of[name])) for name in texts)
        self.digest = digest_of(self.kind, ((name, span, *texts[name]) for name, span in spans))

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> _Row:
        return self._examples[index], int(self._members[index]), ""


def _check_member(shards: ShardSet, table_row: annotation_tables.Row, member: int) -> None:
    location, name, row = table_row
    if member < 0:
        reasons = (f["skipped"][name] for f in shards.facts if name in f["skipped"])
        reason = next(reasons, f"no member of that name in {len(shards.facts)} shards")
        raise DataError(f"{location}: {name!r} cannot be read: {reason}")
    shard = Path(shards.shards[shards.span(member)[0]].path).name
    if row.get("shard", shard) != shard:
        raise DataError(f"{location}: {name!r} is in {shard}, not in {row['shard']!r}")


class _PairRows:
    """Examples whose texts are stored in the shards."""

    def __init__(self, shards: ShardSet, folder: Path, max_bad: float):
        if fault := next((f["fault"] for f in shards.facts if f["fault"]), ""):
            raise DataError(fault)
        self._shards, self._pairs = shards, shards.pairs()
        _check_faults(shards, len(self._pairs), str(folder), max_bad)
        self.kind = kind_of((f"x{s}" for f in shards.facts for s in f["suffixes"]), str(folder))
        self.digest = digest_json([self.kind, *(f["digest"] for f in shards.facts)])

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> _Row:
        pair = int(self._pairs[index])
        key, captions, qa, fault = json.loads(self._shards.texts[pair])
        questions = tuple(Question(q, tuple(answers), kind, id_) for q, answers, kind, id_ in qa)
        member = int(self._shards.columns["media"][pair])
        return Example(key, None, tuple(captions), questions), member, fault


def _check_faults(shards: ShardSet, total: int, location: str, max_bad: float) -> None:
    """Log pairs without usable text, which are masked; refuse more than ten and than `max_bad`."""
    bad = sum(f["bad"] for f in shards.facts)
    first = next((f["first_bad"] for f in shards.facts if f["bad"]), "")
    if bad and bad == total:
        raise DataError(f"{location}: 0 usable examples of {total}; the first: {first}")
    if bad > max(max_bad * total, _FEW_BAD):
        raise DataError(
            f"{location}: {bad} of {total} examples have no usable text, more than {max_bad:.1%}; "
            f"the first: {first}. Fix them, or accept more with max_bad={bad / total:.2g}"
        )
    if bad:
        log.warning("%s: %d of %d without usable text; the first: %s", location, bad, total, first)
