"""Tables of a run: one row per stage, or one per benchmark result."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vadapter.io import storage
from vadapter.io.json_files import history, lines, rows
from vadapter.metrics import judgments
from vadapter.metrics.scoring import METRICS, Result, sample_of
from vadapter.recipe.schema import Recipe, StageConfig
from vadapter.stages.initialization import DONE

HEADER = (
    "stage", "kind", "steps", "training\nloss", "held-out loss\nright / wrong /\nmean image",
    "CIDEr", "correct\nanswers, %", "captions\nright, %", "seconds",
)  # fmt: skip
BENCHMARKS = ("benchmark", "stage", "metric", "score", "n", "protocol", "set")
_COUNTS = {"n": "{:.0f}", "facts_per_caption": "{:.2f}"}  # scores that are no shares: their format
_METRICS = (  # (metric, task) of three columns
    ("cider", "caption"), ("accuracy", "question"), (judgments.RIGHT, "caption"),
)  # fmt: skip
_OPTIONAL = {HEADER.index("captions\nright, %")}  # columns that are left out if they are empty


def summary(workdir: Path, recipe: Recipe) -> list[tuple[str, ...]]:
    """Return one row per stage of the chain, in the columns of `HEADER`; — is not measured.

    Losses are in nats per token. The held-out loss is given with the right image, with a wrong one
    and with the mean of several: the image helps only if the first is the lowest. The last row has
    the scores of baselines that see no image, see `metrics.blind_baselines`.
    """
    workdir = storage.as_path(workdir)
    stages = [_stage_row(workdir / name, name, recipe) for name in recipe.chain]
    return stages + _blind_rows(workdir, recipe)


def shown(table: Sequence[tuple[str, ...]]) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return the rows of `summary` and their header, without the optional columns that are empty.

    Captions are judged for generated scenes alone.
    """
    empty = {column for column in _OPTIONAL if {row[column] for row in table} <= {"—"}}
    rows = [tuple(x for i, x in enumerate(row) if i not in empty) for row in (*table, HEADER)]
    return rows[:-1], rows[-1]


def _blind_rows(workdir: Path, recipe: Recipe) -> list[tuple[str, ...]]:
    """Return the row of the blind baselines, on the items that the stages were evaluated on."""
    from vadapter.metrics.blind_baselines import blind_scores

    records: dict[str, dict[str, Any]] = {}
    for name in recipe.evals:
        paths = [workdir / s / "eval" / name / "predictions.jsonl" for s in reversed(recipe.chain)]
        items = next(filter(None, (list(lines(path)) for path in paths)), [])
        question = recipe.data[recipe.evals[name].data].task == "question"
        metric = "accuracy" if question else "cider"
        if found := blind_scores(items, metric):
            records[name] = _of_items(metric, items, found)
    if not records:
        return []
    cells = [_scores(recipe, records, *column) for column in _METRICS]
    return [("blind", "—", "—", "—", "—", *cells, "—")]


def _of_items(
    metric: str, items: Sequence[Mapping[str, Any]], scores: Sequence[float]
) -> dict[str, Any]:
    """Return the mean of the items' scores and its interval, as in score.json."""
    sample = sample_of([{**item, "score": s} for item, s in zip(items, scores, strict=True)])
    return Result({metric: sample.value}, [], {metric: sample}).summary


def _stage_row(directory: Path, name: str, recipe: Recipe) -> tuple[str, ...]:
    stage = recipe.stages[name]
    log = history(directory / "metrics.jsonl")
    record = _read(directory / DONE)
    losses = [row["loss"] for row in log if "loss" in row]
    reached = max((row["step"] for row in log), default=0)
    scores = record.get("scores", {}) or {k: v for row in log for k, v in row.items() if "/" in k}
    records = {eval_: _record(directory / "eval" / eval_, scores) for eval_ in stage.evals}
    return (
        name,
        stage.kind,
        str(stage.steps) if record else f"{reached} of {stage.steps}",
        f"{losses[-1]:.3f}" if losses else "—",
        _losses(stage, scores),
        *(_scores(recipe, records, *column) for column in _METRICS),
        f"{seconds(directory):.0f}" if log else "—",
    )


def _read(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty without a file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def seconds(directory: Path) -> float:
    """Return the time that a stage took, including interrupted attempts."""
    attempts: dict[int, list[dict[str, Any]]] = {}
    for row in rows(directory / "metrics.jsonl"):
        attempts.setdefault(row.get("attempt", 1), []).append(row)
    # A row is written after its step, so the first one comes after compilation and a step.
    spent = {
        attempt: log[-1]["time"]
        - log[0]["time"]
        + log[0].get("step_ms", 0.0) / 1000
        + log[0].get("compile_s", 0.0)
        for attempt, log in attempts.items()
    }
    if (record := _read(directory / DONE)) and spent:
        spent[max(spent)] = record["seconds"]
    return sum(spent.values())


def _losses(stage: StageConfig, scores: Mapping[str, float]) -> str:
    cells = {}
    for name in stage.loss:
        keys = (f"{name}/{key}" for key in ("loss", "loss_wrong", "loss_mean"))
        if values := [f"{scores[key]:.3f}" for key in keys if key in scores]:
            cells[name] = " / ".join(values)
    return _cell(cells, len(stage.loss) > 1)


def _record(folder: Path, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the stage's scores in an evaluation, with the intervals of its score.json.

    An interval is left out if its score is not the stage's: since the stage ended, the evaluation
    may have been repeated on other data or devices.
    """
    prefix = f"{folder.name}/"
    own = {k.removeprefix(prefix): v for k, v in scores.items() if k.startswith(prefix)}
    saved = _read(folder / "score.json")
    intervals = saved.get("intervals", {}).items()
    same = {name: ends for name, ends in intervals if saved["scores"][name] == own.get(name)}
    return {"scores": own, "intervals": same}


def _scores(
    recipe: Recipe, records: Mapping[str, Mapping[str, Any]], metric: str, task: str
) -> str:
    """Return a cell with a score per evaluation; `records` are as in their score.json."""
    same_task = [spec for spec in recipe.evals.values() if recipe.data[spec.data].task == task]
    scored = {name: record for name, record in records.items() if metric in record["scores"]}
    cells = {name: _score(record, metric) for name, record in scored.items()}
    return _cell(cells, len(same_task) > 1)


def _cell(values: Mapping[str, str], named: bool) -> str:
    """Return a cell with a line per value, after its name if there could be several."""
    return "\n".join(f"{n} {value}" if named else value for n, value in values.items()) or "—"


def benchmarks(directories: Iterable[Path]) -> list[tuple[str, ...]]:
    """Return benchmark results in the columns of `BENCHMARKS`, from the score.json of evaluations.

    Evaluations of other kinds are left out.
    """
    table = []
    for directory in directories:
        record = _read(storage.as_path(directory) / "score.json")
        if "benchmark" not in record:
            continue
        protocol, scores = record["protocol"], record["scores"]
        metric = METRICS[protocol["metric"]].primary
        cells = (
            record["benchmark"],
            record["stage"],
            metric if metric == protocol["metric"] else f"{metric}, {protocol['metric']}",
            _score(record, metric) if metric in scores else "no public answers",
            str(int(scores["n"])),
            f"{protocol['name']} {record['protocol_digest'][:8]}",
            "official" if record["official"] else f"NOT OFFICIAL: {record['note']}",
        )
        table.append(cells)
    return table


def score_table(
    results: Mapping[str, Mapping[str, Any]],
) -> tuple[list[tuple[str, ...]], tuple[str, ...]]:
    """Return one row per score, `n` first, and the header with one column per evaluation.

    Args:
      results: by evaluation, the content of score.json.
    """
    names = dict.fromkeys(key for record in results.values() for key in record["scores"])
    rows = sorted(names, key=lambda name: name != "n")
    cells = [(row, *(_score(record, row) for record in results.values())) for row in rows]
    return cells, ("score", *results)


def _score(record: Mapping[str, Any], name: str) -> str:
    """Return a score of the content of score.json in percent with its interval; counts as such."""
    if (value := record["scores"].get(name)) is None:
        return "—"
    if name in _COUNTS:
        return _COUNTS[name].format(value)
    return with_interval(value, record.get("intervals", {}).get(name))


def with_interval(score: float, interval: Sequence[float] | None) -> str:
    """Return a score in percent with its interval, if it has one: `55.1 [51.9, 58.4]`."""
    ends = "" if interval is None else f" [{', '.join(f'{100 * end:.1f}' for end in interval)}]"
    return f"{100 * score:.1f}{ends}"
