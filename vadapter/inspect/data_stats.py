"""What a data set holds and what a stage's rows make of it: lengths, cuts, faults, sizes, speed.

Nothing is trained, and no image stays in memory.
"""

import collections
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from vadapter.data.example import Example
from vadapter.data.media.images import BadMedia
from vadapter.data.media.media_header import Probe, probe
from vadapter.data.open import describe, prompt_len
from vadapter.data.prompts import CAPTION, QUESTION, text_piece
from vadapter.inspect.open_data import OpenData, without_tokenizer

Facts = dict[str, Any]
FIRST = 5  # faults that are told one by one


def stats(data: OpenData, limit: int = 0) -> Facts:
    """Looks at examples of a data set, evenly spread over it.

    Args:
      data: the data set.
      limit: at most so many examples; 0: all.

    Returns:
      What JSON has. `examples`, `looked_at`; lengths as {min, median, p95, max}; shares as
      {count, of, share}. Of what needs a tokenizer, where there is none yet, only
      `without_tokenizer`, which says what to do. `bad` is of rows, `cut` and `left_out` of texts
      and questions in them; rows are those of evaluation: the first texts, nothing mirrored.
    """
    indices = _spread(len(data.source), limit)
    facts: Facts = {
        "data": data.name, "task": data.config.task, "kind": data.source.kind,
        "stage": data.stage, "examples": len(data.source), "looked_at": len(indices),
    }  # fmt: skip
    words = [data.source.text_only(i) for i in indices]
    facts |= {
        key: _lengths([len(getattr(example, field)) for example in words])
        for key, field in (("captions", "captions"), ("questions", "qa"), ("pieces", "pieces"))
        if any(getattr(example, field) for example in words)
    }
    if data.source.kind != "text":
        facts |= _media(data, indices)
    if data.tokenizer is None:
        return facts | {"without_tokenizer": without_tokenizer(data)}
    return facts | _tokens(data, words) | _rows(data, indices)


def _spread(count: int, limit: int) -> list[int]:
    """Indices over all of 0..count-1, at equal distances."""
    n = min(count, limit or count)
    return [i * count // n for i in range(n)]


# -- images, by their headers ----------------------------------------------------------------


def _media(data: OpenData, indices: Sequence[int]) -> Facts:
    clip = data.source.kind == "clip"
    found, unreadable = [], 0
    for index in indices:
        try:
            media = data.source[index].media
            found.append(probe(media, clip=clip) if media is not None else None)
        except (BadMedia, OSError):
            unreadable += 1
    probes: list[Probe] = [p for p in found if p is not None]
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


# -- texts, one by one -------------------------------------------------------------------------


def _tokens(data: OpenData, words: Sequence[Example]) -> Facts:
    """Tokens of every text, of what stands between image and text, and of the prompt."""
    assert data.tokenizer is not None
    encode, task = data.tokenizer.encode, data.config.task
    if task == "document":
        lengths = [1 + sum(len(encode(p)) for p in example.pieces) for example in words]
        room = min(data.config.text_len, data.config.target_len or data.config.text_len)
        cut = _share(sum(n > room for n in lengths), len(lengths))
        return {"text_tokens": _lengths(lengths), "prompt_tokens": _lengths([0]), "cut": cut}
    facts: Facts = {"prompt_tokens": _lengths([prompt_len(task, data.tokenizer)])}
    if task == "question":
        asked = [(q.text, q.answer) for e in words for q in e.qa]
        leads = [len(encode(QUESTION.after(question))) for question, _ in asked]
        facts["question_tokens"] = _lengths(leads)
        texts = [answer for _, answer in asked if answer]
    else:
        texts = [caption for e in words for caption in e.captions]
    return facts | {"text_tokens": _lengths([len(encode(text_piece(t))) for t in texts])}


# -- rows --------------------------------------------------------------------------------------


def _rows(data: OpenData, indices: Sequence[int]) -> Facts:
    """Makes the rows, and counts what is lost on the way."""
    if data.config.task == "document":  # items are windows of examples
        indices = _spread(len(data.items), len(indices))
    bad, first, text, prompt, spent = 0, [], 0, 0, 0.0
    texts = cut = wanted = 0
    for index in indices:
        began = time.perf_counter()
        row = data.transform(data.items[index], rng=None)
        spent += time.perf_counter() - began
        lengths = np.bincount(row["segments"])[1:].tolist()
        text, prompt = text + sum(lengths), prompt + int((row["prompt"] >= 0).sum())
        if row["bad"]:
            bad += 1
            if len(first) < FIRST:
                first.append(describe(data.name, data.source, index))
        if data.config.task != "document":
            chosen = _chosen(data, data.source.text_only(index))
            whole = [length for length in chosen if length]
            texts, wanted = texts + len(whole), wanted + len(chosen)
            cut += sum(a < b for a, b in zip(lengths, whole, strict=True))
    facts: Facts = {
        "rows": len(indices),
        "fill": text / max(1, len(indices) * data.config.text_len),
        "bad": _share(bad, len(indices)) | {"first": first},
        "rows_a_second": len(indices) / max(spent, 1e-9),
        "tokens_a_second": (text + prompt) / max(spent, 1e-9),
    }
    if data.config.task == "document":
        return facts
    return facts | {"cut": _share(cut, texts), "left_out": _share(wanted - texts, wanted)}


def _chosen(data: OpenData, example: Example) -> list[int]:
    """Tokens of every segment that a row should have, uncut; 0 where it is left out."""
    assert data.tokenizer is not None
    config, encode = data.config, data.tokenizer.encode
    if config.task == "caption":
        lead = len(encode(CAPTION.after))
        captions = [caption for caption in example.captions if caption.strip()][: config.texts]
        return [lead + len(encode(text_piece(caption))) for caption in captions]
    asked = [q for q in example.qa if q.text.strip() and q.answer.strip()][: config.texts]
    leads = [len(encode(QUESTION.after(q.text))) for q in asked]
    return [
        lead + len(encode(text_piece(q.answer))) if lead < config.text_len // config.texts else 0
        for lead, q in zip(leads, asked, strict=True)
    ]


def _lengths(values: Sequence[float]) -> Facts:
    if not values:
        return {"min": 0, "median": 0, "p95": 0, "max": 0, "sum": 0}
    ordered = sorted(values)
    at = lambda share: ordered[max(0, math.ceil(share * len(ordered)) - 1)]  # noqa: E731
    return {"min": ordered[0], "median": at(0.5), "p95": at(0.95), "max": ordered[-1],
            "sum": sum(ordered)}  # fmt: skip


def _share(count: int, of: int) -> Facts:
    return {"count": count, "of": of, "share": count / of if of else 0.0}
