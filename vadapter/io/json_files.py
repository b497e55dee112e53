"""JSON and JSON lines files: written atomically, read in spite of torn lines."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter.io import buckets, storage

EXPORT_FORMAT = "vadapter-export"  # `format` in the config.json of an exported adapter
COMPONENT_FORMAT = "vadapter"  # `model_type` in the config.json of an exported component
COMPARISON = "compare.json"  # the record of a comparison, in its directory


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file in order, without lines that a kill has torn."""
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
    """Yield the rows of a metrics.jsonl in order."""
    return (row for row in lines(path) if "step" in row)


def history(path: Path) -> list[dict[str, Any]]:
    """Return the rows by step; if a resumed run repeated a step, only its last attempt."""
    last: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in rows(path):
        key = (row["step"], "loss" in row)
        last[key] = last.get(key, {}) | row if key[1] is False else row
    return [last[key] for key in sorted(last)]


def is_export(folder: Path) -> bool:
    """Return whether a folder is an exported adapter, of any version."""
    folder = storage.as_path(folder)
    buckets.require_bucket(folder)
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return values["format"] == EXPORT_FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def is_comparison(folder: Path) -> bool:
    """Return whether a folder is that of a comparison, finished or not."""
    return (storage.as_path(folder) / COMPARISON).is_file()


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically: a reader sees the old file or the new one."""
    storage.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
