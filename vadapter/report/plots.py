"""Convergence plot: how fast the adapters of a run train, side by side."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vadapter.io import storage
from vadapter.io.json_files import history
from vadapter.metrics.judgments import RIGHT
from vadapter.recipe.arms import earlier_stages
from vadapter.recipe.schema import Recipe, StageConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with every kind of color vision (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SCORES = {RIGHT: "right captions in %", "cider": "CIDEr × 100"}  # the first that is measured
_DASHED, _DOTTED = (0, (4, 2)), (0, (1, 2))
Series = tuple[np.ndarray, np.ndarray]  # steps and values


class Arm(NamedTuple):
    """A stage of kind `adapter` with what it has logged.

    Attributes:
      before: steps of the earlier stages that it starts from: of the paper's stage 1.
    """

    name: str
    stage: StageConfig
    log: list[dict[str, Any]]
    before: int
    color: str

    def series(self, key: str) -> Series:
        """Return the steps at which a value was logged, and the values."""
        points = [(row["step"], row[key]) for row in self.log if key in row]
        x, y = np.array(points, np.float64).reshape(-1, 2).T
        return x, y


def arms(workdir: Path, recipe: Recipe) -> list[Arm]:
    """Return the adapters of a run that have logged a training loss."""
    found = []
    for name in (n for n in recipe.chain if recipe.stages[n].kind == "adapter"):
        log = history(storage.as_path(workdir) / name / "metrics.jsonl")
        if any("loss" in row for row in log):
            before = sum(recipe.stages[stage].steps for stage in earlier_stages(recipe, name))
            color = COLORS[len(found) % len(COLORS)]
            found.append(Arm(name, recipe.stages[name], log, before, color))
    return found


def convergence(workdir: Path, recipe: Recipe, path: Path) -> Path | None:
    """Write the plot of a run's adapters as PNG.

    Returns:
      `path`, or None if no adapter has been trained yet.
    """
    drawn = arms(workdir, recipe)
    if not drawn:
        return None
    figure = draw(drawn)
    figure.suptitle(recipe.name)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png")
    storage.write_bytes(path, png.getvalue())
    return path


def draw(drawn: Sequence[Arm]) -> "Figure":
    """Draw loss and score against steps, one line per adapter.

    An adapter that starts from earlier stages has a second, dashed line, on which their steps
    count. Dotted lines are the best of the adapters that start from none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    losses, scores = figure.subplots(1, 2, sharex=True)
    for arm in drawn:
        _plot_losses(losses, arm)
    losses.set(ylabel="nats per token", title="Loss (dots: held out; faint: training)")
    metric = next((m for m in SCORES if any(_evaluation(arm, m) for arm in drawn)), "")
    for arm in drawn:
        if name := _evaluation(arm, metric):
            _plot_scores(scores, arm, name, metric)
    subset = "(dots: on a subset; ring: on all)"
    scores.set(ylabel=SCORES.get(metric), title=f"Score, held out {subset}")
    if scores.has_data():
        scores.set_ylim(bottom=0, top=max(1.0, scores.get_ylim()[1]))
    else:
        scores.text(0.5, 0.5, "not measured", ha="center", transform=scores.transAxes)
    for axes in (losses, scores):
        _finish(axes)
    return figure


def _evaluation(arm: Arm, metric: str) -> str:
    """Return the first evaluation of a stage that has measured a metric; "" if none has."""
    keys = {key for row in arm.log for key in row}
    return next((name for name in arm.stage.evals if f"{name}/{metric}" in keys), "")


def _plot_losses(axes: Any, arm: Arm) -> None:
    """Draw the training loss and the first held-out loss that was measured."""
    x, y = arm.series("loss")
    axes.plot(x, y, color=arm.color, alpha=0.3, linewidth=1)
    held_out = [series for key in arm.stage.loss if len((series := arm.series(f"{key}/loss"))[0])]
    x, y = held_out[0] if held_out else (x, _smooth(y))
    label = f"{arm.name}: {' → '.join(arm.stage.chain)}"
    _plot_lines(axes, arm, (x, y), np.min(y), label, marker="o" if held_out else "")


def _plot_scores(axes: Any, arm: Arm, name: str, metric: str) -> None:
    """Draw a score of one evaluation; scores on all items are rings without a line.

    CIDEr depends on the evaluated set, so scores on a subset and on all items are not comparable.
    """
    x, y = arm.series(f"{name}/{metric}")
    rows = [row for row in arm.log if f"{name}/{metric}" in row]
    count = np.array([row[f"{name}/n"] for row in rows])
    full = (count == count.max()) & (count.min() < count.max())
    line = x[~full], 100 * y[~full]
    _plot_lines(axes, arm, line, np.max(line[1]), f"{arm.name}: {name}")
    for before in {0, arm.before}:
        axes.plot(
            x[full] + before, 100 * y[full], "o", color=arm.color, markersize=9,
            markerfacecolor="none", linestyle="",
        )  # fmt: skip


def _plot_lines(
    axes: Any, arm: Arm, series: Series, best: float, label: str, marker: str = "o"
) -> None:
    """Draw a line against the stage's own steps and, dashed, with those of earlier stages."""
    x, y = series
    look: Any = {"color": arm.color, "marker": marker, "markersize": 4, "linewidth": 1.8}
    axes.plot(x, y, label=label, **look)
    if arm.before:
        counted = f"{arm.name}, with {arm.before:,} steps of stage 1"
        look |= {"linestyle": _DASHED, "markerfacecolor": "none", "linewidth": 1.2}
        axes.plot(x + arm.before, y, label=counted, **look)
    else:
        axes.axhline(best, color=arm.color, linestyle=_DOTTED, linewidth=1.2)


def _finish(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("step")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _smooth(y: np.ndarray) -> np.ndarray:
    """Return a running mean over a twentieth of the points, over fewer at the ends."""
    half = len(y) // 40
    total = np.concatenate([[0.0], np.cumsum(y)])
    index = np.arange(len(y))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)
