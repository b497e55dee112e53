"""`vadapter eval RUN`: score a trained stage on the recipe's evaluations or on benchmarks."""

import argparse
from collections.abc import Callable
from pathlib import Path

from vadapter.cli.common import RUN, STAGE, arg, at_least, either, note_stage, say, verb
from vadapter.console import table


@verb(
    RUN,
    STAGE,
    either(
        arg("--evals", default="", metavar="A,B",
            help="evaluations of the recipe, or all (default: those of the stage)"),
        arg("--benchmarks", metavar="A,B", help="benchmarks instead, or all"),
    ),
    arg("--protocol", metavar="P", help="protocol of the benchmarks (paper)"),
    arg("--data", type=Path, metavar="DIR",
        help="folder with the official files of each benchmark in DIR/BENCHMARK (default: data)"),
    arg("--limit", type=at_least(1), default=0, metavar="N",
        help="score only the first N items; results are written to NAME-first-N"),
    arg("--batch", type=at_least(1), default=0, metavar="N", help="rows per batch"),
    name="eval",
    example="runs/flickr8k --benchmarks=flickr8k,daquar --data=/data/benchmarks",
    overrides="override data, evals, mesh, workers, components.NAME.weights; protocol",
)  # fmt: skip
def evaluate(args: argparse.Namespace) -> None:
    """Score a trained stage: the recipe's evaluations, or benchmarks.

    Uses the newest checkpoint. Scores are in percent, with 95 % intervals over images or clips.
    Writes predictions.jsonl, score.json and gallery.html in RUN/STAGE/eval/NAME, and for benchmarks
    the file for their evaluation server. Rerun the same command to resume; finished benchmarks are
    skipped.
    """
    from vadapter.evaluate.runner import Decoder
    from vadapter.stages.restore import open_run

    protocol = [item for item in args.overrides if item.startswith("protocol.")]
    others = [item for item in args.overrides if item not in protocol]

    def open_decoder() -> Decoder:
        loaded = open_run(args.workdir, args.stage, overrides=others)
        note_stage(loaded)
        return Decoder(loaded)

    score = _evals if args.benchmarks is None else _benchmarks
    score(args, protocol, open_decoder)


def _benchmarks(args: argparse.Namespace, protocol: list[str], open_decoder: Callable) -> None:
    from vadapter.distributed import hosts
    from vadapter.errors import DataError, Problems
    from vadapter.evaluate import benchmarks
    from vadapter.report.table import BENCHMARKS
    from vadapter.report.table import benchmarks as rows_of

    fields = [item.removeprefix("protocol.") for item in protocol]
    chosen = benchmarks.choose(args.benchmarks, args.protocol or "paper", fields)
    data = args.data or Path("data")
    if not data.is_dir():
        raise DataError(
            f"--data={data}: no such folder; it must hold one folder of official files for each "
            "benchmark, named after it"
        )
    decoder, scored, problems = open_decoder(), [], Problems()
    for each in chosen:
        with problems.gather(each.benchmark):
            scored.append(benchmarks.run(decoder, each, data, limit=args.limit, batch=args.batch))
            say(scored[-1] / "score.json")
    if scored and hosts.first():
        print(f"\n{table(rows_of(scored), BENCHMARKS)}")
    problems.settle()


def _evals(args: argparse.Namespace, protocol: list[str], open_decoder: Callable) -> None:
    from vadapter.distributed import hosts
    from vadapter.errors import ConfigError
    from vadapter.evaluate.recipe_evals import choose, run_eval
    from vadapter.report.gallery import read_section, write_gallery
    from vadapter.report.table import score_table

    options = {"--protocol": args.protocol, "--data": args.data}
    misplaced = [f"{name}={value}" for name, value in options.items() if value is not None]
    for option in [*misplaced, *(f"--config.{item}" for item in protocol)]:
        raise ConfigError(f"{option}: applies only to benchmarks; add --benchmarks=A,B or all")
    decoder, results = open_decoder(), {}
    loaded = decoder.stage
    for name in choose(loaded, args.evals):
        result, folder = run_eval(decoder, name, limit=args.limit, batch=args.batch)
        results[name] = result.summary
        if hosts.first():
            paths = {loaded.name: folder / "predictions.jsonl"}
            section = read_section(loaded.recipe, name, paths)
            print(write_gallery(folder / "gallery.html", f"{loaded.name}: {name}", [section]))
    say(f"\n{table(*score_table(results))}")
