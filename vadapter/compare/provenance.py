"""Where the numbers of a comparison come from: what was equal in all runs, and digests of each."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import vadapter
from vadapter.compare.comparison import Trained
from vadapter.compare.curves import Measured
from vadapter.compare.fairness import digests, trained_facts
from vadapter.compare.record import commit
from vadapter.compare.table import NONE, Table
from vadapter.config import digest, plain
from vadapter.io import storage
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import read_run

_SHORT = 12  # digits of a digest that are shown


class Origin(NamedTuple):
    """Digests of what a run depends on; "" before it is finished."""

    recipe: str  # of config.json, its seed included
    data: str
    protocol: str
    frozen: str
    facts: Mapping[str, Any]  # see `fairness.trained_facts`


def origin(run: Trained, test: Sequence[str]) -> Origin:
    """Return the origin of a run; its protocol includes the evaluations `test`.

    Raises:
      CheckpointError: there is no run, or the record of its stage is corrupt.
    """
    workdir = storage.as_path(run.workdir)
    recipe = read_run(workdir)
    own = digest(plain(recipe))
    if not (workdir / run.stage / DONE).is_file():
        return Origin(own, "", "", "", {})
    facts = trained_facts(recipe, workdir, run.stage, test)
    return Origin(own, **digests(facts), facts=facts)


def equal(measured: Measured, origins: Mapping[Trained, Origin]) -> Table:
    """Return what was equal in all runs, as the first finished one has it."""
    facts = next((each.facts for each in origins.values() if each.facts), {})
    sections: dict[str, Any] = {n: facts.get(n, {}) for n in ("data", "protocol", "frozen")}
    runs = [curve.run for arm in measured.arms for curve in arm.curves]
    seeds = sorted({run.seed for run in runs})
    rows = [
        ("data", _lines(_data(sections["data"]))),
        ("batch", str(sections["data"].get("batch", NONE))),
        ("seeds", ", ".join(map(str, seeds)) or NONE),
        *_one_rate(measured),
        ("order", "a function of seed and step alone: equal for equal seeds"),
        ("frozen", _lines(_frozen(sections["frozen"]))),
        ("protocol", _protocol(sections["protocol"])),
        ("written by", f"vadapter {vadapter.__version__}, commit {commit() or 'unknown'}"),
        ("trained on", _lines(sorted({machine(run.workdir) for run in runs}))),
    ]
    note = (
        "Digests are SHA-256 of content, wherever it is stored; compare.csv has those of each run."
    )
    return Table("Equal in all runs", ("what", "value"), rows, note, kind="words")


def _one_rate(measured: Measured) -> list[tuple[str, str]]:
    """Return the learning rate of a grid that has only one; of others there is a table."""
    rates = {lr for arm in measured.arms for lr in arm.arm.grid}
    return [("learning rate", f"{rate:g}, the only one tried") for rate in rates if len(rates) == 1]


def _lines(items: Any) -> str:
    return "\n".join(items) or NONE


def _data(section: Mapping[str, Any]) -> list[str]:
    weights, content = section.get("data", {}), section.get("content", {})
    return [
        f"{name}, weight {weight:g}, content {str(content.get(name, NONE))[:_SHORT]}"
        for name, weight in weights.items()
    ]


def _frozen(section: Mapping[str, Any]) -> list[str]:
    content = {
        name: value.get("content", NONE) if isinstance(value, Mapping) else value
        for name, value in section.items()
    }
    return [f"{name} {str(value)[:_SHORT]}" for name, value in content.items()]


def _protocol(section: Mapping[str, Any]) -> str:
    names = ", ".join((*section.get("losses", ()), *section.get("evals", ())))
    return f"{names}\ndigest {digest(section)[:_SHORT]}" if section else NONE


def machine(workdir: Path) -> str:
    """Return where a run was trained: speed depends on it, and nothing else should."""
    path = storage.as_path(workdir) / "env.json"
    if not path.is_file():
        return "unknown"
    record = json.loads(path.read_text(encoding="utf-8"))
    kinds = [re.match(r"\w*?(?=[:_]|$)", device) for device in record.get("devices", ())]
    count = Counter(kind[0] for kind in kinds if kind)
    devices = ", ".join(f"{number} × {kind}" for kind, number in count.items())
    return f"{devices or 'unknown devices'}, jax {record.get('jax', 'unknown')}"
