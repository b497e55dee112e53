"""Results as text and as CSV: a line for every row, number of threads and side."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vadapter import console

Result = Mapping[str, Any]
_TIMES = ("cpu", "wall", "ratio", "ratio_wall")
_SPREAD = ("", "_p10", "_p90")
FIELDS = (
    "row", "threads", "side", *(f"{key}{end}" for key in _TIMES for end in _SPREAD),
    "compile_seconds", "same", "what", "skipped", "error",
)  # fmt: skip


def flat(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Return a record of `FIELDS` for every side of every result; times are in ms."""
    records = []
    for result in results:
        keys = ("row", "threads", "same", "what", "skipped", "error")
        shared = {key: result.get(key, "") for key in keys}
        for side, values in (result.get("sides") or {"": {}}).items():
            numbers = {
                f"{key}{end}": value
                for key in _TIMES
                for end, value in zip(_SPREAD, values.get(key, ()), strict=False)
            }
            compile_seconds = result.get("compile_seconds", {}).get(side, "")
            records.append(shared | {"side": side, "compile_seconds": compile_seconds} | numbers)
    return records


def as_text(results: Iterable[Result]) -> str:
    """Return a table; ratios are the side's time over ours, with their 10th and 90th percentile."""
    lines = []
    for record in flat(results):
        if not record["side"]:
            reason = record["error"] or f"skipped: {record['skipped']}"
            lines.append((record["row"], str(record["threads"]), *[""] * 6, reason))
            continue
        lines.append((
            record["row"], str(record["threads"]), record["side"],
            f"{record['cpu']:.1f}", f"{record['wall']:.1f}", _ratio(record, "ratio"),
            _ratio(record, "ratio_wall"), _seconds(record["compile_seconds"]),
            record["same"] if record["side"] == "ours" else "",
        ))  # fmt: skip
    head = (
        "row", "threads", "side", "CPU ms", "wall ms", "CPU, of ours", "wall, of ours",
        "compile CPU s", "compared",
    )  # fmt: skip
    return console.table(lines, head, right={3, 4, 7})


def _ratio(record: Mapping[str, Any], key: str) -> str:
    if key not in record:
        return ""
    return f"{record[key]:.2f} ({record[f'{key}_p10']:.2f}–{record[f'{key}_p90']:.2f})"


def _seconds(value: Any) -> str:
    return f"{value:.1f}" if value != "" else ""


def write_csv(path: Path, results: Iterable[Result]) -> None:
    """Write the records of `flat` to a file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(flat(results))
