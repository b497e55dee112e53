"""Write docs/results.md and its figures from the tables in this folder.

python docs/results/make.py

To add a comparison, copy its compare.csv to NAME.csv and its runs.csv to NAME_runs.csv, and
describe it in comparisons.toml. The paper's numbers are in paper.csv, each with its table.
"""

import argparse
import csv
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import rc_context

from vadapter.compare.csv_file import curves_of
from vadapter.compare.curves import Criterion, Measured, Spread, reached
from vadapter.compare.plots import Panel, figure
from vadapter.compare.table import (
    best,
    formatter,
    nats,
    points,
    ratios,
    spread,
    times,
    title,
    to_baseline,
)
from vadapter.console import duration, markdown_table

HERE = Path(__file__).resolve().parent
PAGE = "results.md"
VADAPTER = "vadapter"
STARTS = ("table3_random", "table3_text", "table3_stage1")  # the paper's Table 3
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "vadapter", "font.size": 9}
NONE = "–"

HEAD = """# Results

What the paper found, and what is found here. `python docs/results/make.py` writes this page and its
figures from the files in [docs/results](results): of each comparison the `compare.csv` and the
`runs.csv` that `vadapter compare` wrote, and `paper.csv`, the numbers of
[the paper](https://arxiv.org/abs/2402.10896), each with its table. Validation chose; test splits
were used once. Values are means over seeds, with minimum and maximum in parentheses. Cost is the
time in training steps of all arms and seeds, without what trained the frozen parts.
"""

Row = dict[str, str]


class Compared(NamedTuple):
    """A comparison: its entry in comparisons.toml, its curves and its runs, where it has them."""

    entry: dict[str, Any]
    measured: Measured | None
    runs: list[Row]

    @property
    def cost(self) -> str:
        """The time in training steps of all runs."""
        return cost(self.runs, self.entry["machine"])


def cost(runs: Sequence[Row], machine: str) -> str:
    """Return the time in training steps of runs, and where they were trained."""
    column = "seconds_with_stage_1"
    known = [float(run[column]) for run in runs if run.get(column)]
    return f"{duration(sum(known))}, {machine}" if known else f"not recorded, {machine}"


def read_table(path: Path) -> list[Row]:
    """Return the rows of a CSV file; none without a file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_comparisons(folder: Path) -> dict[str, Compared]:
    """Return the comparisons of comparisons.toml by name, in its order."""
    entries = tomllib.loads((folder / "comparisons.toml").read_text(encoding="utf-8"))
    found = {}
    for entry in entries["comparison"]:
        name = entry["name"]
        path = folder / f"{name}.csv"
        keys = {key: entry[key] for key in ("baseline", "loss", "score")}
        measured = curves_of(path.read_text(), name=name, **keys) if path.is_file() else None
        found[name] = Compared(entry, measured, read_table(folder / f"{name}_runs.csv"))
        if measured is None and not found[name].runs:
            raise FileNotFoundError(f"{path} and {name}_runs.csv: a comparison needs one of them")
    return found


class Matrix(NamedTuple):
    """The same arms in several comparisons: its entry in comparisons.toml, and the runs of each."""

    entry: dict[str, Any]
    runs: dict[str, list[Row]]


def read_matrices(folder: Path) -> list[Matrix]:
    """Return the matrices of comparisons.toml, in its order."""
    entries = tomllib.loads((folder / "comparisons.toml").read_text(encoding="utf-8"))
    found = []
    for entry in entries.get("matrix", ()):
        runs = {value: read_table(folder / file) for value, file in entry["runs"].items()}
        if missing := [file for value, file in entry["runs"].items() if not runs[value]]:
            raise FileNotFoundError(f"{folder}: no {', '.join(missing)} for {entry['title']!r}")
        found.append(Matrix(entry, runs))
    return found


# -- the summary ---------------------------------------------------------------------------------


class Claim(NamedTuple):
    """A row of the summary.

    Attributes:
      paper: what the paper found, from the rows of its table.
      ours: what a comparison found, a line per criterion; `weaker` is its pair, if it names one.
    """

    question: str
    table: str
    paper: Callable[[list[Row]], str]
    ours: Callable[[Measured, Measured | None], Iterator[str]]


def _arms(rows: list[Row], setting: str) -> dict[str, Row]:
    return {row["arm"]: row for row in rows if row["setting"] == setting}


def _paper_speed(rows: list[Row]) -> str:
    arms = _arms(rows, "ViT-L")
    own, baseline = (int(arms[name]["steps"]) for name in (VADAPTER, "perceiver"))
    return f"after {own:,} of {baseline:,} steps: {own / baseline:.2f}×"


def _paper_end(rows: list[Row]) -> str:
    arms = _arms(rows, "ViT-L")
    return f"COCO CIDEr {arms['perceiver']['coco_cider']} → {arms[VADAPTER]['coco_cider']} (ViT-L)"


def _paper_start(rows: list[Row]) -> str:
    arms = _arms(rows, "ViT-B")
    values = (f"{name.partition('_')[2]} {arms[name]['coco_cider']}" for name in STARTS)
    return f"COCO CIDEr {', '.join(values)}"


def _paper_encoder(rows: list[Row]) -> str:
    small, large = (_arms(rows, setting) for setting in ("ViT-B", "ViT-L"))
    gain = lambda arm: float(large[arm]["coco_cider"]) - float(small[arm]["coco_cider"])  # noqa: E731
    return f"COCO CIDEr perceiver +{gain('perceiver'):.1f}, VAdapter +{gain(VADAPTER):.1f}"


def _speed(measured: Measured, _: Measured | None) -> Iterator[str]:
    (arm,) = (arm for arm in measured.arms if arm.name == VADAPTER)
    for criterion in measured.criteria:
        seeds = reached(measured, arm, criterion)
        did = [each for each in seeds if each.point]
        part = f" in {len(did)} of {len(seeds)} seeds"
        ratio, counted = (ratios(did, "steps", count) for count in (False, True))
        said = "never"
        if ratio and counted:
            said = f"{times(ratio)}{part}, with stage 1 {times(counted)}"
        yield f"{title(criterion)}: {said}"


def _end(measured: Measured, _: Measured | None) -> Iterator[str]:
    for criterion in measured.criteria:
        arms = (measured.comparison.baseline, VADAPTER)
        yield f"{title(criterion)}: {' → '.join(_best(measured, arm, criterion) for arm in arms)}"


def _start(measured: Measured, _: Measured | None) -> Iterator[str]:
    named = {arm.name for arm in measured.arms}
    arms = {n.partition("_")[2]: n if n in named else VADAPTER for n in STARTS}  # stage1: the same
    for criterion in measured.criteria:
        values = (f"{start} {_best(measured, arm, criterion)}" for start, arm in arms.items())
        yield f"{title(criterion)}: {', '.join(values)}"


def _encoder(measured: Measured, weaker: Measured | None) -> Iterator[str]:
    assert weaker is not None, "the claim encoder needs the key weaker"
    for criterion in measured.criteria:
        gains = []
        for name in (measured.comparison.baseline, VADAPTER):
            own, other = (_spread(each, name, criterion) for each in (measured, weaker))
            scale = 100 if criterion.higher else -1
            gains.append(f"{name} {scale * (own.mean - other.mean):+.3g}")
        yield f"{title(criterion)}, better by: {', '.join(gains)}"


def _spread(measured: Measured, name: str, criterion: Criterion) -> Spread:
    (arm,) = (arm for arm in measured.arms if arm.name == name)
    found = best(arm, criterion)
    assert found is not None, f"{name} has not measured {criterion.key}"
    return found


def _best(measured: Measured, name: str, criterion: Criterion) -> str:
    return spread(_spread(measured, name, criterion), formatter(criterion), " ")


CLAIMS = {
    "speed": Claim("Steps to the perceiver's best", "2", _paper_speed, _speed),
    "end": Claim("Best of perceiver → VAdapter", "2", _paper_end, _end),
    "start": Claim("Start of the tiny LM", "3", _paper_start, _start),
    "encoder": Claim("Gain from a better encoder", "2", _paper_encoder, _encoder),
}


def summary(comparisons: dict[str, Compared], paper: list[Row]) -> str:
    """Return the table of claims: the paper's finding, ours, the command, what it cost."""
    rows = []
    for name, claim in CLAIMS.items():
        said = claim.paper([row for row in paper if row["table"] == claim.table])
        first = (claim.question, f"{said} (Table {claim.table})")
        found = [each for each in comparisons.values() if name in each.entry["claims"]]
        for each in found:
            assert each.measured is not None, f"{each.entry['name']}: a claim needs its compare.csv"
            weaker = comparisons.get(each.entry.get("weaker", ""))
            ours = "\n".join(claim.ours(each.measured, weaker and weaker.measured))
            link = f"[{each.entry['title']}](#{anchor(each.entry['title'])})"
            rows.append((*first, f"{link}\n{ours}", f"`{each.entry['command']}`", each.cost))
        if not found:
            rows.append((*first, "not run", NONE, NONE))
    return markdown_table(rows, ("what", "paper", "ours", "command", "cost"))


def anchor(heading: str) -> str:
    """Return the anchor of a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


# -- a comparison --------------------------------------------------------------------------------


def section(compared: Compared, paper: list[Row], out: Path) -> str:
    """Return the section of a comparison, and draw its figure into `out`."""
    entry, name = compared.entry, compared.entry["name"]
    parts = [f"## {entry['title']}", f"```bash\n{entry['command']}\n```"]
    parts.append(f"{entry['date']}; {compared.cost}. {entry.get('note', '')}".strip())
    if compared.measured is not None:
        draw(compared.measured, out / f"{name}.svg")
        parts.append(f"![{entry['title']}: validation against steps](results/{name}.svg)")
        shown = [to_baseline(compared.measured, each) for each in compared.measured.criteria]
        for table in shown:
            parts += [f"**{table.title}**", markdown_table(table.rows, table.header)]
        parts += dict.fromkeys(table.note for table in shown)
    if compared.runs:
        rows = [row for row in paper if [row["table"], row["setting"]] == entry.get("paper")]
        parts.append(runs_table(compared.runs, entry["show"], rows))
    has = {f"{name}.csv": compared.measured, f"{name}_runs.csv": compared.runs}
    files = (file for file, content in has.items() if content)
    parts.append("Data: " + ", ".join(f"[{file}](results/{file})" for file in files) + ".")
    return "\n\n".join(part.strip("\n") for part in parts)


def runs_table(runs: Sequence[Row], show: Sequence[str], paper: Sequence[Row]) -> str:
    """Return a row per arm: what its runs ended with, and what the paper has for it."""
    own = {row["arm"]: row for row in paper}
    columns = {
        f"paper, Table {paper[0]['table']}, {paper[0]['setting']}\n{title}": key
        for key, title in (("coco_cider", "COCO CIDEr"), ("vqav2", "VQAv2"))
        if any(row[key] for row in paper)
    } if paper else {}  # fmt: skip
    rows = []
    for arm in dict.fromkeys(run["arm"] for run in runs):
        seeds = [run for run in runs if run["arm"] == arm]
        values = (_value(seeds, column) for column in show)
        theirs = (own.get(arm, {}).get(key) or NONE for key in columns.values())
        rows.append((f"`{arm}`", str(len(seeds)), seeds[0]["steps"], *values, *theirs))
    return markdown_table(rows, ("arm", "seeds", "steps", *map(_heading, show), *columns))


def _heading(column: str) -> str:
    name, _, metric = column.rpartition("/")
    unit = "nats" if metric.startswith("loss") else "CIDEr × 100" if metric == "cider" else "%"
    words = {"cider": "", "captions_right": "right captions, ", "accuracy": "correct answers, "}
    return f"{name}\n{words.get(metric, f'{metric}, ')}{unit}"


def _value(seeds: Sequence[Row], column: str) -> str:
    """Return a value over seeds: losses in nats, all else in percent."""
    found = Spread.of(float(run[column]) for run in seeds if run.get(column))
    loss = column.rpartition("/")[2].startswith("loss")
    return spread(found, nats if loss else points) if found else NONE


def matrix(found: Matrix) -> str:
    """Return the section of a matrix: for each value that it shows, arms by comparisons."""
    entry, runs = found
    parts = [f"## {entry['title']}", f"```bash\n{entry['command']}\n```"]
    everything = [run for rows in runs.values() for run in rows]
    parts.append(f"{entry['date']}; {cost(everything, entry['machine'])}. {entry['note']}")
    for column in entry["show"]:
        rows = []
        for arm in dict.fromkeys(run["arm"] for run in everything):
            own = [[run for run in rows if run["arm"] == arm] for rows in runs.values()]
            rows.append((f"`{arm}`", *(_value(seeds, column) for seeds in own)))
        parts.append(f"**{_heading(column).replace(chr(10), ' ')}, by {entry['across']}**")
        parts.append(markdown_table(rows, ("arm", *runs)))
    files = (f"[{file}](results/{file})" for file in entry["runs"].values())
    parts.append(f"Data: {', '.join(files)}.")
    return "\n\n".join(part.strip("\n") for part in parts)


def draw(measured: Measured, path: Path) -> None:
    """Draw every criterion against steps, without and with stage 1, the same bytes on every run."""
    staged = any(arm.staged for arm in measured.arms)
    rows = [
        [Panel(criterion, axis, counted) for axis, counted in _axes(staged)]
        for criterion in measured.criteria
    ]
    with rc_context(STYLE):
        drawn = figure(measured, rows)
        drawn.savefig(path, format="svg", metadata={"Date": None})


def _axes(staged: bool) -> list[tuple[str, bool]]:
    return [("steps", False), *([("steps", True)] if staged else []), ("flops", staged)]


def write(folder: Path, out: Path) -> None:
    """Write the page and its figures of the tables in `folder` to `out`."""
    figures = out / "results"
    figures.mkdir(parents=True, exist_ok=True)
    comparisons, paper = read_comparisons(folder), read_table(folder / "paper.csv")
    parts = [HEAD.strip(), summary(comparisons, paper).strip()]
    parts += [section(each, paper, figures) for each in comparisons.values()]
    parts += [matrix(each) for each in read_matrices(folder)]
    (out / PAGE).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    """Write the page beside this folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE.parent, metavar="DIR", help="where to")
    write(HERE, parser.parse_args().out)


if __name__ == "__main__":
    main()
