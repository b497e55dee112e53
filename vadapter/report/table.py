"""A run as a table, a row a stage: steps, losses, scores, seconds."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vadapter.io import storage
from vadapter.io.json_files import history, lines, rows
from vadapter.metrics.blind_baselines import constant_caption, majority_answer
from vadapter.metrics.scoring import METRICS
from vadapter.recipe.schema import Recipe, StageConfig
from vadapter.stages.initialization import DONE

HEADER = (
    "stage",
    "kind",
    "steps",
    "training\nloss",
    "held-out loss\nright / wrong / mean image",
    "CIDEr",
    "answers\nright, %",
    "seconds",
)
KINDS = (("cider", "caption"), ("accuracy", "question"))  # metric of each task


def summary(workdir: Path, recipe: Recipe) -> list[tuple[str, ...]]:
    """One row of cells a stage of the chain, in the columns of `HEADER`; — is not measured.

    Losses are nats a token. The held-out loss is that with the right image, with another one, and
    with the mean of several: only where the first is the lowest does the image help. A last row
    says what scores without any image, see `evals.blind`.
    """
    stages = [_row(storage.as_path(workdir) / name, name, recipe) for name in recipe.chain]
    return stages + _blind(storage.as_path(workdir), recipe)


def _blind(workdir: Path, recipe: Recipe) -> list[tuple[str, ...]]:
    """The row of the blind yardsticks, over what the stages were evaluated on; none without."""
    scores: dict[str, float] = {}
    for name in recipe.evals:
        paths = [workdir / s / "eval" / name / "predictions.jsonl" for s in recipe.chain]
        found = [items for path in paths if (items := list(lines(path)))]
        if not found:
            continue
        if recipe.data[recipe.evals[name].data].task == "question":
            pairs = [(item["question"], item["answer"]) for item in found[-1]]
            scores[f"{name}/accuracy"] = majority_answer(pairs)
        elif len(found[-1]) > 1:
            references = [item["references"] for item in found[-1]]
            scores[f"{name}/cider"] = constant_caption(references)
    if not scores:
        return []
    cells = [_scores(recipe, tuple(recipe.evals), scores, *kind) for kind in KINDS]
    return [("blind", "—", "—", "—", "—", *cells, "—")]


def _row(directory: Path, name: str, recipe: Recipe) -> tuple[str, ...]:
    stage = recipe.stages[name]
    log = history(directory / "metrics.jsonl")
    done = finished(directory)
    losses = [row["loss"] for row in log if "loss" in row]
    reached = max((row["step"] for row in log), default=0)
    steps = str(stage.steps) if done else f"{reached} of {stage.steps}"
    scores = done.get("scores", {}) or {k: v for row in log for k, v in row.items() if "/" in k}
    return (
        name,
        stage.kind,
        steps,
        f"{losses[-1]:.3f}" if losses else "—",
        _losses(stage, scores),
        *(_scores(recipe, stage.evals, scores, *kind) for kind in KINDS),
        f"{seconds(directory):.0f}" if log else "—",
    )


def finished(directory: Path) -> dict[str, Any]:
    """The record of a finished stage; empty if it is not finished."""
    path = directory / DONE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def seconds(directory: Path) -> float:
    """The time that a stage took, its interrupted attempts included."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in rows(directory / "metrics.jsonl"):
        attempts.setdefault(row.get("attempt", 1), []).append(row)
    spent = {k: v[-1]["time"] - v[0]["time"] + _before(v[0]) for k, v in attempts.items()}
    if (done := finished(directory)) and spent:
        spent[max(spent)] = done["seconds"]
    return sum(spent.values())


def _before(row: dict[str, Any]) -> float:
    """What the first step took: it was over when its row was written."""
    return row.get("step_ms", 0.0) / 1000 + row.get("compile_s", 0.0)


def _losses(stage: StageConfig, scores: dict[str, float]) -> str:
    named = []
    for name in stage.loss:
        keys = (f"{name}/loss", f"{name}/loss_wrong", f"{name}/loss_mean")
        values = [f"{scores[key]:.3f}" for key in keys if key in scores]
        if values:
            named.append((name, " / ".join(values)))
    return _named(named, len(stage.loss) > 1)


def _scores(
    recipe: Recipe, evals: tuple[str, ...], scores: dict[str, float], metric: str, task: str
) -> str:
    same = [n for n, spec in recipe.evals.items() if recipe.data[spec.data].task == task]
    keys = {name: f"{name}/{metric}" for name in evals}
    named = [(n, f"{100 * scores[key]:.1f}") for n, key in keys.items() if key in scores]
    return _named(named, len(same) > 1)


def _named(named: list[tuple[str, str]], several: bool) -> str:
    return "\n".join(f"{n} {text}" if several else text for n, text in named) or "—"


BENCHMARKS = ("benchmark", "stage", "metric", "score", "n", "protocol", "set")


def benchmarks(directories: Iterable[Path]) -> list[tuple[str, ...]]:
    """Results of benchmarks in the columns of `BENCHMARKS`; other evaluations are left out.

    Args:
      directories: of evaluations, with a score.json each.
    """
    table = []
    for path in (storage.as_path(directory) / "score.json" for directory in directories):
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "benchmark" not in record:
            continue
        protocol, scores = record["protocol"], record["scores"]
        metric = METRICS[protocol["metric"]].primary
        cells = (
            record["benchmark"],
            record["stage"],
            metric if metric == protocol["metric"] else f"{metric}, {protocol['metric']}",
            f"{100 * scores[metric]:.1f}" if metric in scores else "no answers",
            str(int(scores["n"])),
            f"{protocol['name']} {record['protocol_digest'][:8]}",
            "official" if record["official"] else f"NOT OFFICIAL: {record['note']}",
        )
        table.append(cells)
    return table
