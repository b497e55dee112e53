"""The facts of `study.data_stats` for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from vadapter.console import table
from vadapter.inspect.show_data import printable

Facts = Mapping[str, Any]
_HEADER = ("", "min", "median", "95 %", "max")
_LENGTHS = {  # key -> what it counts
    "captions": "captions an image",
    "questions": "questions an image",
    "pieces": "pieces a document",
    "prompt_tokens": "prompt, tokens",
    "question_tokens": "question, tokens",
    "text_tokens": "text, tokens",
}
_SIZES = {"width": "width, pixels", "height": "height, pixels"}
_CLIPS = {"frames": "frames", "seconds": "seconds", "frames_a_second": "frames a second"}
_SHARES = {
    "cut": "texts cut",
    "left_out": "questions left out",
    "headers_unreadable": "headers that cannot be read",
}


def as_text(facts: Facts) -> str:
    """One data set."""
    looked = f", {facts['looked_at']:,} looked at" * (facts["looked_at"] < facts["examples"])
    lines = [
        f"{facts['data']}: {facts['examples']:,} examples ({facts['kind']}, {facts['task']}, as "
        f"stage {facts['stage']} reads them){looked}"
    ]
    groups = ((facts, _LENGTHS), (facts.get("sizes", {}), _SIZES), (facts.get("clips", {}), _CLIPS))
    rows = [_row(text, group[key]) for group, keys in groups for key, text in keys.items()
            if key in group]  # fmt: skip
    lines += [f"  {line}" for line in table(rows, _HEADER).splitlines()]
    if "sizes" in facts:
        common = facts["sizes"]["common"]
        sizes = ", ".join(f"{s['width']}×{s['height']} ({s['count']:,})" for s in common)
        lines.append(f"  most common sizes: {sizes}")
    lines += [f"  {line}" for line in _lines(facts)]
    return "\n".join(lines)


def _lines(facts: Facts) -> Iterator[str]:
    for key, text in _SHARES.items():
        if key in facts and (key != "left_out" or facts["task"] == "question"):
            yield f"{text}: {_share(facts[key])}"
    if "without_tokenizer" in facts:
        yield f"no lengths in tokens, no rows: {facts['without_tokenizer']}"
        return
    yield f"bad samples: {_share(facts['bad'])}"
    yield from (f"  {printable(fault)}" for fault in facts["bad"]["first"])
    yield f"text of a row that is not padding: {facts['fill']:.1%}"
    yield (
        f"{facts['rows_a_second']:,.1f} rows and {facts['tokens_a_second']:,.0f} tokens a second, "
        "one after another"
    )


def _share(share: Facts) -> str:
    return f"{share['count']:,} of {share['of']:,} ({share['share']:.2%})"


def _row(text: str, lengths: Facts) -> tuple[str, ...]:
    return (text, *(f"{lengths[key]:,}" for key in ("min", "median", "p95", "max")))
