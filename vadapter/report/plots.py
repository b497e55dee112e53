"""Convergence plot: how fast the adapters of a run train, side by side."""

import io
from pathlib import Path
from typing import Any

import numpy as np

from vadapter.io import storage
from vadapter.io.json_files import history
from vadapter.recipe.schema import Recipe

# Distinguishable with every kind of color vision (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def convergence(workdir: Path, recipe: Recipe, path: Path) -> Path | None:
    """Draw loss and CIDEr against steps as PNG, one line per stage of kind `adapter`.

    Returns:
      `path`, or None if no adapter has been trained yet.
    """
    names = [n for n in recipe.chain if recipe.stages[n].kind == "adapter"]
    logs = {n: history(storage.as_path(workdir) / n / "metrics.jsonl") for n in names}
    logs = {n: log for n, log in logs.items() if any("loss" in row for row in log)}
    if not logs:
        return None
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    losses, scores = figure.subplots(1, 2, sharex=True)
    for i, (name, log) in enumerate(logs.items()):
        stage, color = recipe.stages[name], COLORS[i % len(COLORS)]
        label = f"{name}: {' → '.join(stage.chain)}"
        x, y = _series(log, "loss")
        losses.plot(x, y, color=color, alpha=0.3, linewidth=1)
        held_out = [_series(log, f"{key}/loss") for key in stage.loss]
        held_out = [series for series in held_out if len(series[0])]
        x, y = held_out[0] if held_out else (x, _smooth(y))
        style = "o-" if held_out else "-"
        losses.plot(x, y, style, color=color, markersize=4, linewidth=1.8, label=label)
        evals = [e for e in stage.evals if len(_series(log, f"{e}/cider")[0])]
        for key in evals[:1]:
            _plot_scores(scores, log, key, color, f"{name}: {key}")
    losses.set(ylabel="nats per token", title="Loss (dots: held out; faint: training)")
    losses.legend(frameon=False, fontsize=9)
    scores.set(ylabel="CIDEr × 100", title="CIDEr, held out (dots: on a subset; ring: on all)")
    if scores.has_data():
        scores.set_ylim(bottom=0, top=max(1.0, scores.get_ylim()[1]))
        scores.legend(frameon=False, fontsize=9)
    else:
        scores.text(0.5, 0.5, "not measured", ha="center", transform=scores.transAxes)
    for axes in (losses, scores):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(recipe.name)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png")
    storage.write_bytes(path, png.getvalue())
    return path


def _series(log: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps at which a value was logged, and the values."""
    points = [(row["step"], row[key]) for row in log if key in row]
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x, y


def _smooth(y: np.ndarray) -> np.ndarray:
    """Return a running mean over a twentieth of the points, over fewer at the ends."""
    half = len(y) // 40
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def _plot_scores(axes: Any, log: list[dict[str, Any]], key: str, color: str, label: str) -> None:
    """Draw the CIDEr of one evaluation; scores on all items are rings without a line.

    CIDEr depends on the evaluated set, so scores on a subset and on all items are not comparable.
    """
    x, y = _series(log, f"{key}/cider")
    _, count = _series([row for row in log if f"{key}/cider" in row], f"{key}/n")
    full = (count == count.max()) & (count.min() < count.max())
    axes.plot(x[~full], 100 * y[~full], "o-", color=color, markersize=4, label=label)
    axes.plot(x[full], 100 * y[full], "o", color=color, markersize=9, markerfacecolor="none")
