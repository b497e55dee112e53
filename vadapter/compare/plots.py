"""Plots of a comparison: a criterion against what was spent, with stage 1 counted and not.

One panel is drawn by `draw`, as a part of a PNG or as an SVG of its own for the page.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from vadapter.compare.curves import AXES, Criterion, Measured, band
from vadapter.compare.table import compact, title
from vadapter.html_page import text
from vadapter.report.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = ("steps", "samples", "flops", "seconds")  # axes of the panels
MARKERS = "os^Dv"
_WIDTH = 150  # characters of a line of the legend in a PNG
INK = "#010203"  # of text and axes in an SVG, replaced by the color of the page's text

# Colors in an SVG are replaced by those of the page, which has others for dark screens.
_SVG: Any = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "axes.edgecolor": INK,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
_TICKS: dict[str, Callable[[float], str]] = {
    "steps": "{:,.0f}".format, "samples": compact, "flops": compact, "seconds": "{:g}".format,
}  # fmt: skip
_TIMES = ((2 * 86400, 86400, "days"), (3 * 3600, 3600, "hours"), (300, 60, "minutes"))


class Look(NamedTuple):
    """How an arm is drawn."""

    color: str
    marker: str


class Panel(NamedTuple):
    """One plot: a criterion against an axis."""

    criterion: Criterion
    axis: str
    counted: bool  # with stage 1


def looks(measured: Measured) -> dict[str, Look]:
    """Return the look of each arm: no two alike for up to 30 arms."""
    return {
        arm.name: Look(COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)])
        for i, arm in enumerate(measured.arms)
    }


def panels(measured: Measured, criterion: Criterion) -> list[list[Panel]]:
    """Return rows of panels: without stage 1, and with it if an arm has one."""
    staged = any(arm.staged for arm in measured.arms)
    return [
        [Panel(criterion, axis, counted) for axis in SHOWN]
        for counted in ((False, True) if staged else (False,))
    ]


def draw(axes: Any, measured: Measured, panel: Panel) -> None:
    """Draw a panel: a line per arm with a band from minimum to maximum where it has several seeds.

    The dashed line is the baseline's best, the mean over its seeds.
    """
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    criterion, axis, counted = panel
    scale, unit = 1.0, AXES[axis].title
    bands = {arm.name: band(arm, criterion, axis, counted) for arm in measured.arms}
    drawn = {name: line for name, line in bands.items() if line is not None}
    if axis == "seconds":
        longest = max((line.x.max() for line in drawn.values()), default=0.0)
        scale, unit = next(((n, name) for most, n, name in _TIMES if longest > most), (1.0, unit))
    for name, line in drawn.items():
        color, marker = looks(measured)[name]
        x = line.x / scale
        if line.seeds > 1:
            axes.fill_between(x, line.low, line.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(x, line.mean, marker=marker, markersize=3.6, linewidth=1.6, color=color)
    if target := _baseline_best(measured, criterion):
        color = looks(measured)[measured.baseline.name].color
        axes.axhline(target, color=color, linestyle=(0, (4, 3)), linewidth=1.2)
    axes.set_xlabel(unit + ", with stage 1" * counted)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=axis == "steps"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _TICKS[axis](x)))
    if criterion.higher:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{100 * y:g}"))
    axes.margins(y=0.08)
    axes.grid(alpha=0.22, color=INK)
    axes.spines[["top", "right"]].set_visible(False)


def _baseline_best(measured: Measured, criterion: Criterion) -> float | None:
    """Return the mean over its seeds of the baseline's best."""
    found = [best[1] for curve in measured.baseline.curves if (best := criterion.best(curve))]
    return sum(found) / len(found) if found else None


def svg(measured: Measured, panel: Panel) -> str:
    """Return a panel as SVG markup that takes its colors from the page and loads nothing."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_SVG, "svg.hashsalt": str(panel)}):
        figure = Figure(figsize=(3.5, 2.6), layout="constrained")
        draw(figure.subplots(), measured, panel)
        file = io.StringIO()
        figure.savefig(
            file, format="svg", transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )  # fmt: skip
    return _inline(file.getvalue(), f"{title(panel.criterion)} against {AXES[panel.axis].title}")


def _inline(markup: str, label: str) -> str:
    """Return the `svg` element of a file in the colors of a page, without prolog and namespaces."""
    box = re.search(r'viewBox="([^"]+)"', markup)
    start = markup.index(">", markup.index("<svg")) + 1
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", markup[start:], flags=re.DOTALL)
    body = body.replace(INK, "currentColor")
    for i, color in enumerate(COLORS):
        body = body.replace(color.lower(), f"var(--arm-{i})")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", body)
    return f'<svg viewBox="{box[1]}" role="img" aria-label="{text(label)}">{body}'


def png(measured: Measured, criterion: Criterion) -> bytes:
    """Return all panels of a criterion in one image, with a legend below them."""
    drawn = figure(measured, panels(measured, criterion))
    drawn.suptitle("").set_parse_math(False)  # a $ in a name is a dollar
    drawn.suptitle(measured.comparison.name)
    file = io.BytesIO()
    drawn.savefig(file, dpi=130, format="png")
    return file.getvalue()


def figure(measured: Measured, rows: Sequence[Sequence[Panel]]) -> "Figure":
    """Return rows of panels, each row of one criterion, with a legend below them."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = max(map(len, rows))
    figure = Figure(figsize=(3.4 * columns, 2.9 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for row, row_of_axes in zip(rows, grid, strict=True):
        for panel, axes in zip(row, row_of_axes, strict=True):
            draw(axes, measured, panel)
        row_of_axes[0].set_ylabel(title(row[0].criterion), parse_math=False)
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, markersize=4, linewidth=1.7)
        for look in looks(measured).values()
    ]
    best = looks(measured)[measured.baseline.name].color
    handles.append(Line2D([], [], color=best, linestyle=(0, (4, 3)), linewidth=1.2))
    names = [*looks(measured), f"best of {measured.baseline.name}"]
    most = _WIDTH * columns // len(SHOWN)
    per_line = max(1, min(len(names), most // (max(map(len, names)) + 6)))
    legend = figure.legend(
        handles, ["-"] * len(names), loc="outside lower center", ncols=per_line, frameon=False
    )
    for label, name in zip(legend.get_texts(), names, strict=True):
        label.set_parse_math(False)  # a $ in a name is a dollar
        label.set_text(name)  # a label that begins with _ would be left out
    return figure
