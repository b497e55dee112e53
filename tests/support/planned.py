"""What is recorded of plans: the table of scales, and a few programs that must not grow.

With PYTHONPATH=tests in the environment:

python tests/support/planned.py v5e v6e  # plans what planned.json lacks: minutes a cell
python tests/support/planned.py          # writes the table of vadapter/plan/README.md
python tests/support/planned.py gate     # plans the rows of estimated_cycles.json again

The table: every scale of the paper on the smallest slice it fits.
"""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from support.paths import ROOT, TESTS

from vadapter import config
from vadapter.distributed.topology import CHIPS, parse
from vadapter.plan.compiled_stats import ProgramStats
from vadapter.plan.estimate import Setting, plan
from vadapter.recipe.schema import read

RECORD = TESTS / "plan" / "planned.json"
GATE = TESTS / "plan" / "estimated_cycles.json"
MARKS = "<!-- planned -->\n", "<!-- /planned -->\n"
CHIP = tuple(name for name, row in CHIPS.items() if row.kind == "tpu")
SCALES = [(e, llm) for llm in ("1b", "8b") for e in "blg"]
ADAPTERS = {"vadapter": "VAdapter", "resampler": "perceiver", "mlp": "MLP"}
# What is planned: the argument of configs/paper.py -> what the table calls it.
SIZES = {"b": "B", "l": "L", "g": "g", "1b": "1B", "8b": "8B"}
CELLS = {f"stage=1,encoder={e}": ("stage 1", SIZES[e]) for e in "blg"} | {
    f"stage=2,encoder={e},llm={llm},adapter={key}": (name, f"{SIZES[e]} + {SIZES[llm]}")
    for key, name in ADAPTERS.items()
    for e, llm in SCALES
}
KEPT = ("topology", "steps", "batch", "step_ms", "estimated_ms", "versions")
MADE = ("peak", "limit", "cycles", "estimated_ms")  # of the step on each kind of rows


def row(arg: str, plan: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a plan's JSON."""
    of = lambda one: {key: one[key] for key in ("data", "frames", "share")}  # noqa: E731
    made = lambda one: {key: one["train"][key] for key in MADE}  # noqa: E731
    rows = [of(one) | made(one) for one in plan["rows"]]
    return {"arg": arg, "fsdp": plan["mesh"]["fsdp"], **{k: plan[k] for k in KEPT}, "rows": rows}


def make(chip: str) -> None:
    """Plan the cells of a generation that are not there yet."""
    there = {_cell_of(r) for r in rows()}
    for arg in CELLS:
        if (arg, chip) in there:
            continue
        with tempfile.NamedTemporaryFile(suffix=".json") as made:
            config = f"--config={ROOT}/configs/paper.py:{arg}"
            options = [config, f"--topology={chip}", "--decode=0", f"--json={made.name}"]
            subprocess.run([sys.executable, "-m", "vadapter", "plan", *options], check=True)
            add([row(arg, json.loads(Path(made.name).read_text()))])


def gated(row: dict[str, Any]) -> ProgramStats:
    """The train step of a row of the gate: a config on a topology, as it is planned now."""
    values = config.load(f"{ROOT}/{row['config']}")
    config.override(values, row["overrides"])
    made = read(values)
    setting = Setting(parse(row["topology"]), row["batch"], row["frames"], fsdp=row["fsdp"])
    return plan(made, made.chain[-1], setting, decode=0).train


def measured(found: ProgramStats) -> dict[str, Any]:
    """What the gate holds of a step: the compiler's cycles, bytes needed and sent."""
    sent = {kind: sent.bytes for kind, sent in found.collectives.items()}
    return {"cycles": found.cycles, "peak": found.peak, "sent": sent}


def record_gate() -> None:
    """Measure its rows again, for another compiler or a program that is better."""
    jax.config.update("jax_platforms", "cpu")
    gate = json.loads(GATE.read_text())
    made = [row | measured(gated(row)) for row in gate["rows"]]
    lines = ",\n".join(json.dumps(row) for row in made)
    GATE.write_text(f'{{"libtpu": "{version("libtpu")}", "rows": [\n{lines}\n]}}\n')


def rows() -> list[dict[str, Any]]:
    """The record's."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else []


def add(more: list[dict[str, Any]]) -> None:
    """Write the record with more rows, one a line, or others in place of the same cell's."""
    order = list(CELLS)
    cells = {_cell_of(r): r for r in [*rows(), *more]}
    place = lambda cell: (order.index(cell[0]), cell[1])  # noqa: E731
    lines = [json.dumps(cells[cell]) for cell in sorted(cells, key=place)]
    RECORD.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def table() -> str:
    """The README's block, between its marks."""
    cells = {_cell_of(r): r for r in rows()}
    shown = [arg for arg in CELLS if any((arg, chip) in cells for chip in CHIP)]
    lines = [
        f"| | sizes | {' | '.join(CHIP)} |",
        "|---" * (2 + len(CHIP)) + "|",
        *(
            f"| {' | '.join(CELLS[arg])} | "
            + " | ".join(_cell(cells.get((arg, chip))) for chip in CHIP)
            + " |"
            for arg in shown
        ),
    ]
    return "\n".join(lines) + "\n"


def _cell_of(r: dict[str, Any]) -> tuple[str, str]:
    return r["arg"], parse(r["topology"]).chip


def _cell(r: dict[str, Any] | None) -> str:
    """Slice, milliseconds a step, share of the peak and days of the run."""
    if r is None:
        return "—"
    shape = str(parse(r["topology"])).split(":")[1]
    split = f"/{r['fsdp']}" if r["fsdp"] > 1 else ""
    days = r["estimated_ms"] * r["steps"] / 86_400_000
    share = r["step_ms"] / r["estimated_ms"]
    return f"{shape}{split}: {r['estimated_ms']:,.0f} ms, {share:.0%}, {days:.1f} d"


def write() -> None:
    """Put the table into the README."""
    path = ROOT / "vadapter" / "plan" / "README.md"
    before, rest = path.read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    path.write_text(before + MARKS[0] + table() + MARKS[1] + after)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        record_gate() if name == "gate" else make(name)
    write()
