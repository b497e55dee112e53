"""The files of a comparison: compare.html, compare.csv, runs.csv, table.md and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from vadapter.compare import plots
from vadapter.compare.comparison import Comparison
from vadapter.compare.csv_file import COLUMNS, csv_text, runs_text
from vadapter.compare.curves import measure
from vadapter.compare.final_scores import evaluations
from vadapter.compare.page import render
from vadapter.compare.provenance import equal, origin
from vadapter.compare.summary import Finding, findings
from vadapter.compare.table import Table, tables
from vadapter.console import markdown_table, wrap
from vadapter.console import table as text_table
from vadapter.io import storage


class Written(NamedTuple):
    """The findings and tables of a comparison as text, and its files."""

    text: str
    page: Path  # compare.html
    csv: Path  # compare.csv
    runs: Path  # runs.csv
    table: Path  # table.md
    plots: tuple[Path, ...]  # plots/score.png, plots/loss.png: as far as they were measured

    def files(self) -> list[Path]:
        """Return all files."""
        return [self.page, self.csv, self.runs, self.table, *self.plots]


def write_comparison(comparison: Comparison, folder: Path) -> Written:
    """Write what a comparison shows so far into a folder; its runs may still train.

    Raises:
      CheckpointError: a run cannot be read.
      ConfigError: the recipe of a run is not valid.
      DataError: two runs were evaluated on different items.
    """
    folder = storage.as_path(folder)
    measured = measure(comparison)
    scored = evaluations(measured)
    runs = [curve.run for arm in measured.arms for curve in arm.curves]
    origins = {run: origin(run, comparison.test) for run in runs}
    found, shown = findings(measured, scored), [
        *tables(measured, scored), equal(measured, origins)
    ]  # fmt: skip
    columns = {name: column.meaning for name, column in COLUMNS.items()}
    files = {
        "compare.html": render(measured, found, shown, columns).encode("utf-8", "replace"),
        "compare.csv": csv_text(measured, origins).encode(),
        "runs.csv": runs_text(measured).encode(),
        "table.md": _markdown(comparison.name, found, shown).encode(),
    }
    for criterion in measured.criteria:
        name = "score" if criterion.higher else "loss"
        files[f"plots/{name}.png"] = plots.png(measured, criterion)
    for name, content in files.items():
        storage.write_bytes(folder / name, content)
    page, csv, runs, table, *images = (folder / name for name in files)
    return Written(_text(found, shown), page, csv, runs, table, tuple(images))


def _text(found: Mapping[str, Sequence[Finding]], shown: Sequence[Table]) -> str:
    parts = []
    for heading, group in found.items():
        lines = [heading] if group else []
        for each in group:
            lines += wrap(each.text, "  ", "  ")
            lines += (line for arm in each.arms for line in wrap(arm, "    ", "      "))
        parts += ["\n".join(lines)] if lines else []
    for table in shown:
        rows = text_table(table.rows, table.header)
        parts.append("\n".join([table.title, rows, *wrap(table.note, subsequent="")]))
    return "\n\n".join(parts)


def _markdown(name: str, found: Mapping[str, Sequence[Finding]], shown: Sequence[Table]) -> str:
    lines = [f"# {name}"]
    for heading, group in found.items():
        lines += ["", f"## {heading}", ""] if group else []
        for each in group:
            lines += [f"- {each.text}", *(f"  - {arm}" for arm in each.arms)]
    for table in shown:
        lines += ["", f"## {table.title}", "", markdown_table(table.rows, table.header), table.note]
    return "\n".join(lines) + "\n"
