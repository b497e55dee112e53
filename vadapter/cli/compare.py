"""`vadapter compare`: train arms that differ in their connector alone, or compare finished runs."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vadapter.cli.common import RECIPE, arg, say, verb
from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.compare.comparison import Comparison

SEEDS = 3
OVERRIDES = (
    "override a key of the comparison (lr, baseline, test, …), of one\n"
    "                        arm's recipe (arms.NAME.KEY), or of every recipe that has it\n"
    "                        (stages.NAME.KEY, data.NAME.KEY, workers, …)"
)


@verb(
    arg("runs", nargs="*", type=as_path, metavar="RUN",
        help="finished runs, as RUN for all adapter stages or RUN/STAGE, or a comparison's DIR"),
    arg("--config", metavar=RECIPE, help="the comparison to train"),
    arg("--seeds", type=int, metavar="N", help=f"seeds of every arm, from 0 (default: {SEEDS})"),
    arg("--workdir", type=as_path, metavar="DIR", help="directory of the comparison"),
    arg("--baseline", default="", metavar="ARM",
        help="arm that the others are measured against (default: that of the comparison; of runs "
        "perceiver, or else the first)"),
    arg("--score", default="", metavar="EVAL/METRIC",
        help="score of the curves, such as captions/captions_right (default: that of the "
        "comparison; of runs the first CIDEr)"),
    arg("--out", type=as_path, metavar="DIR",
        help="directory of the pages of finished runs (default: compare/ beside them)"),
    name="compare",
    example="--config=configs/compare.py:base=scenes,arms=vadapter,perceiver,mlp --seeds=3 "
    "--workdir=runs/compare",
    overrides=OVERRIDES,
)  # fmt: skip
def compare(args: argparse.Namespace) -> None:
    """Compare connectors: train them alike, or read finished runs.

    With --config, trains the frozen parts once, every arm at every learning rate, and the rate with
    the lowest validation loss with the other seeds, then runs the test evaluations. Finished runs
    are skipped and interrupted ones resume: rerun the same command, also to add arms, rates, seeds.
    With RUN…, compares runs that differ in the connector alone; those that differ only in the seed
    are one arm. Writes compare.html, compare.csv, runs.csv, table.md, plots/ and
    compare.json.
    """
    from vadapter.errors import ConfigError

    if bool(args.config) == bool(args.runs):
        raise ConfigError(
            "give either --config=FILE.py:base=B,arms=A,B and --workdir=DIR, or finished runs"
        )
    if args.config:
        comparison, folder = _train(args)
    else:
        comparison, folder = _read(args)
    _write(comparison, folder)


def _train(args: argparse.Namespace) -> "tuple[Comparison, Path]":
    from vadapter import config
    from vadapter.compare.plan import read_plan
    from vadapter.compare.train import train_comparison
    from vadapter.errors import ConfigError

    if args.workdir is None:
        raise ConfigError("--config needs --workdir=DIR, the directory of the comparison")
    if args.out is not None:
        raise ConfigError(f"--out={args.out}: only with RUN…; --workdir receives the pages")
    if args.score:
        raise ConfigError(f"--score={args.score}: only with RUN…; use --config.score={args.score}")
    plan = read_plan(
        config.load(args.config), args.workdir, seeds=SEEDS if args.seeds is None else args.seeds,
        baseline=args.baseline, overrides=tuple(args.overrides),
    )  # fmt: skip
    return train_comparison(plan, say), plan.folder


def _read(args: argparse.Namespace) -> "tuple[Comparison, Path]":
    from vadapter.compare.read import default_folder, read_runs, write_record_of_runs
    from vadapter.errors import ConfigError

    unused = {"--workdir": args.workdir, "--seeds": args.seeds}
    words = [f"{name}={value}" for name, value in unused.items() if value is not None]
    for word in (*words, *(f"--config.{item}" for item in args.overrides)):
        raise ConfigError(f"{word}: only with --config, to train a comparison")
    comparison, facts = read_runs(args.runs, args.baseline, args.score)
    folder = default_folder(args.runs) if args.out is None else args.out
    write_record_of_runs(comparison, facts, folder)
    return comparison, folder


def _write(comparison: "Comparison", folder: Path) -> None:
    """Write the pages on the first host."""
    from vadapter.compare.write import write_comparison
    from vadapter.distributed import hosts

    if hosts.first():
        written = write_comparison(comparison, folder)
        print(f"\n{written.text}\n", *written.files(), sep="\n")
