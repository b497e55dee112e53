"""The facts of `study.check` for a terminal: a block a stage, in under 100 columns."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from vadapter.console import quantity, size, table, wrap

Facts = Mapping[str, Any]
_DTYPES = {"uint8": "u8", "int32": "i32", "float32": "f32"}
_PARTS = ("component", "kind", "enters → leaves", "parameters", "state", "starts from")
_DATA = ("data", "task", "use", "examples", "row")
_SHARE = 30  # columns of the last one


def as_text(facts: Facts) -> str:
    """All stages; the problems are left to the error that tells them."""
    return "\n\n".join(_stage(facts, stage) for stage in facts["stages"])


def _stage(facts: Facts, stage: Facts) -> str:
    mesh = " ".join(f"{k}={n}" for k, n in (facts["mesh"] or {}).items()) or "cannot be made here"
    head = f"{stage['name']}: {stage['kind']}, {stage['steps']:,} steps of {stage['batch']:,}"
    done = ", done before" if stage["done"] else ""
    parts = [_part(stage, part) for part in stage["components"]]
    data = [_data(stage, data) for data in stage["data"]]
    return "\n".join(
        [
            f"{head}, {facts['dtype']}, mesh {mesh}{done}",
            textwrap.indent(table(parts, _PARTS, right=(3,)), "  "),
            *(part for line in _totals(facts, stage) for part in wrap(line, "  ", "    ")),
            textwrap.indent(table(data, _DATA, right=(3,)), "  "),
        ]
    )


def _part(stage: Facts, part: Facts) -> tuple[str, ...]:
    count = part["parameters"]
    state = "trained" if part["trained"] else "frozen"
    return (
        part["name"],
        "\n".join(filter(None, (part["kind"], part["size"]))),
        "\n".join(_shapes(stage, part)),
        "—" if count is None else f"{count:,}",
        f"{state}\nint8" if part["int8"] else state,
        "\n".join(_start(part["start"])),
    )


def _shapes(stage: Facts, part: Facts) -> Iterator[str]:
    enters, leaves = part["enters"], part["leaves"]
    if enters is None:
        yield "—"
        return
    if "shape" in enters:
        yield _shape(enters)
    else:  # the language model that predicts the text
        of = {key: leaf["shape"][1] for key, leaf in enters.items() if leaf}
        most = "" if stage["tokenizer"]["exact"] else "≤"
        if of["prompt"]:
            yield f"prompt {most}{of['prompt']} +"
        if "prefix" in of:
            yield f"prefix {of['prefix']} +"
        yield f"text {of['tokens']} tokens"
    yield f"→ {_shape(leaves)}"


def _shape(leaf: Facts) -> str:
    dtype = _DTYPES.get(leaf["dtype"], "") if leaf["dtype"] != "float32" else ""
    return f"{dtype}[{','.join(map(str, leaf['shape']))}]"


def _start(start: Facts) -> Iterator[str]:
    if not start["found"]:
        yield from (f"{start['from'][-_SHARE:]}", "(see below)")
        return
    if "weights" not in start:
        yield _short(start["from"])
        if start["tensors"]:
            yield f"{start['tensors']} tensors"
    else:
        yield _short(_pinned(start["weights"]))
        files = quantity(start["files"], "file")
        yield f"{files}, {size(start['bytes'])}"
        yield f"{start['tensors']} tensors"
    for word in ("left_out", "fresh"):
        if start[word]:
            yield f"{len(start[word])} {word.replace('_', ' ')}"


def _pinned(weights: str) -> str:
    """A hub id with the beginning of its commit."""
    place, at, commit = weights.rpartition("@")
    return f"{place}@{commit[:8]}" if at and "/" not in commit else weights


def _short(text: str) -> str:
    return text if len(text) <= _SHARE else "…" + text[1 - _SHARE :]


def _totals(facts: Facts, stage: Facts) -> Iterator[str]:
    n, memory = stage["parameters"], stage["memory"]
    share = 100 * n["trained"] / max(n["total"], 1)
    yield (
        f"total {n['total']:,} parameters: {n['trained']:,} trained ({share:.1f} %), "
        f"{n['frozen']:,} frozen"
    )
    int8 = any(part["int8"] for part in stage["components"])
    form = f"{facts['dtype']}{' and int8' * int8}"
    kept = lambda m: (  # noqa: E731
        f"{size(m['frozen'])} frozen ({form}), {size(m['trained'])} trained and "
        f"{size(m['moments'])} moments (float32)"
    )
    yield f"memory {kept(memory)}, beside activations and gradients"
    if "per_device" in memory:
        yield f"per device {kept(memory['per_device'])}"
    yield _tokenizer(stage["tokenizer"])


def _tokenizer(facts: Facts) -> str:
    of = "the run's" if facts["of"] == "run" else f"that of {facts['of']}"
    if "bos" not in facts:
        return f"tokenizer {of}: cannot be read"
    size = f"{'' if facts['exact'] else 'at most '}{facts['vocab_size']:,} ids"
    ids = ", ".join(f"{kind} {_ids(facts[kind])}" for kind in ("bos", "eos", "stop"))
    made = "" if facts["exact"] else ", yet to be trained"
    rows = "" if facts["rows"] is None else (
        f"; {facts['embedding']} has {facts['rows']:,} rows, {facts['padding_rows']:,} of padding"
    )  # fmt: skip
    return f"tokenizer {of}{made}: {size}, {ids}{rows}"


def _ids(named: list[Facts]) -> str:
    return " ".join(f"{one['id']}{' ' * bool(one['token'])}{one['token']}" for one in named)


def _data(stage: Facts, data: Facts) -> tuple[str, ...]:
    most = "" if stage["tokenizer"]["exact"] else "≤"
    examples = "—" if data["examples"] is None else f"{data['examples']:,}"
    parts = []
    if data["frames"]:
        frames, size = data["frames"][:2]
        parts.append(f"{frames} × {size} px")
    if data["prompt"]:
        parts.append(f"prompt {most}{data['prompt']}")
    parts.append(f"text {data['text']}, {data['targets']} targets")
    return (
        data["name"],
        data["task"],
        "\n".join(data["use"]),
        examples,
        ", ".join(parts),
    )
