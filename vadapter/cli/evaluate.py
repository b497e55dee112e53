"""`vadapter eval RUN`: the recipe's evaluations, or benchmarks, with a trained stage."""

import argparse
from pathlib import Path
from typing import Any

from vadapter.cli.data import at_least

TEXT = (
    "Scores a trained stage: the recipe's evaluations, or benchmarks, with the newest checkpoint.\n"
    "Writes RUN/STAGE/eval/NAME/{predictions.jsonl, score.json, gallery.html}, of benchmarks also\n"
    "the file for their evaluation server. Killed, the same command goes on where it stopped;\n"
    "benchmarks that are complete are not run again."
)
EXAMPLE = "runs/flickr8k --benchmarks=flickr8k,daquar --data=/data/benchmarks"
OVERRIDES = "override data, evals, mesh, workers, components.NAME.weights; protocol"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    count = at_least(1)
    what = sub.add_mutually_exclusive_group()
    what.add_argument(
        "--evals", default="", metavar="A,B", help="their names, or all (default: the stage's)"
    )
    what.add_argument("--benchmarks", metavar="A,B", help="benchmarks instead, or all of them")
    sub.add_argument("--protocol", metavar="P", help="how benchmarks are run (paper)")
    sub.add_argument(
        "--data", type=Path, metavar="DIR",
        help="holds a folder for each benchmark, of its name, with its official files (data)",
    )  # fmt: skip
    sub.add_argument(
        "--limit", type=count, default=0, metavar="N",
        help="only the first N items; written to NAME-first-N",
    )  # fmt: skip
    sub.add_argument("--batch", type=count, default=0, metavar="N", help="rows at a time")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from vadapter.stages.restore import open_run

    protocol = [item for item in args.overrides if item.startswith("protocol.")]
    others = [item for item in args.overrides if item not in protocol]
    score = _evals if args.benchmarks is None else _benchmarks
    score(args, protocol, lambda: open_run(args.workdir, args.stage, overrides=others))


def _benchmarks(args: argparse.Namespace, overrides: list[str], opened: Any) -> None:
    import jax

    from vadapter.console import table
    from vadapter.errors import DataError, Problems
    from vadapter.evaluate import benchmarks
    from vadapter.report.table import BENCHMARKS
    from vadapter.report.table import benchmarks as table_rows

    fields = [item.removeprefix("protocol.") for item in overrides]
    chosen = benchmarks.choose(args.benchmarks, args.protocol or "paper", fields)
    data = args.data or Path("data")
    if not data.is_dir():
        raise DataError(f"--data={data}: no such folder; in it each benchmark has one of its name")
    loaded, done, problems = opened(), [], Problems()
    show = print if jax.process_index() == 0 else lambda *_, **__: None
    show(f"{loaded.stage}, step {loaded.step}", flush=True)
    for protocol in chosen:
        with problems.gather(protocol.benchmark):
            done.append(benchmarks.run(loaded, protocol, data, limit=args.limit, batch=args.batch))
            show(done[-1] / "score.json", flush=True)
    if done and jax.process_index() == 0:
        show(f"\n{table(table_rows(done), BENCHMARKS)}", flush=True)
    problems.settle()


def _evals(args: argparse.Namespace, overrides: list[str], opened: Any) -> None:
    import jax

    from vadapter.errors import ConfigError
    from vadapter.evaluate.recipe_evals import as_table, choose, evaluate_again
    from vadapter.report.gallery import read_section, write_gallery

    of_benchmarks = {"--protocol": args.protocol, "--data": args.data}
    given = [f"{name}={value}" for name, value in of_benchmarks.items() if value is not None]
    for option in [*given, *(f"--config.{item}" for item in overrides)]:
        raise ConfigError(f"{option}: is of benchmarks; name some, --benchmarks=all")
    loaded, results = opened(), {}
    show = print if jax.process_index() == 0 else lambda *_, **__: None
    show(f"{loaded.stage}, step {loaded.step}", flush=True)
    for name in choose(loaded, args.evals):
        results[name], folder = evaluate_again(loaded, name, limit=args.limit, batch=args.batch)
        if jax.process_index() == 0:
            paths = {loaded.stage: folder / "predictions.jsonl"}
            section = read_section(loaded.recipe, name, paths)
            page = write_gallery(folder / "gallery.html", f"{loaded.stage}: {name}", [section])
            show(page, flush=True)
    show(f"\n{as_table(results)}")
