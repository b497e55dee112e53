"""`vadapter plan`: what a stage takes on accelerators that are not here."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vadapter.cli.data import at_least

if TYPE_CHECKING:
    from vadapter.plan.plan import Plan

TEXT = (
    "Says what a stage would take on accelerators that are not here: memory, time, traffic.\n"
    "Compiles the real program for TPU topologies on any machine (pip install 'vadapter[tpu]', a\n"
    "minute or three), analyses it for GPUs and CPUs. Where it does not fit, names the nearest\n"
    "setting that does; ends with 78 if none does. Needs neither data nor weights."
)
EXAMPLE = "--config=configs/paper.py:stage=2,encoder=l,llm=1b --topology=v5e:16x16"
OVERRIDES = "override a key of the recipe"
MOST = 512  # GPUs among which the smallest number is searched for


def add_verb(verb: Any) -> None:
    """Adds the verb, whose parser `verb` makes."""
    count = at_least(1)
    sub = verb("plan", run, TEXT, EXAMPLE, overrides=OVERRIDES)
    sub.set_defaults(computes=False)
    sub.add_argument("--config", required=True, metavar="FILE.py[:ARGS]", help="the recipe")
    sub.add_argument(
        "--topology", required=True, metavar="T",
        help="v4, v5e, v5p, v6e as v5e:4x4, 2*v5e:4x4 (slices), v5e-16 (chips), v5p-128 (cores: "
        "two a chip, of v4 too); h100:8, h200:1, a100:8, cpu:4; v5e alone: the smallest that fits",
    )  # fmt: skip
    sub.add_argument("--stage", default="", metavar="S", help="the chain's last")
    sub.add_argument("--batch", type=count, default=0, metavar="N", help="rows (the stage's)")
    sub.add_argument(
        "--frames", type=count, default=0, metavar="F", help="of all rows (as data say)"
    )
    sub.add_argument(
        "--decode", type=at_least(0), metavar="N",
        help="tokens of the texts that are also planned (as the stage's evaluations); 0: none",
    )  # fmt: skip
    sub.add_argument(
        "--utilisation", type=_share, default=0.4, metavar="U", help="share of the peak (0.4)"
    )
    sub.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    import functools

    import jax

    from vadapter.cli.data import recipe as read
    from vadapter.config import nearest
    from vadapter.distributed.topology import parse, require_compiler, reserve, smallest
    from vadapter.errors import ConfigError
    from vadapter.plan import search
    from vadapter.plan.plan import Plan, Setting, guess, plan
    from vadapter.plan.plan_text import as_text

    least = smallest(args.topology)
    setting = Setting(least or parse(args.topology), args.batch, args.frames)
    if setting.topology.row.kind == "tpu":
        require_compiler(setting.topology)
    elif least is not None:
        reserve(MOST)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: a TPU that is here stays free
    recipe = read(args)
    name = args.stage or recipe.chain[-1]
    if name not in recipe.stages:
        raise ConfigError(f"--stage={name}: no such stage{nearest(name, recipe.stages)}")

    def attempt(setting: Setting) -> Plan:
        return plan(recipe, name, setting, decode=args.decode, utilisation=args.utilisation)

    tell = lambda line: print(f"vadapter: {line}", file=sys.stderr, flush=True)  # noqa: E731
    if least is None:
        planned = attempt(setting)
    else:
        about = functools.partial(guess, recipe, name)
        most = None if setting.topology.row.kind == "tpu" else MOST
        setting, planned = search.smallest(recipe, name, setting, attempt, about, tell, most)
    print(as_text(planned), flush=True)
    found, change = None, ""
    if not planned.fits:
        found = search.search(recipe, name, setting, planned, attempt, tell)
    if found:
        change = search.described(recipe, name, setting, found[0])
        print(f"\nfits with {change}:\n\n{as_text(found[1])}", flush=True)
    if args.json:
        record = _record(planned) | {"change": change}
        record["nearest"] = _record(found[1]) if found else None
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not planned.fits and not found:
        raise ConfigError(
            f"stage {name} does not fit {setting.topology}, nor does anything nearby that was "
            "tried: take a larger topology or a smaller model"
        )


def _record(plan: "Plan") -> dict[str, Any]:
    """All figures of a plan, for JSON."""
    import dataclasses

    return dataclasses.asdict(plan) | {"parameters": plan.parameters, "fits": plan.fits}
