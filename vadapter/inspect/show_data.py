"""Rows of a data set as the model reads them: pixels, and every token with its role.

Legend: F frames, S pixels per side.
"""

import dataclasses
import itertools
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
_COLUMNS = 24  # width of a frame in a terminal
_CODES = {"context": "36", "target": "1;32", "padding": "2", "bad": "1;31"}


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of a row."""

    text: str  # decoded; of a character with several tokens, in the last; special tokens in ⟨⟩
    id: int
    role: Role  # target: the loss counts it; context: the model only reads it
    segment: int = 0  # 0: the prompt
    position: int = -1  # in the row; -1: the prompt
    read: bool = True  # whether it is in the model's input; the end of a text is only a target


@dataclasses.dataclass(frozen=True)
class Shown:
    """A row of a data set."""

    data: str
    index: int  # of the item in the data set
    name: str  # of the example
    frames: np.ndarray | None  # u8[F,S,S,3]; None for text; the encoder normalizes them
    mirrored: bool  # left and right are swapped
    decode: str  # how a JPEG is decoded, see `ImageTransform`
    bad: str  # why the row does not count; "" if it does
    prompt: Sequence[Token]  # before the visual tokens
    texts: Sequence[Sequence[Token]]  # after the visual tokens, by segment
    padding: tuple[int, int]  # number of padding tokens of the prompt and of the text


def shown(data: OpenData, count: int) -> Iterator[Shown]:
    """Yield the first rows that a stage reads; ConfigError if its tokenizer is not trained yet."""
    if data.tokenizer is None:
        raise ConfigError(without_tokenizer(data))
    for n in range(count if data.trains else min(count, len(data.items))):
        index, row = data.row(n)
        example = data.source[index] if data.config.task != "document" else None
        yield Shown(
            data=data.name,
            index=index,
            frames=row.get("frames"),
            name=f"window {index}" if example is None else example.id,
            mirrored=example is not None and _mirrored(data, example.media, row),
            decode="exact" if data.view is None else data.view.decode,
            bad=describe(data.name, data.source, index) if row["bad"] else "",
            prompt=_prompt(row, data.tokenizer),
            texts=list(texts_of(row, data.tokenizer)),
            padding=(int((row["prompt"] < 0).sum()), int((row["segments"] == 0).sum())),
        )


def texts_of(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> Iterator[list[Token]]:
    """Yield the tokens of each segment of a row of a batch."""
    counted = row["weights"] > 0
    # Position in the row -> the token that must be predicted there.
    positions = row["target_at"][counted].tolist()
    targets = dict(zip(positions, row["targets"][counted].tolist(), strict=True))
    for segment in range(1, int(row["segments"].max(initial=0)) + 1):
        positions = np.flatnonzero(row["segments"] == segment)
        ids = [int(i) for i in row["tokens"][positions]]
        tokens: list[Token] = []
        for position, token, text in zip(positions, ids, pieces(ids, tokenizer), strict=True):
            counts = bool(tokens) and targets.get(int(position) - 1) == token
            role: Role = "target" if counts else "context"
            tokens.append(Token(text, token, role, segment, int(row["positions"][position])))
        if (end := targets.get(int(positions[-1]))) is not None:
            text = pieces([end], tokenizer)[0]
            position = tokens[-1].position + 1
            tokens.append(Token(text, end, "target", segment, position, read=False))
        yield tokens


def pieces(ids: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """Return what each token adds to the text; special tokens by their names."""
    names = dict.fromkeys(tokenizer.stop_ids, "⟨end⟩")
    names |= {tokenizer.eos_id: "⟨eos⟩", tokenizer.bos_id: "⟨bos⟩"}
    if tokenizer.bos_id == tokenizer.eos_id:
        names[tokenizer.eos_id] = "⟨bos/eos⟩"
    texts: list[str] = []
    run: list[int] = []  # ids since the last special token
    decoded = ""  # text of all complete characters of the run
    for token in ids:
        if token in names:
            texts.append(names[token])
            run, decoded = [], ""
            continue
        run.append(token)
        text = tokenizer.decode(run)
        complete = not text.endswith("\N{REPLACEMENT CHARACTER}")  # else more tokens follow
        texts.append(text[len(decoded) :] if complete else "")
        decoded = text if complete else decoded
    return texts


def _prompt(row: Mapping[str, np.ndarray], tokenizer: Tokenizer) -> list[Token]:
    ids = [int(i) for i in row["prompt"] if i >= 0]
    return [Token(t, i, "context") for i, t in zip(ids, pieces(ids, tokenizer), strict=True)]


def _mirrored(data: OpenData, media: Any, row: Mapping[str, np.ndarray]) -> bool:
    """Return whether the row has the mirror image, by comparing pixels: rows do not record it."""
    if not data.config.flip or row["bad"] or data.view is None or "frames" not in row:
        return False
    try:
        original = load_square(media, data.view, frames=len(row["frames"]))
    except (BadMedia, OSError):
        return False
    return not np.array_equal(original, row["frames"])


# -- in a terminal -----------------------------------------------------------------------------


def as_text(rows: Iterable[Shown], *, color: bool) -> Iterator[str]:
    """Yield lines for a terminal, in color, or with targets in ⟦ ⟧."""
    paint = _color if color else _bracket
    for row in rows:
        size = "" if row.frames is None else f", {' × '.join(map(str, row.frames.shape[:3]))}"
        decode = "" if row.decode == "exact" else f", JPEGs decoded {row.decode}"
        mirrored = ", mirrored" if row.mirrored else ""
        yield f"{row.data}[{row.index}] {printable(row.name)}{size}{decode}{mirrored}"
        if row.bad:
            yield paint(f"  unusable row, weight 0: {printable(row.bad)}", "bad")
        if color and row.frames is not None:
            yield from _draw(row.frames)
        if row.prompt:
            padding = paint(f"·×{row.padding[0]} ", "padding") if row.padding[0] else ""
            yield f"  prompt   {padding}{_line(row.prompt, paint)}"
        for number, tokens in enumerate(row.texts, 1):
            read = [token for token in tokens if token.read]
            span = f"{read[0].position}–{read[-1].position}"
            yield f"  text {number:<3} {_line(tokens, paint)}  ({span})"
        if row.padding[1]:
            yield f"  {paint(f'padding  {row.padding[1]} tokens', 'padding')}"
        yield ""


def legend(*, color: bool) -> str:
    """Return the meaning of the colors or brackets."""
    paint = _color if color else _bracket
    return ", ".join(paint(role, role) for role in ("context", "target", "padding"))


def wants_color(stream: Any = None) -> bool:
    """Return whether to use color: on a terminal, unless NO_COLOR is set (https://no-color.org)."""
    stream = stream or sys.stdout
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def printable(text: str) -> str:
    """Return text from a data set without control characters, which a terminal would execute."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _color(text: str, kind: str) -> str:
    return f"\x1b[{_CODES[kind]}m{text}\x1b[0m"


def _bracket(text: str, kind: str) -> str:
    return f"⟦{text}⟧" if kind == "target" else text


def _line(tokens: Sequence[Token], paint: Any) -> str:
    """Return the tokens' text; consecutive tokens of the same role are painted together."""
    groups = itertools.groupby(tokens, key=lambda token: token.role)
    return "".join(paint(printable("".join(t.text for t in group)), role) for role, group in groups)


def _draw(frames: np.ndarray) -> Iterator[str]:
    """Yield lines with the frames side by side, two pixels per character."""
    small = [Image.fromarray(frame).resize((_COLUMNS, _COLUMNS)) for frame in frames]
    pixels = np.concatenate([np.pad(np.asarray(s), ((0, 0), (0, 1), (0, 0))) for s in small], 1)
    for upper, lower in zip(pixels[::2], pixels[1::2], strict=True):
        cells = (
            f"\x1b[38;2;{a[0]};{a[1]};{a[2]};48;2;{b[0]};{b[1]};{b[2]}m▀"
            for a, b in zip(upper, lower, strict=True)
        )
        yield f"  {''.join(cells)}\x1b[0m"
