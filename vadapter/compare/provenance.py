"""Where the numbers of a comparison come from: what was equal in all runs, and digests of each."""

import json
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
    origins_done = (each for each in origins.values() if each.facts)
    facts: Mapping[str, Any] = next((each.facts for each in origins_done), {})
    sections = {name: facts.get(name, {}) for name in ("data", "protocol", "frozen")}
    runs = [curve.run for arm in measured.arms for curve in arm.curves]
    seeds = sorted({run.seed for run in runs})
    rows = [
        ("data", _lines(_data(sections["data"]))),
        ("batch", str(sections["data"].get("batch", NONE))),
        ("seeds", ", ".join(map(str, seeds)) or NONE),
        ("order of the data", "a function of seed and step alone, so the same in all arms"),
        ("frozen", _lines(_frozen(sections["frozen"]))),
        ("protocol", _protocol(sections["protocol"])),
        ("made with", f"vadapter {vadapter.__version__}, commit {(commit() or 'unknown')}"),
        ("machine", _lines(sorted({_machine(run.workdir) for run in runs}))),
    ]
    note = (
        "Digests are SHA-256 of content, wherever it is stored; compare.csv has those of each run."
    )
    return Table("Equal in all runs", ("what", "value"), rows, note, kind="words")


def _lines(items: Any) -> str:
    return "\n".join(items) or NONE


def _data(section: Mapping[str, Any]) -> list[str]:
    weights, content = section.get("data", {}), section.get("content", {})
    return [
        f"{name}, weight {weight:g}, content {str(content.get(name, NONE))[:_SHORT]}"
        for name, weight in weights.items()
    ]


def _frozen(section: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, value in section.items():
        if isinstance(value, Mapping):
            lines.append(f"{name} {str(value.get('content', NONE))[:_SHORT]}")
        else:
            lines.append(f"{name} {str(value)[:_SHORT]}")
    return lines


def _protocol(section: Mapping[str, Any]) -> str:
    names = ", ".join((*section.get("losses", ()), *section.get("evals", ())))
    return f"{names}\ndigest {digest(section)[:_SHORT]}" if section else NONE


def _machine(workdir: Path) -> str:
    """Return where a run was trained: speed depends on it, and nothing else should."""
    path = storage.as_path(workdir) / "env.json"
    if not path.is_file():
        return "unknown"
    record = json.loads(path.read_text(encoding="utf-8"))
    devices = record.get("devices", ())
    return (
        f"jax {record.get('jax', NONE)}, {len(devices)} × {str(devices[0]).split(':')[0]}"
        if (devices)
        else "unknown"
    )
