"""The facts of `check` for a terminal: one block per stage, in less than 100 columns."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from vadapter.console import quantity, size, table, wrap
from vadapter.distributed.mesh import axes

Facts = Mapping[str, Any]
_DTYPES = {"uint8": "u8", "int32": "i32"}  # floats are of the stage's dtype
_PARTS = ("component", "kind", "enters → leaves", "parameters", "state", "starts from")
_DATA = ("data", "task", "use", "examples", "row")
_START = 30  # width of the last column of components


def as_text(facts: Facts) -> str:
    """Return all stages; problems are reported by the error that follows."""
    return "\n\n".join(_stage(facts, stage) for stage in facts["stages"])


def _stage(facts: Facts, stage: Facts) -> str:
    mesh = axes(facts["mesh"] or {}) or "does not fit these devices"
    head = f"{stage['name']}: {stage['kind']}, {stage['steps']:,} steps of {stage['batch']:,}"
    done = ", finished" if stage["done"] else ""
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
    state += f"\n{part['integers']}" * bool(part["integers"])
    state += f"\nlr × {part['lr_mult']:g}" * (part["lr_mult"] != 1)
    return (
        part["name"],
        "\n".join(filter(None, (part["kind"], part["size"]))),
        "\n".join(_shapes(stage, part)),
        "—" if count is None else f"{count:,}",
        state,
        "\n".join(_start(part["start"])),
    )


def _shapes(stage: Facts, part: Facts) -> Iterator[str]:
    enters, leaves = part["enters"], part["leaves"]
    if enters is None:
        yield "—"
        return
    if "shape" in enters:
        yield _shape(enters)
    else:  # the language model
        length = {key: leaf["shape"][1] for key, leaf in enters.items() if leaf}
        at_most = "" if stage["tokenizer"]["exact"] else "≤"
        if length["prompt"]:
            yield f"prompt {at_most}{length['prompt']} +"
        if "prefix" in length:
            yield f"prefix {length['prefix']} +"
        yield f"text {length['tokens']} tokens"
    yield f"→ {_shape(leaves)}"


def _shape(leaf: Facts) -> str:
    return f"{_DTYPES.get(leaf['dtype'], '')}[{','.join(map(str, leaf['shape']))}]"


def _start(start: Facts) -> Iterator[str]:
    if not start["found"]:
        yield from (start["from"][-_START:], "(see below)")
        return
    source = start.get("weights", start["from"])
    repo_id, separator, commit = source.rpartition("@")
    if "weights" in start and separator and "/" not in commit:  # a hub id with its commit
        source = f"{repo_id}@{commit[:8]}"
    yield source if len(source) <= _START else "…" + source[1 - _START :]
    if "weights" in start:
        yield f"{quantity(start['files'], 'file')}, {size(start['bytes'])}"
    if start["tensors"] or "weights" in start:
        yield f"{start['tensors']} tensors"
    if start["left_out"]:
        yield f"{len(start['left_out'])} unused"
    if start["fresh"]:
        yield f"{len(start['fresh'])} fresh"


def _totals(facts: Facts, stage: Facts) -> Iterator[str]:
    n, memory = stage["parameters"], stage["memory"]
    share = 100 * n["trained"] / max(n["total"], 1)
    yield (
        f"total {n['total']:,} parameters: {n['trained']:,} trained ({share:.1f} %), "
        f"{n['frozen']:,} frozen"
    )
    kinds = sorted({part["integers"] for part in stage["components"]} - {""})
    integers = "".join(f" and {kind}" for kind in kinds)

    def sizes(m: Facts) -> str:
        return (
            f"{size(m['frozen'])} frozen ({facts['dtype']}{integers}), "
            f"{size(m['trained'])} trained and {size(m['moments'])} moments (float32)"
        )

    yield f"memory {sizes(memory)}, without activations and gradients"
    if "per_device" in memory:
        yield f"per device {sizes(memory['per_device'])}"
    yield _tokenizer(stage["tokenizer"])


def _tokenizer(facts: Facts) -> str:
    name = "tokenizer of the run" if facts["of"] == "run" else f"tokenizer of {facts['of']}"
    if "bos" not in facts:
        return f"{name}: cannot be read"
    vocabulary, rows = f"{facts['vocab_size']:,} ids", ""
    if not facts["exact"]:
        name, vocabulary = f"{name}, not trained yet", f"at most {vocabulary}"
    ids = ", ".join(f"{kind} {_ids(facts[kind])}" for kind in ("bos", "eos", "stop"))
    if facts["rows"] is not None:
        unused = f"{facts['padding_rows']:,} unused"
        rows = f"; {facts['embedding']} has {facts['rows']:,} rows, {unused}"
    return f"{name}: {vocabulary}, {ids}{rows}"


def _ids(tokens: list[Facts]) -> str:
    return " ".join(f"{token['id']} {token['token']}".rstrip() for token in tokens)


def _data(stage: Facts, data: Facts) -> tuple[str, ...]:
    at_most = "" if stage["tokenizer"]["exact"] else "≤"
    examples = "—" if data["examples"] is None else f"{data['examples']:,}"
    parts = []
    if data["frames"]:
        frames, size = data["frames"][:2]
        decode = "" if data["decode"] == "exact" else f", JPEGs {data['decode']}"
        parts.append(f"{frames} × {size} px{decode}")
    if data["prompt"]:
        parts.append(f"prompt {at_most}{data['prompt']}")
    parts.append(f"text {data['text']}, {data['targets']} targets")
    return data["name"], data["task"], "\n".join(data["use"]), examples, ", ".join(parts)
