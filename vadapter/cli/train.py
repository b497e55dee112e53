"""Verbs that train: `quickstart`, `train`, `rewind`, `check`."""

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vadapter.cli.common import CONFIG, RECIPE, RUN, arg, at_least, either, recipe, say, verb
from vadapter.console import duration
from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.recipe.schema import Recipe

QUICKSTART = "configs/quickstart.py"
FROM_SCRATCH = f"{QUICKSTART}:weights="

# What a stage of each kind does, for people who see it for the first time.
STAGES = {
    "lm": "train {lm} as a language model on text only",
    "vision": "train {encoder} on images with captions (CoCa)",
    "decoder": "train {chain} and {lm} to caption what the frozen {encoder} sees (stage 1)",
    "adapter": "train {chain} to connect the frozen {encoder} to the frozen {lm} ({role})",
}


@verb(
    arg("--workdir", type=as_path, default=Path("runs/quickstart"), metavar="DIR",
        help="run directory (default: runs/quickstart)"),
    either(
        arg("--config", default=QUICKSTART, metavar=RECIPE, help="another recipe"),
        arg("--from-scratch", action="store_const", dest="config", const=FROM_SCRATCH,
            help="train the encoder and the language models, too"),
    ),
    example="--workdir=runs/quickstart",
)  # fmt: skip
def quickstart(args: argparse.Namespace) -> None:
    """Train both stages and a baseline on generated scenes, with nothing to download.

    The encoder and the language models come with the package, pretrained on such scenes. Trains one
    stage after the other, then prints a table of results and writes a plot and a gallery. Rerun the
    same command to resume; finished stages are skipped.
    """
    from vadapter.train import loop

    start, config = time.monotonic(), recipe(args)
    chain = config.chain
    say(f"{config.name}: {len(chain)} stages in {args.workdir}.")
    say("Finished stages are skipped. Stop with Ctrl-C; rerun the same command to resume.")

    def announce(name: str) -> None:
        say(f"\n[{chain.index(name) + 1}/{len(chain)}] {name}: {_sentence(config, name)}.")

    loop.train(config, args.workdir, before=announce)
    _report(args.workdir, config)
    elapsed = duration(time.monotonic() - start)
    say(f"\nTook {elapsed}. Now try: vadapter caption {args.workdir} IMAGE")


def _sentence(config: "Recipe", name: str) -> str:
    from vadapter.models.registry import expand

    stage = config.stages[name]
    kinds = {expand(part, config.components[part])["kind"] for part in stage.chain}
    role = "stage 2" if "lm" in kinds else "baseline without a tiny LM"
    words = STAGES[stage.kind].format(
        lm=stage.lm, encoder=stage.encoder, chain=", ".join(stage.chain), role=role
    )
    return f"{words}; {stage.steps} steps"


def _report(workdir: Path, config: "Recipe") -> None:
    """Write the report on the first host, and print its table and its files."""
    from vadapter.distributed import hosts
    from vadapter.report.report import write_report

    if hosts.first():
        report = write_report(workdir, config)
        print(f"\n{report.text}\n", *report.files(), sep="\n")


@verb(
    CONFIG,
    arg("--workdir", required=True, type=as_path, metavar="RUN",
        help="run directory, created if it does not exist"),
    example="--config=configs/flickr8k.py --workdir=runs/flickr8k --config.seed=1",
)  # fmt: skip
def train(args: argparse.Namespace) -> None:
    """Train the stages of a recipe.

    Finished stages are skipped and an interrupted stage resumes from its last checkpoint. If the
    recipe has evaluations, writes table.md, plots/ and gallery.html in RUN.
    """
    from vadapter.train import loop

    config = recipe(args)
    loop.train(config, args.workdir)
    if any(config.stages[name].evals for name in config.chain):
        _report(args.workdir, config)


@verb(
    RUN,
    arg("--step", type=at_least(0), required=True, metavar="N",
        help="keep checkpoints up to step N"),
    arg("--stage", metavar="S", help="stage of the run (default: the first unfinished stage)"),
    example="runs/flickr8k --step=4000", computes=False, overrides="",
)  # fmt: skip
def rewind(args: argparse.Namespace) -> None:
    """Return a stopped run to an earlier checkpoint.

    Later checkpoints are moved to `quarantine/`; the next `vadapter train` resumes from the
    checkpoint that is kept.
    """
    from vadapter.train.rewind import rewind

    stage, step, later = rewind(args.workdir, args.step, args.stage)
    moved = ", ".join(map(str, later)) or "none"
    print(f"{stage}: will resume from step {step}; moved to quarantine/: {moved}")


@verb(
    CONFIG,
    arg("--workdir", type=as_path, metavar="RUN", help="run directory, for its finished stages"),
    arg("--json", action="store_true", help="print one JSON object"),
    example="--config=configs/flickr8k.py --workdir=runs/flickr8k",
    computes=False,
)
def check(args: argparse.Namespace) -> None:
    """Validate a recipe: shapes, parameters, weights, tokenizers, data, memory.

    Lists all problems at once; weights that cannot be read come first, as shapes depend on them.
    Reads no tensors and writes nothing.
    """
    from vadapter.inspect.check import check
    from vadapter.inspect.check_text import as_text

    facts, problems = check(lambda: recipe(args), args.workdir)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts))
    problems.settle()
