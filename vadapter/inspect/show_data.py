"""Rows of a data set as a stage's model reads them: pixels, and every token with what it is for.

Legend: F frames, S pixels a side, P prompt tokens, T text tokens, M targets.
"""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from vadapter.data.media.frames import load_square
from vadapter.data.media.images import BadMedia
from vadapter.data.open import describe
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError
from vadapter.inspect.open_data import OpenData, without_tokenizer

Role = Literal["context", "target", "padding"]
_COLUMNS = 24  # of a frame in a terminal
_CODES = {"context": "36", "target": "1;32", "padding": "2", "bad": "1;31"}


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a row.

    Attributes:
      text: what it reads as; a special in ⟨⟩. Of a character in several tokens, the last has all.
      id: of the vocabulary.
      role: whether the loss counts it, the model only reads it, or neither.
      segment, position: where it stands; 0 and -1 for the prompt.
      read: it is in the model's input; the end of a text is only a target.
    """

    text: str
    id: int
    role: Role
    segment: int = 0
    position: int = -1
    read: bool = True


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row.

    Attributes:
      data, index, name: of the data set, its item and what people call it.
      frames: u8[F,S,S,3], or None for text; the encoder normalizes them on the device.
      mirrored: left and right are exchanged.
      bad: why the row does not count; "" where it does.
      prompt: in front of the visual tokens.
      texts: behind them, segment by segment.
      padding: of prompt and of text, in tokens.
    """

    data: str
    index: int
    name: str
    frames: np.ndarray | None
    mirrored: bool
    bad: str
    prompt: Sequence[Token]
    texts: Sequence[Sequence[Token]]
    padding: tuple[int, int]


def shown(data: OpenData, count: int) -> Iterator[Shown]:
    """The first rows that a stage draws from a data set, or of one it only looks at, in order.

    Raises:
      ConfigError: there is no tokenizer yet.
    """
    if data.tokenizer is None:
        raise ConfigError(without_tokenizer(data))
    for n in range(count if data.trains else min(count, len(data.items))):
        index, row = data.row(n)
        example = data.source[index] if data.config.task != "document" else None
        yield Shown(
            data.name,
            index,
            f"window {index}" if example is None else example.id,
            row.get("frames"),
            example is not None and _mirrored(data, example.media, row),
            describe(data.name, data.source, index) if row["bad"] else "",
            _prompt(row, data.tokenizer),
            list(texts_of(row, data.tokenizer)),
            (int((row["prompt"] < 0).sum()), int((row["segments"] == 0).sum())),
        )


def texts_of(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Iterator[list[Token]]:
    """The segments of a row: its tokens, each a target where a weighted target says the same.

    Args:
      row: one row of a batch.
      tokenizer: what wrote it.
    """
    goals = {
        int(at): int(goal)
        for at, goal, weight in zip(row["target_at"], row["targets"], row["weights"], strict=True)
        if weight > 0
    }
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        places = np.flatnonzero(row["segments"] == segment)
        ids = [int(i) for i in row["tokens"][places]]
        tokens: list[Token] = []
        for at, token, text in zip(places, ids, pieces(ids, tokenizer), strict=True):
            hit = bool(tokens) and goals.get(int(at) - 1) == token
            role: Role = "target" if hit else "context"
            tokens.append(Token(text, token, role, segment, int(row["positions"][at])))
        if (end := goals.get(int(places[-1]))) is not None:
            after = tokens[-1].position + 1
            text = pieces([end], tokenizer)[0]
            tokens.append(Token(text, end, "target", segment, after, read=False))
        yield tokens


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each of the ids adds to the text; specials by their names."""
    names = dict.fromkeys(tokenizer.stop_ids, "⟨end⟩")
    names |= {tokenizer.eos_id: "⟨eos⟩", tokenizer.bos_id: "⟨bos⟩"}
    if tokenizer.bos_id == tokenizer.eos_id:
        names[tokenizer.eos_id] = "⟨bos/eos⟩"
    texts, run, done = [], [], ""
    for token in ids:
        if token in names:
            texts.append(names[token])
            run, done = [], ""
            continue
        run.append(token)
        text = tokenizer.decode(run)
        whole = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else its character goes on
        texts.append(text[len(done) :] if whole else "")
        done = text if whole else done
    return texts


def _prompt(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> list[Token]:
    ids = [int(i) for i in row["prompt"] if i >= 0]
    return [Token(t, i, "context") for i, t in zip(ids, pieces(ids, tokenizer), strict=True)]


def _mirrored(data: OpenData, media: Any, row: Mapping[str, np.ndarray]) -> bool:
    """Whether the row holds the mirror image: found out by looking, as the row does not say."""
    if not data.config.flip or row["bad"] or data.view is None or "frames" not in row:
        return False
    try:
        plain = load_square(media, data.view, frames=len(row["frames"]))
    except (BadMedia, OSError):
        return False
    return not np.array_equal(plain, row["frames"])


# -- in a terminal -----------------------------------------------------------------------------


def as_text(rows: Iterable[Shown], *, color: bool) -> Iterator[str]:
    """Rows for a terminal: colored, or with targets in ⟦ ⟧."""
    paint = (lambda text, kind: f"\x1b[{_CODES[kind]}m{text}\x1b[0m") if color else _plain
    for row in rows:
        marks = ", mirrored" * row.mirrored
        size = "" if row.frames is None else f", {' × '.join(map(str, row.frames.shape[:3]))}"
        yield f"{row.data}[{row.index}] {printable(row.name)}{size}{marks}"
        if row.bad:
            yield paint(f"  left out, with weight 0: {printable(row.bad)}", "bad")
        if color and row.frames is not None:
            yield from _drawn(row.frames)
        if row.prompt:
            yield f"  prompt   {_line(row.prompt, row.padding[0], paint, left=True)}"
        for number, tokens in enumerate(row.texts, 1):
            read = [token for token in tokens if token.read]
            span = f"{read[0].position}–{read[-1].position}"
            yield f"  text {number:<3} {_line(tokens, 0, paint)}  ({span})"
        if row.padding[1]:
            yield f"  {paint(f'padding  {row.padding[1]} tokens', 'padding')}"
        yield ""


def legend(*, color: bool) -> str:
    """What the colors say."""
    paint = (lambda text, kind: f"\x1b[{_CODES[kind]}m{text}\x1b[0m") if color else _plain
    return ", ".join(paint(word, word) for word in ("context", "target", "padding"))


def wants_color(stream: Any = None) -> bool:
    """A terminal that has not been asked for plain text (https://no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Text of a data set without what a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _plain(text: str, kind: str) -> str:
    return f"⟦{text}⟧" if kind == "target" else text


def _line(tokens: Sequence[Token], padding: int, paint: Any, left: bool = False) -> str:
    """Tokens of one role are painted together."""
    parts, before = [], ""
    for token in tokens:
        if token.role == before:
            parts[-1][0].append(token.text)
        else:
            parts.append(([token.text], token.role))
        before = token.role
    text = "".join(paint(printable("".join(words)), role) for words, role in parts)
    return (paint(f"·×{padding} ", "padding") if padding and left else "") + text


def _drawn(frames: np.ndarray) -> Iterator[str]:
    """Frames side by side, two pixels a character."""
    small = [Image.fromarray(frame).resize((_COLUMNS, _COLUMNS)) for frame in frames]
    pixels = np.concatenate([np.pad(np.asarray(s), ((0, 0), (0, 1), (0, 0))) for s in small], 1)
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        yield f"  {''.join(cells)}\x1b[0m"
