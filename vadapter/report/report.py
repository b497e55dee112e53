"""What a run has come to: a table, a plot of the convergence, a gallery of held-out images."""

import dataclasses
from pathlib import Path

from vadapter.console import markdown_table
from vadapter.console import table as text_table
from vadapter.io import storage
from vadapter.recipe.schema import Recipe
from vadapter.report.gallery import read_section, write_gallery
from vadapter.report.plots import convergence
from vadapter.report.table import BENCHMARKS, HEADER, benchmarks, summary


@dataclasses.dataclass(frozen=True)
class Report:
    """The files of a report, and its table as text.

    Attributes:
      table: table.md, with table.txt beside it.
      plot: plots/convergence.png; None without adapters.
      gallery: gallery.html; None without evaluations.
    """

    text: str
    table: Path
    plot: Path | None
    gallery: Path | None

    def files(self) -> list[Path]:
        """Those that there are."""
        return [path for path in (self.table, self.plot, self.gallery) if path is not None]


def write_report(workdir: Path, recipe: Recipe) -> Report:
    """Writes the report of a run into its directory, from what is finished so far.

    Images that are no longer there are left out of the gallery, with the reason in their place.
    """
    workdir = storage.as_path(workdir)
    rows = summary(workdir, recipe)
    text, page = text_table(rows, HEADER), markdown_table(rows, HEADER)
    directories = [path for name in recipe.chain for path in sorted(workdir.glob(f"{name}/eval/*"))]
    if scored := benchmarks(directories):
        text += f"\n\n{text_table(scored, BENCHMARKS)}"
        page += f"\n{markdown_table(scored, BENCHMARKS)}"
    storage.write_bytes(workdir / "table.md", page.encode())
    storage.write_bytes(workdir / "table.txt", f"{text}\n".encode())
    plot = convergence(workdir, recipe, workdir / "plots" / "convergence.png")
    sections = []
    for name in sorted(recipe.evals, key=lambda name: recipe.data[recipe.evals[name].data].task):
        paths = {s: workdir / s / "eval" / name / "predictions.jsonl" for s in recipe.chain}
        there = {stage: path for stage, path in paths.items() if path.is_file()}
        if there:
            sections.append(read_section(recipe, name, there))
    gallery = None
    if sections:
        gallery = write_gallery(workdir / "gallery.html", recipe.name, sections, text)
    return Report(text, workdir / "table.md", plot, gallery)
