"""The report of a run: a table, a convergence plot and a gallery of held-out images."""

from pathlib import Path
from typing import NamedTuple

from vadapter.console import markdown_table
from vadapter.console import table as text_table
from vadapter.io import storage
from vadapter.recipe.schema import Recipe
from vadapter.report.gallery import read_section, write_gallery
from vadapter.report.plots import convergence
from vadapter.report.table import BENCHMARKS, benchmarks, shown, summary


class Report(NamedTuple):
    """The table of a report as text, and its files."""

    text: str
    table: Path  # table.md, with table.txt beside it
    plot: Path | None  # plots/convergence.png; None without adapters
    gallery: Path | None  # gallery.html; None without evaluations

    def files(self) -> list[Path]:
        """Return the files that exist."""
        return [path for path in (self.table, self.plot, self.gallery) if path is not None]


def write_report(workdir: Path, recipe: Recipe) -> Report:
    """Write the report of a run, as far as it is finished, into its directory.

    Images that are no longer available are replaced by the reason in the gallery.
    """
    workdir = storage.as_path(workdir)
    directories = [path for name in recipe.chain for path in sorted(workdir.glob(f"{name}/eval/*"))]
    scored = benchmarks(directories)
    tables = [shown(summary(workdir, recipe)), *([(scored, BENCHMARKS)] if scored else [])]
    text = "\n\n".join(text_table(*table) for table in tables)
    markdown = "\n".join(markdown_table(*table) for table in tables)
    storage.write_bytes(workdir / "table.md", markdown.encode())
    storage.write_bytes(workdir / "table.txt", f"{text}\n".encode())
    plot = convergence(workdir, recipe, workdir / "plots" / "convergence.png")
    sections = []
    for name in sorted(recipe.evals, key=lambda name: recipe.data[recipe.evals[name].data].task):
        paths = {s: workdir / s / "eval" / name / "predictions.jsonl" for s in recipe.chain}
        if evaluated := {stage: path for stage, path in paths.items() if path.is_file()}:
            sections.append(read_section(recipe, name, evaluated))
    path = workdir / "gallery.html"
    gallery = write_gallery(path, recipe.name, sections, text) if sections else None
    return Report(text, workdir / "table.md", plot, gallery)
