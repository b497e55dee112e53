"""Statistics of a data set and its rows: lengths, truncation, faults, sizes, speed.

Nothing is trained, and no image stays in memory.
"""

import collections
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vadapter.console import table
from vadapter.data.example import Example
from vadapter.data.media.images import BadMedia
from vadapter.data.media.media_header import probe
from vadapter.data.open import describe, prompt_len
from vadapter.data.prompts import CAPTION, QUESTION, text_piece
from vadapter.inspect.open_data import OpenData, without_tokenizer
from vadapter.inspect.show_data import printable

Facts = dict[str, Any]
FIRST = 5  # faults and sizes that are listed one by one


def stats(data: OpenData, limit: int = 0) -> Facts:
    """Return statistics over examples of a data set, evenly spread over it.

    Args:
      limit: maximum number of examples; 0: all.

    Returns:
      JSON values: `examples` and `looked_at`; lengths as {min, median, p95, max, sum}; shares as
      {count, of, share}. `bad` counts rows; `cut` and `left_out` count texts and questions in them.
      Rows are those of evaluation: the first texts of an example, never mirrored. While the
      tokenizer has not been trained, `without_tokenizer` says what to do about it, and everything
      that needs a tokenizer is missing.
    """
    indices = _spread(len(data.source), limit)
    facts: Facts = {
        "data": data.name, "task": data.config.task, "kind": data.source.kind,
        "stage": data.stage, "examples": len(data.source), "looked_at": len(indices),
    }  # fmt: skip
    examples = [data.source.text_only(i) for i in indices]
    facts |= {
        key: _lengths([len(getattr(example, field)) for example in examples])
        for key, field in (("captions", "captions"), ("questions", "qa"), ("pieces", "pieces"))
        if any(getattr(example, field) for example in examples)
    }
    if data.source.kind != "text":
        facts |= _media(data, indices)
    if data.tokenizer is None:
        return facts | {"without_tokenizer": without_tokenizer(data)}
    return facts | _tokens(data, examples) | _rows(data, indices)


def _spread(count: int, limit: int) -> list[int]:
    """Return evenly spaced indices in 0..count-1."""
    n = min(count, limit or count)
    return [i * count // n for i in range(n)]


def _media(data: OpenData, indices: Sequence[int]) -> Facts:
    """Return the sizes of images and the lengths of clips, from their headers."""
    clip = data.source.kind == "clip"
    probes, unreadable = [], 0
    for index in indices:
        try:
            media = data.source[index].media
            if media is not None:
                probes.append(probe(media, clip=clip))
        except (BadMedia, OSError):
            unreadable += 1
    facts: Facts = {"headers_unreadable": _share(unreadable, len(indices))}
    if not probes:
        return facts
    sizes = collections.Counter((p.width, p.height) for p in probes).most_common(FIRST)
    facts["sizes"] = {
        "width": _lengths([p.width for p in probes]),
        "height": _lengths([p.height for p in probes]),
        "common": [{"width": w, "height": h, "count": n} for (w, h), n in sizes],
    }
    if clip:
        timed = [p for p in probes if p.seconds]
        facts["clips"] = {
            "frames": _lengths([p.frames for p in probes]),
            "seconds": _lengths([round(p.seconds, 2) for p in timed]),
            "frames_a_second": _lengths([round(p.frames / p.seconds, 2) for p in timed]),
        }
    return facts


def _tokens(data: OpenData, examples: Sequence[Example]) -> Facts:
    """Return the lengths in tokens of every text, of the questions and of the prompt."""
    assert data.tokenizer is not None
    encode, task = data.tokenizer.encode, data.config.task
    if task == "document":
        lengths = [1 + sum(len(encode(piece)) for piece in e.pieces) for e in examples]
        limit = min(data.config.text_len, data.config.target_len or data.config.text_len)
        cut = _share(sum(n > limit for n in lengths), len(lengths))
        return {"text_tokens": _lengths(lengths), "prompt_tokens": _lengths([0]), "cut": cut}
    facts: Facts = {"prompt_tokens": _lengths([prompt_len(task, data.tokenizer)])}
    if task == "question":
        questions = [q for e in examples for q in e.qa]
        before = [len(encode(QUESTION.after(q.text))) for q in questions]
        facts["question_tokens"] = _lengths(before)
        texts = [q.answer for q in questions if q.answer]
    else:
        texts = [caption for e in examples for caption in e.captions]
    return facts | {"text_tokens": _lengths([len(encode(text_piece(t))) for t in texts])}


def _rows(data: OpenData, indices: Sequence[int]) -> Facts:
    """Make the rows of the examples and count what is lost on the way."""
    if data.config.task == "document":  # items are windows over several examples
        indices = _spread(len(data.items), len(indices))
    bad, text_tokens, prompt_tokens, seconds = [], 0, 0, 0.0
    kept = cut = total = 0  # texts
    for index in indices:
        start = time.perf_counter()
        row = data.transform(data.items[index], rng=None)
        seconds += time.perf_counter() - start
        lengths = np.bincount(row["segments"])[1:].tolist()
        text_tokens += sum(lengths)
        prompt_tokens += int((row["prompt"] >= 0).sum())
        if row["bad"]:
            bad.append(index)
        if data.config.task != "document":
            expected = _segment_lengths(data, data.source.text_only(index))
            uncut = [length for length in expected if length]
            kept, total = kept + len(uncut), total + len(expected)
            cut += sum(a < b for a, b in zip(lengths, uncut, strict=True))
    facts: Facts = {
        "rows": len(indices),
        "fill": text_tokens / max(1, len(indices) * data.config.text_len),
        "bad": _share(len(bad), len(indices))
        | {"first": [describe(data.name, data.source, index) for index in bad[:FIRST]]},
        "rows_a_second": len(indices) / max(seconds, 1e-9),
        "tokens_a_second": (text_tokens + prompt_tokens) / max(seconds, 1e-9),
    }
    if data.config.task == "document":
        return facts
    return facts | {"cut": _share(cut, kept), "left_out": _share(total - kept, total)}


def _segment_lengths(data: OpenData, example: Example) -> list[int]:
    """Return the tokens of each segment of a row before truncation; 0 if it is left out."""
    assert data.tokenizer is not None
    config, encode = data.config, data.tokenizer.encode
    if config.task == "caption":
        before = len(encode(CAPTION.after))
        captions = [caption for caption in example.captions if caption.strip()][: config.texts]
        return [before + len(encode(text_piece(caption))) for caption in captions]
    questions = [q for q in example.qa if q.text.strip() and q.answer.strip()][: config.texts]
    lengths = []
    for q in questions:
        before = len(encode(QUESTION.after(q.text)))
        fits = before < config.text_len // config.texts
        lengths.append(before + len(encode(text_piece(q.answer))) if fits else 0)
    return lengths


def _lengths(values: Sequence[float]) -> Facts:
    ordered = sorted(values) or [0]
    median, p95 = (ordered[math.ceil(q * len(ordered)) - 1] for q in (0.5, 0.95))
    return {"min": ordered[0], "median": median, "p95": p95, "max": ordered[-1],
            "sum": sum(ordered)}  # fmt: skip


def _share(count: int, of: int) -> Facts:
    return {"count": count, "of": of, "share": count / of if of else 0.0}


# -- as text -----------------------------------------------------------------------------------

_LENGTHS = {  # key -> row of the table
    "captions": "captions per image",
    "questions": "questions per image",
    "pieces": "pieces per document",
    "prompt_tokens": "prompt, tokens",
    "question_tokens": "question, tokens",
    "text_tokens": "text, tokens",
}
_SIZES = {"width": "width, pixels", "height": "height, pixels"}
_CLIPS = {"frames": "frames", "seconds": "seconds", "frames_a_second": "frames per second"}
_SHARES = {
    "cut": "texts truncated",
    "left_out": "questions left out",
    "headers_unreadable": "unreadable headers",
}


def as_text(facts: Mapping[str, Any]) -> str:
    """Return the statistics of a data set for a terminal."""
    sampled = ""
    if facts["looked_at"] < facts["examples"]:
        sampled = f", {facts['looked_at']:,} of them inspected"
    lines = [
        f"{facts['data']}: {facts['examples']:,} examples ({facts['kind']}, {facts['task']}, as "
        f"read by stage {facts['stage']}){sampled}"
    ]
    groups = ((facts, _LENGTHS), (facts.get("sizes", {}), _SIZES), (facts.get("clips", {}), _CLIPS))
    rows = [
        (title, *(f"{group[key][way]:,}" for way in ("min", "median", "p95", "max")))
        for group, titles in groups
        for key, title in titles.items()
        if key in group
    ]
    lines += table(rows, ("", "min", "median", "95 %", "max")).splitlines()
    if "sizes" in facts:
        common = facts["sizes"]["common"]
        sizes = ", ".join(f"{s['width']}×{s['height']} ({s['count']:,})" for s in common)
        lines.append(f"most common sizes: {sizes}")
    return "\n  ".join([*lines, *_shares(facts)])


def _shares(facts: Mapping[str, Any]) -> Iterator[str]:
    def share(key: str) -> str:
        value = facts[key]
        return f"{value['count']:,} of {value['of']:,} ({value['share']:.2%})"

    for key, title in _SHARES.items():
        if key in facts and (key != "left_out" or facts["task"] == "question"):
            yield f"{title}: {share(key)}"
    if "without_tokenizer" in facts:
        yield facts["without_tokenizer"]
        return
    yield f"unusable rows: {share('bad')}"
    yield from (f"  {printable(fault)}" for fault in facts["bad"]["first"])
    yield f"text tokens that are not padding: {facts['fill']:.1%}"
    yield (
        f"{facts['rows_a_second']:,.1f} rows and {facts['tokens_a_second']:,.0f} tokens per "
        "second in one thread"
    )
