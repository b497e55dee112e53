"""Draw the two figures of the README.

python docs/figures/draw.py                        # both, from quickstart.csv
python docs/figures/draw.py --run=runs/quickstart  # first update quickstart.csv from a run
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from vadapter.io.json_files import history
from vadapter.recipe.arms import earlier_stages
from vadapter.stages import restore

HERE = Path(__file__).resolve().parent
CURVES = HERE / "quickstart.csv"
FROZEN, TRAINED, TEXT = "#a9c9e8", "#f5b971", "#e8e8e8"
ARMS = {
    "vadapter": ("VAdapter (stage 2)", "#0072B2"),
    "perceiver": ("perceiver, 6 layers", "#D55E00"),
}
PANELS = {  # those that the run has measured
    "held_images/loss": "held-out loss, images",
    "captions/captions_right": "right captions in %, images",
    "captions/cider": "CIDEr, images",
    "clips/cider": "CIDEr, clips",
}
BEFORE = "steps before"  # those of the stages that an adapter starts from
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "vadapter", "font.size": 9}


def read_run(run: Path) -> None:
    """Write the scores of a quickstart's two adapters as stage, step, name, value."""
    recipe = restore.read_run(run)
    with CURVES.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("stage", "step", "name", "value"))
        for stage in ARMS:
            before = sum(recipe.stages[name].steps for name in earlier_stages(recipe, stage))
            writer.writerow((stage, 0, BEFORE, before))
            for row in history(run / stage / "metrics.jsonl"):
                for name in PANELS:
                    if name in row:
                        writer.writerow((stage, row["step"], name, f"{row[name]:.6g}"))


def box(
    axes: plt.Axes,
    x: float,
    y: float,
    text: str,
    color: str,
    width: float = 1.9,
    height: float = 0.8,
) -> None:
    """Draw a component with its lower left corner at (x, y)."""
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0.04", facecolor=color, edgecolor="#333333", lw=1
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", fontsize=8.5)


def arrow(axes: plt.Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw the data flow between two components."""
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color="#333333", lw=1)
    )


def draw_architecture(path: Path) -> None:
    """Draw both stages as chains of components: frozen ones blue, trained ones orange."""
    figure, axes = plt.subplots(figsize=(9.6, 3.3))
    stages = {
        3.0: (
            "Stage 1: the tiny LM is a caption decoder",
            (("vision encoder\nViT", FROZEN), ("resampler\n1 layer", TRAINED),
             ("tiny LM\n~108M", TRAINED)),
        ),
        0.9: (
            "Stage 2: the aligned tiny LM is the adapter",
            (("vision encoder\nViT", FROZEN), ("resampler\n1 layer", TRAINED),
             ("tiny LM\n~108M", TRAINED), ("LLM\n1B, 8B, any", FROZEN)),
        ),
    }  # fmt: skip
    for y, (title, parts) in stages.items():
        axes.text(0, y + 1.05, title, fontsize=10, fontweight="bold")
        axes.text(0.45, y + 0.4, "image or\n8 frames", ha="center", va="center", fontsize=8.5)
        for i, (text, color) in enumerate(parts):
            x = 1.3 + 2.5 * i
            arrow(axes, (x - 0.45, y + 0.4), (x - 0.06, y + 0.4))
            box(axes, x, y, text, color)
        end = 1.3 + 2.5 * len(parts)
        arrow(axes, (end - 0.45, y + 0.4), (end - 0.06, y + 0.4))
        axes.text(end, y + 0.4, "caption\nor answer", va="center", fontsize=8.5)
    tlm = 1.3 + 2.5 * 2 + 0.95
    arrow(axes, (tlm, 2.9), (tlm, 1.8))
    axes.text(tlm + 0.1, 2.3, "initializes", fontsize=8, va="center")
    for x, color, text in ((0.0, FROZEN, "frozen"), (1.3, TRAINED, "trained")):
        box(axes, x, 0.1, "", color, width=0.35, height=0.25)
        axes.text(x + 0.5, 0.22, text, va="center", fontsize=8.5)
    axes.text(
        2.9, 0.22, "loss: next token of the caption; in stage 2 gradients pass through the LLM",
        va="center", fontsize=8.5,
    )  # fmt: skip
    axes.set(xlim=(-0.1, 12.6), ylim=(-0.1, 4.4))
    axes.set_axis_off()
    save(figure, path)


def draw_convergence(path: Path) -> None:
    """Plot held-out loss and scores of the quickstart's two adapters against steps.

    The dashed line counts the steps of stage 1, too.
    """
    rows = list(csv.DictReader(CURVES.open(newline="")))
    shown = {name: title for name, title in PANELS.items() if any(r["name"] == name for r in rows)}
    figure, panels = plt.subplots(1, len(shown), figsize=(3.2 * len(shown), 2.6))
    for axes, (name, title) in zip(panels, shown.items(), strict=True):
        scale = 1 if name.endswith("loss") else 100
        for stage, (label, color) in ARMS.items():
            own = {(row["name"], int(row["step"])): float(row["value"])
                   for row in rows if row["stage"] == stage}  # fmt: skip
            points = {step: scale * y for (key, step), y in own.items() if key == name}
            axes.plot([*points], [*points.values()], "o-", color=color, label=label, markersize=4)
            if before := own[BEFORE, 0]:
                axes.plot(
                    [before + step for step in points], [*points.values()], "o--", color=color,
                    label="… with stage 1", markersize=4, markerfacecolor="none", linewidth=1.1,
                )  # fmt: skip
        axes.set(title=title, xlabel="steps", ylim=(0, None) if scale == 100 else None)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(labels),
        frameon=False, fontsize=9,
    )  # fmt: skip
    save(figure, path)


def save(figure: plt.Figure, path: Path) -> None:
    """Write the figure as SVG with the same bytes on every run."""
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """Draw both figures beside this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, metavar="RUN", help="a finished quickstart to read")
    parser.add_argument("--out", type=Path, default=HERE, metavar="DIR", help="where to draw")
    args = parser.parse_args()
    if args.run:
        read_run(args.run)
    with plt.rc_context(STYLE):
        draw_architecture(args.out / "architecture.svg")
        draw_convergence(args.out / "convergence.svg")


if __name__ == "__main__":
    main()
