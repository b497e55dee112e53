"""JSON and JSON lines files: written whole or not at all, read in spite of torn lines."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.io import storage


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file in file order; lines torn by a kill are left out."""
    if not path.exists():
        return
    with io.TextIOWrapper(path.open("rb"), encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                yield row


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl in file order."""
    return (row for row in lines(path) if "step" in row)


def history(path: Path) -> list[dict[str, Any]]:
    """The rows by step: where a resumed run repeated a step, its last attempt counts."""
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in rows(path):
        key = (row["step"], "loss" in row)
        last[key] = last.get(key, {}) | row if key[1] is False else row
    return [last[key] for key in sorted(last)]


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees the old file or the new one, never half of it."""
    storage.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
