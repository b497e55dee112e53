"""`vadapter plan`: estimate what a stage takes on accelerators that are not here."""

import argparse
import dataclasses
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vadapter.cli.common import CONFIG, Renamed, arg, at_least, recipe, verb
from vadapter.console import note

if TYPE_CHECKING:
    from vadapter.plan.estimate import Plan

MAX_GPUS = 512  # among which the smallest number is searched for


def _share(text: str) -> float:
    if not 0 < (value := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and at most 1")
    return value


@verb(
    CONFIG,
    arg("--topology", required=True, metavar="T",
        help="v4, v5e, v5p or v6e as v5e:4x4, 2*v5e:4x4 (slices), v5e-16 (chips) or v5p-128 "
        "(cores, two per chip; also for v4); h100:8, h200:1, a100:8, cpu:4; a generation alone, "
        "v5e, finds the smallest slice that fits"),
    arg("--stage", default="", metavar="S", help="stage (default: the last of the chain)"),
    arg("--batch", type=at_least(1), default=0, metavar="N", help="rows (default: the stage's)"),
    arg("--frames", type=at_least(1), default=0, metavar="F",
        help="frames of every row (default: those of the data)"),
    arg("--decode", type=at_least(0), metavar="N",
        help="also plan generation of N tokens (default: as in the stage's evaluations); 0: none"),
    arg("--utilization", type=_share, default=0.4, metavar="U",
        help="assumed share of the peak FLOP/s (default: 0.4)"),
    arg("--utilisation", dest="utilization", type=_share, action=Renamed,
        default=argparse.SUPPRESS, help=argparse.SUPPRESS),
    arg("--json", type=Path, metavar="FILE", help="also write the plan as JSON"),
    example="--config=configs/paper.py:stage=2,encoder=l,llm=1b --topology=v5e:16x16",
    computes=False,
)  # fmt: skip
def plan(args: argparse.Namespace) -> None:
    """Estimate memory, step time and communication of a stage on a TPU or GPU topology.

    No accelerator, data or weights are needed. TPU programs are compiled on this machine (pip
    install 'vadapter[tpu]', one to three minutes); GPU and CPU programs are analyzed. If the stage
    does not fit, the output ends with the closest setting that does, or with exit code 78 if there
    is none.
    """
    import jax

    from vadapter.config import require_one_of
    from vadapter.distributed.topology import parse, require_compiler, reserve, smallest
    from vadapter.errors import ConfigError
    from vadapter.plan import estimate
    from vadapter.plan.search import Search
    from vadapter.plan.text import as_text

    least = smallest(args.topology)
    setting = estimate.Setting(least or parse(args.topology), args.batch, args.frames)
    tpu = setting.topology.row.kind == "tpu"
    if tpu:
        require_compiler(setting.topology)
    elif least is not None:
        reserve(MAX_GPUS)
    jax.config.update("jax_platforms", "cpu")  # nothing runs: leave a TPU of this machine free
    config = recipe(args)
    name = args.stage or config.chain[-1]
    require_one_of(f"--stage={name}", name, config.stages)
    attempt = functools.partial(
        estimate.plan, config, name, decode=args.decode, utilization=args.utilization
    )
    search = Search(config, name, attempt, note)
    if least is None:
        planned = attempt(setting)
    else:
        peak = functools.partial(estimate.estimate_peak, config, name)
        most = None if tpu else MAX_GPUS
        setting, planned = search.smallest(setting, peak, most)
    print(as_text(planned))
    record = _record(planned) | {"change": "", "nearest": None}
    closest = None if planned.fits else search.closest(setting, planned)
    if closest:
        change = search.overrides(setting, closest[0])
        print(f"\nfits with {change}:\n\n{as_text(closest[1])}")
        record |= {"change": change, "nearest": _record(closest[1])}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if not planned.fits and not closest:
        raise ConfigError(
            f"stage {name} does not fit {setting.topology}, nor does any of the settings that were "
            "tried; use a larger topology or a smaller model"
        )


def _record(plan: "Plan") -> dict[str, Any]:
    record = dataclasses.asdict(plan) | {"parameters": plan.parameters, "fits": plan.fits}
    # The names of 0.1.0 remain beside the new ones for one release.
    record |= {"utilisation": plan.utilization, "utilised_ms": plan.utilized_ms}
    if plan.decode:
        record["decode"]["made"] = record["decode"]["stats"]
    return record
