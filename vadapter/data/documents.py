"""Documents for language modeling, laid out as in the multimodal stages.

The language model is frozen when the adapter is trained, so it must already make use of
what precedes a caption. One trained on single captions does not: given a sibling caption as text,
its loss rose. In these documents, text about the image therefore takes the place of the visual
tokens, between the same `before` and `after`:

    siblings  "Describe the following:" " <1-3 sibling captions>" " :" " <caption>"
    keywords  "Describe the following:" " <their content words, shuffled>" " :" " <caption>"
    plain     "Describe the following:" " :" " <caption>"
    text      a chunk of general text

The pieces are tokenized separately and concatenated, as prompt, visual tokens and text are later;
each has its own leading space (see prompts.py).
"""

import gzip
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.data.example import Example, Source
from vadapter.data.prompts import CAPTION, text_piece
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage

Paths = Sequence[str | os.PathLike[str]]

MIXTURE = {"siblings": 0.35, "keywords": 0.35, "plain": 0.2, "text": 0.1}
_MAX_SIBLINGS = 3

_FUNCTION_WORDS = """
a an the this that these those some and or but of in on at by to into onto from with without for as
is are was were be been being am has have had do does did it its he she they them his her their him
there here who which what while then than very up down out over under near next one
"""
_STOP_WORDS = frozenset(_FUNCTION_WORDS.split())


class DocumentSource(Source):
    """Documents made from captions and general text, each a function of (seed, index) alone.

    The target of document i is caption i modulo their number: `variants` documents with different
    contexts end in the same caption. A caption without siblings gets its own words as keywords, and
    becomes a plain document if siblings are drawn.

    Args:
      groups: .jsonl or .jsonl.gz; each line is {"captions": [...]} of one photo or clip.
      captions: .txt or .txt.gz; each line is an independent caption.
      texts: general text: .jsonl(.gz) with {"text": ...} or a string in each line, or .txt(.gz)
        with one text. Long texts are cut between words.
      split: keep only the lines of `groups` with this "split"; None keeps all.
      mixture: weight of each sort of document, normalized over those the files allow.
      seed: changes all documents.
      variants: documents for each caption (or chunk, if there are no captions).
      chunk_chars: longest chunk of general text, in characters.

    Raises:
      ConfigError: an unknown sort of document, or weights that are negative or all 0.
      DataError: a missing or malformed file, or no text in all of them.
    """

    kind = "text"

    def __init__(
        self, groups: Paths = (), captions: Paths = (), texts: Paths = (), *,
        split: str | None = None, mixture: Mapping[str, float] = MIXTURE, seed: int = 0,
        variants: int = 8, chunk_chars: int = 600,
    ):  # fmt: skip
        if unknown := sorted(set(mixture) - set(MIXTURE)):
            raise ConfigError(f"mixture has unknown keys {unknown}; known: {sorted(MIXTURE)}")
        alone = ([line] for path in captions for line in _lines(path) if line.strip())
        self._groups = [*_groups(groups, split), *alone]
        self._chunks = [c for p in texts for t in _texts(p) for c in _cut(t, chunk_chars)]
        # i32[captions, 2]: the group of each caption and its index there. An array, since workers
        # would copy a list of tuples.
        self._flat = np.array(
            [(g, i) for g, group in enumerate(self._groups) for i in range(len(group))], np.int32
        ).reshape(-1, 2)
        if not len(self._flat) and not self._chunks:
            files = ", ".join(map(str, [*groups, *captions, *texts])) or "no files"
            raise DataError(f"0 usable examples: no caption and no text in {files}")
        have = {sort: self._chunks if sort == "text" else len(self._flat) for sort in MIXTURE}
        self._sorts = [sort for sort in MIXTURE if have[sort]]
        weights = np.array([mixture.get(sort, 0.0) for sort in self._sorts], np.float64)
        if (weights < 0).any() or not weights.sum() > 0:
            raise ConfigError(
                f"mixture={dict(mixture)} leaves nothing to draw: the files allow {self._sorts}; "
                "their weights must be 0 or more, and not all 0"
            )
        self._edges = np.cumsum(weights / weights.sum())
        self._seed, self._variants = seed, variants

    def __len__(self) -> int:
        return self._variants * (len(self._flat) or len(self._chunks))

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng((self._seed, index))
        interval = int(np.searchsorted(self._edges, rng.random(), side="right"))
        sort = self._sorts[min(interval, len(self._sorts) - 1)]
        if sort == "text":
            chunk = self._chunks[int(rng.integers(len(self._chunks)))]
            return Example(id=f"text-{index}", pieces=(chunk,))
        group, i = map(int, self._flat[index % len(self._flat)])
        caption = self._groups[group][i]
        siblings = [*self._groups[group][:i], *self._groups[group][i + 1 :]]
        count = int(rng.integers(1, min(_MAX_SIBLINGS, len(siblings)) + 1)) if siblings else 0
        drawn = [siblings[int(i)] for i in rng.permutation(len(siblings))[:count]] if count else []
        context = ""
        if sort == "keywords":
            words = list(dict.fromkeys(w for c in drawn or [caption] for w in content_words(c)))
            context = " ".join(words[int(i)] for i in rng.permutation(len(words)))
        elif sort == "siblings":
            context = " ".join(drawn)
        middle = (text_piece(context),) if context else ()
        pieces = (CAPTION.before, *middle, CAPTION.after, text_piece(caption))
        return Example(id=f"{sort}-{index}", pieces=pieces)

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of the texts and of the parameters."""
        parameters = [self._seed, self._variants, self._sorts, self._edges.tolist()]
        digest = hashlib.sha256(json.dumps(parameters).encode())
        for part in (*self._groups, self._chunks):
            digest.update(json.dumps(part).encode() + b"\n")
        return digest.hexdigest()

    def texts(self) -> Iterator[str]:
        """Yield the prompt, then every caption and every chunk once."""
        yield CAPTION.before
        yield CAPTION.after
        for group in self._groups:
            yield from map(text_piece, group)
        yield from self._chunks


def content_words(caption: str) -> list[str]:
    """Return the words of a caption except function words, lower-cased, repeats included."""
    words = re.findall(r"[^\W_]+(?:['-][^\W_]+)*", caption.lower())
    return [word for word in words if word not in _STOP_WORDS]


def _groups(paths: Paths, split: str | None) -> Iterator[list[str]]:
    for location, record in itertools.chain.from_iterable(map(_records, paths)):
        if split is not None and isinstance(record, dict) and record.get("split") != split:
            continue
        captions = record.get("captions") if isinstance(record, dict) else None
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise DataError(
                f'{location}: expected {{"captions": ["...", ...]}}; fix or remove the line'
            )
        if kept := [c for c in captions if c.strip()]:
            yield kept


def _texts(path: str | os.PathLike[str]) -> Iterator[str]:
    if ".jsonl" not in Path(path).name:
        yield "\n".join(_lines(path))
        return
    for location, record in _records(path):
        text = record.get("text") if isinstance(record, dict) else record
        if not isinstance(text, str):
            raise DataError(
                f'{location}: expected {{"text": "..."}} or "..."; fix or remove the line'
            )
        yield text


def _cut(text: str, limit: int) -> Iterator[str]:
    """Yield chunks of at most `limit` characters, cut between words (except in longer words)."""
    start = 0
    text = text.strip()
    while start < len(text):
        end = start + limit
        if end < len(text):
            spaces = [text.rfind(c, start + 1, end + 1) for c in " \n"]
            end = max(spaces) if max(spaces) > 0 else end
        if chunk := text[start:end].strip():
            yield chunk
        start = end


def _records(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (location, value) of each line of a JSON lines file."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            location = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{location}: not JSON ({error})") from None
            yield location, record


def _lines(path: str | os.PathLike[str]) -> list[str]:
    """Return the lines of a text file, compressed or not; only a newline ends a line."""
    try:
        data = storage.as_path(path).read_bytes()
        if Path(path).suffix == ".gz":
            data = gzip.decompress(data)
        return data.decode("utf-8").split("\n")
    except FileNotFoundError:
        raise DataError(f"No text file at {path}: correct the path") from None
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"Cannot read {path} as UTF-8 text: {error}") from None
