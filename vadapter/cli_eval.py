"""`vadapter eval RUN`: the recipe's evaluations, or benchmarks, with a trained stage."""

import argparse
from pathlib import Path
from typing import Any

TEXT = (
    "Scores a trained stage: the recipe's evaluations, or benchmarks, with the newest checkpoint.\n"
    "Writes RUN/STAGE/eval/NAME/{predictions.jsonl, score.json, gallery.html}, of benchmarks also\n"
    "the file for their evaluation server. Killed, the same command goes on where it stopped."
)
EXAMPLE = "runs/flickr8k --benchmarks=flickr8k,daquar --data=/data/benchmarks"
OVERRIDES = "override data, evals, mesh, workers, components.NAME.weights; protocol"


def add_arguments(sub: argparse.ArgumentParser, count: Any) -> None:
    """The options of the verb; `count` reads a number above 0."""
    sub.add_argument(
        "--evals", default="", metavar="A,B", help="their names, or all (default: the stage's)"
    )
    sub.add_argument(
        "--benchmarks", default="", metavar="A,B", help="benchmarks instead, or all of them"
    )
    sub.add_argument(
        "--protocol", default="paper", metavar="P", help="how benchmarks are run (paper)"
    )
    sub.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR",
        help="holds a folder for each benchmark, of its name, with its official files (data)",
    )  # fmt: skip
    sub.add_argument(
        "--limit", type=count, default=0, metavar="N",
        help="only the first N items; written to NAME-first-N",
    )  # fmt: skip
    sub.add_argument("--batch", type=count, default=0, metavar="N", help="rows at a time")


def run(args: argparse.Namespace) -> None:
    """Runs the verb."""
    from vadapter.train.restore import open_run

    of_protocol = [item for item in args.overrides if item.startswith("protocol.")]
    others = [item for item in args.overrides if item not in of_protocol]
    score = _benchmarks if args.benchmarks else _evals
    score(args, of_protocol, lambda: open_run(args.workdir, args.stage, overrides=others))


def _benchmarks(args: argparse.Namespace, overrides: list[str], opened: Any) -> None:
    from vadapter.errors import Problems
    from vadapter.study import benchmark
    from vadapter.study.table import BENCHMARKS, as_text, benchmarks

    chosen = benchmark.choose(args.benchmarks, args.protocol, overrides)
    loaded, done, problems = opened(), [], Problems()
    print(f"{loaded.stage}, step {loaded.step}", flush=True)
    for protocol in chosen:
        with problems.gather(protocol.benchmark):
            _, folder = benchmark.run(
                loaded, protocol, args.data, limit=args.limit, batch=args.batch
            )
            done.append(folder)
            print(folder / "score.json", flush=True)
    if done:
        print(f"\n{as_text(benchmarks(done), BENCHMARKS)}", flush=True)
    problems.settle()


def _evals(args: argparse.Namespace, overrides: list[str], opened: Any) -> None:
    from vadapter.errors import ConfigError
    from vadapter.study.gallery import read_section, write_gallery
    from vadapter.study.rescore import as_table, choose, rescore

    if overrides:
        raise ConfigError(f"--config.{overrides[0]}: only benchmarks have a protocol")
    loaded, results = opened(), {}
    print(f"{loaded.stage}, step {loaded.step}", flush=True)
    for name in choose(loaded, args.evals):
        results[name], folder = rescore(loaded, name, limit=args.limit, batch=args.batch)
        paths = {loaded.stage: folder / "predictions.jsonl"}
        section = read_section(loaded.recipe, name, paths)
        page = write_gallery(folder / "gallery.html", f"{loaded.stage}: {name}", [section])
        print(page, flush=True)
    print(f"\n{as_table(results)}")
