"""From an example to one row of a batch: pure functions of the example and a generator.

A row is made of segments, each of `lead` ids followed by `words` ids. Its tokens are lead + words,
its targets words + EOS; the first target is predicted at the last id of `lead`:

                    lead                          words
    caption         " :"                          " <caption>"           after CAPTION.before
    question        ". Question: … Answer:"       " <answer>"            after QUESTION.before
    document        BOS                           all pieces             no prompt, no frames

Text that does not fit is cut, the longest segment first, and keeps its EOS. A sample that cannot be
used (unreadable media, only blank captions, a question too long) becomes a row of the usual shape
whose frames and weights are 0 and whose `bad` is True. The trainer counts it, and the samples after
it keep their place in the stream.

Training draws with `rng`; with rng=None nothing is drawn: the first captions, never mirrored.

Legend: F frames, S pixels a side, P prompt tokens, T text tokens, M targets, N visual tokens a
frame, D encoder width.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from vadapter.data.batch import PROMPT_PAD, Row
from vadapter.data.example import Example, Features
from vadapter.data.media.frames import load_square
from vadapter.data.media.images import BadMedia, ImageTransform
from vadapter.data.prompts import CAPTION, QUESTION, QuestionPrompt, text_piece
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError

Segment = tuple[list[int], list[int]]  # ids of lead and words, see above

# "left", "right", "leftmost", "right-hand": of a mirrored image the words would be wrong.
_SIDES = re.compile(r"\b(?:left|right)", re.IGNORECASE)
# No text has longer tokens on average. What is past this cannot enter the row, and encoding a text
# of megabytes would stall the pipeline.
_CHARS_PER_TOKEN = 32


def caption_sample(
    example: Example,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    *,
    view: ImageTransform,
    frames: int = 1,
    texts_per_image: int = 1,
    text_len: int,
    target_len: int,
    prompt_len: int,
    flip: bool = False,
) -> Row:
    """Return the row of an image or clip with up to `texts_per_image` captions after one prefix.

    `rng` draws the captions, without repeats, and which half of the images `flip` mirrors: never
    one of which a chosen caption tells left from right. T is `text_len`, M `target_len`, P
    `prompt_len`.

    Returns:
      frames u8[F,S,S,3], or features bf16[F,N,D] if the example has them; prompt i32[P]; tokens,
      segments, positions i32[T]; target_at, targets i32[M]; weights f32[M]; bad bool[].

    Raises:
      ConfigError: `prompt_len`, `text_len` or `target_len` is too small.
    """
    captions = [caption for caption in example.captions if caption.strip()]
    chosen = _choose(captions, texts_per_image, rng)
    lead = tokenizer.encode(CAPTION.after)
    segments = [(lead, _encode(tokenizer, text_piece(text), text_len)) for text in chosen]
    text = _lay_out(segments, tokenizer.eos_id, text_len, target_len)
    mirror = flip and _draw_mirroring(chosen, rng)
    visual = _visual(example, view, frames, mirror)
    return _row(visual, _prompt(tokenizer, CAPTION.before, prompt_len), text)


def question_sample(
    example: Example,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    *,
    view: ImageTransform,
    frames: int = 1,
    texts_per_image: int = 1,
    text_len: int,
    target_len: int,
    prompt_len: int,
    flip: bool = False,
) -> Row:
    """Return the row of an image or clip with up to `texts_per_image` questions and answers.

    Only answers are targets. A question with an answer of one token must fit in
    text_len // texts_per_image tokens; a longer one is left out. Arguments, result and errors are
    those of `caption_sample`.
    """
    pairs = [(q.text, q.answer) for q in example.qa if q.text.strip() and q.answer.strip()]
    chosen = _choose(pairs, texts_per_image, rng)
    segments = []
    for question, answer in chosen:
        lead = _encode(tokenizer, QUESTION.after(question), text_len)
        if len(lead) < text_len // texts_per_image:
            segments.append((lead, _encode(tokenizer, text_piece(answer), text_len)))
    text = _lay_out(segments, tokenizer.eos_id, text_len, target_len)
    mirror = flip and _draw_mirroring([f"{q} {a}" for q, a in chosen], rng)
    visual = _visual(example, view, frames, mirror)
    return _row(visual, _prompt(tokenizer, QUESTION.before, prompt_len), text)


def document_sample(
    examples: Sequence[Example],
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    *,
    text_len: int,
    target_len: int | None = None,
    last_only: bool = False,
) -> Row:
    """Return a row of packed documents, each a segment that starts with BOS.

    The documents of the window `examples` are tried in their order; each enters that still fits
    uncut, and the others are left out (see `items.Windows`). A document longer than a row enters an
    empty row cut. With `last_only` it is left out, since its targets may be past the cut: only the
    last piece (usually a caption) and EOS are then targets, for a loss that can be compared between
    documents of different layouts. T is `text_len`, M `target_len`, by default T, which suffices.
    Nothing is drawn. The arrays are those of `caption_sample` without frames, with prompt i32[0].
    """
    del rng
    segments, room = [], text_len
    for example in examples:
        numbered = enumerate(example.pieces)
        pieces = [_encode(tokenizer, text, text_len, start=not n) for n, text in numbered]
        body = [i for piece in pieces for i in piece]
        if body and (1 + len(body) <= room or not (segments or last_only)):
            words = pieces[-1] if last_only else body
            lead = [tokenizer.bos_id, *body[: len(body) - len(words)]]
            segments.append((lead, words))
            room -= 1 + len(body)
    target_len = text_len if target_len is None else target_len
    text = _lay_out(segments, tokenizer.eos_id, text_len, target_len)
    return _row(({}, True), np.zeros(0, np.int32), text)


def prompt_sample(
    item: Any,
    tokenizer: Tokenizer,
    rng: np.random.Generator | None = None,
    *,
    view: ImageTransform,
    frames: int = 1,
    text_len: int,
    template: QuestionPrompt = QUESTION,
    shots: Sequence[tuple[str, str]] = (),
) -> Row:
    """Return a row for the model to continue, with a caption or an answer.

    An item is an example, to be captioned, or (example, `Question`): the question is put into
    `template`, after `shots`, (question, answer) pairs without images. The text is the lead alone,
    its last `text_len` tokens; the only target is EOS, so M is 1. The arrays are those of
    `caption_sample`.
    """
    example, question = item if isinstance(item, tuple) else (item, None)
    around = CAPTION if question is None else template.fill(question.text, shots)
    lead = _encode(tokenizer, around.after, text_len)[-text_len:]
    # One place more than needed, since `_lay_out` wants room for a word in every segment.
    text = _lay_out([(lead, [])], tokenizer.eos_id, text_len + 1, 2)
    text = {key: value[:-1] for key, value in text.items()}
    prompt_len = len(tokenizer.encode(around.before, start=True)) + 1
    prompt = _prompt(tokenizer, around.before, prompt_len)
    return _row(_visual(example, view, frames, False), prompt, text)


def _lay_out(segments: Sequence[Segment], eos: int, text_len: int, target_len: int) -> Row:
    """Return the text of a row: the segments one after another from the left, then padding.

    Words are cut to one limit for all segments; leads are never cut, as an answer means nothing
    without its question.
    """
    leads = sum(len(lead) for lead, _ in segments)
    room = min(text_len - leads, target_len - len(segments))
    if room < len(segments):
        raise ConfigError(
            f"text_len={text_len}, target_len={target_len} are too small for {len(segments)} texts "
            f"in a row, which {leads} tokens precede: increase them, or put fewer texts in a row"
        )
    limit = _limit([len(words) for _, words in segments], room)
    tokens, ids, positions = np.zeros((3, text_len), np.int32)
    target_at, targets = np.zeros((2, target_len), np.int32)
    weights = np.zeros(target_len, np.float32)
    t = m = 0  # the next free places among T and M
    for number, (lead, words) in enumerate(segments, 1):
        words = words[:limit]
        n = len(lead) + len(words)
        tokens[t : t + n] = [*lead, *words]
        ids[t : t + n] = number
        positions[t : t + n] = np.arange(n)
        goals = [*words, eos]
        target_at[m : m + len(goals)] = np.arange(t + len(lead) - 1, t + n)
        targets[m : m + len(goals)] = goals
        weights[m : m + len(goals)] = 1
        t, m = t + n, m + len(goals)
    row = {"tokens": tokens, "segments": ids, "positions": positions}
    return {**row, "target_at": target_at, "targets": targets, "weights": weights}


def _limit(lengths: Sequence[int], room: int) -> int:
    """Return the largest limit with sum(min(length, limit)) <= room: it cuts the longest first."""
    limit = max(lengths, default=0)
    while limit and sum(min(n, limit) for n in lengths) > room:
        limit -= 1
    return limit


def _row(visual: tuple[Row, bool], prompt: np.ndarray, text: Row) -> Row:
    """Return the complete row; a bad one has the same shapes, without pixels and weights."""
    arrays, readable = visual
    bad = not readable or not text["weights"].any()
    if bad:
        text = {**text, "weights": np.zeros_like(text["weights"])}
        arrays = {key: np.zeros_like(value) for key, value in arrays.items()}
    return {**arrays, "prompt": prompt, **text, "bad": np.array(bad)}


def _visual(example: Example, view: ImageTransform, frames: int, mirror: bool) -> tuple[Row, bool]:
    """Return the visual input of the row, and whether it could be read."""
    media = example.media
    if isinstance(media, Features):
        return {"features": media.tokens[int(mirror)]}, media.readable
    try:
        return {"frames": load_square(media, view, frames=frames, flip=mirror)}, True
    except (BadMedia, OSError):
        return {"frames": np.zeros((frames, view.size, view.size, 3), np.uint8)}, False


def _prompt(tokenizer: Tokenizer, before: str, prompt_len: int) -> np.ndarray:
    """Return BOS and the tokens of `before`, i32[P], padded on the left."""
    ids = [tokenizer.bos_id, *tokenizer.encode(before, start=True)]
    if len(ids) > prompt_len:
        raise ConfigError(
            f"prompt_len={prompt_len} is too small for {before!r}, which has {len(ids)} tokens "
            f"with BOS: set prompt_len to {len(ids)} or more"
        )
    return np.array([PROMPT_PAD] * (prompt_len - len(ids)) + ids, np.int32)


def _encode(tokenizer: Tokenizer, text: str, text_len: int, start: bool = False) -> list[int]:
    return tokenizer.encode(text[: _CHARS_PER_TOKEN * text_len], start=start)


def _choose(items: list, count: int, rng: np.random.Generator | None) -> list:
    if rng is None:
        return items[:count]
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def _draw_mirroring(texts: Sequence[str], rng: np.random.Generator | None) -> bool:
    return rng is not None and rng.random() < 0.5 and not any(_SIDES.search(text) for text in texts)
