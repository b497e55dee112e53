"""`vadapter data SUBVERB`: looks at data sets and prepares them, without training.

A subverb is a row of `SUBVERBS`; each imports what it needs when it runs.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path


class Subverb(NamedTuple):
    """A row of the table.

    Attributes:
      text: its help; the first sentence is the summary.
      example: what follows its name on the command line.
      arguments: adds its arguments to its parser.
      run: takes the parsed arguments (with `overrides`, the `--config.…` items) and returns an
        exit code, None for 0.
      computes: it needs jax and its compilation cache.
      overrides: what `--config.a.b=VALUE` does, "" where it takes no recipe.
    """

    text: str
    example: str
    arguments: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], int | None]
    computes: bool = False
    overrides: str = ""


def recipe(args: argparse.Namespace) -> Any:
    """The recipe that `--config` and the overrides name."""
    from vadapter import config
    from vadapter.recipe.schema import read

    values = config.load(args.config)
    config.override(values, args.overrides)
    return read(values)


def add_data(verbs: Any) -> None:
    """Adds the verb `data` with its subverbs to the command line's verbs."""
    text = "Looks at data sets and prepares them."
    data = verbs.add_parser("data", help=text, description=text, allow_abbrev=False)
    subverbs = data.add_subparsers(dest="subverb", required=True, metavar="SUBVERB")
    for name, row in SUBVERBS.items():
        options = f"  --config.a.b=VALUE    {row.overrides}\n\n" if row.overrides else ""
        sub = subverbs.add_parser(
            name,
            help=row.text.split(":")[0].split(".")[0],
            description=row.text,
            epilog=f"{options}example:\n  vadapter data {name} {row.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=row.run, computes=row.computes, overridable=bool(row.overrides))
        row.arguments(sub)


def at_least(least: int) -> Callable[[str], int]:
    """A type of argument: whole numbers from `least` on."""

    def count(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return value

    return count


def _index_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("path", type=as_path, metavar="PATH", help="a folder of shards")
    sub.add_argument(
        "--out", type=as_path, metavar="FILE", help="where to write it (PATH/index.vadapter)"
    )
    sub.add_argument(
        "--verify", action="store_true", help="read all shards again and compare their digests"
    )


def _index(args: argparse.Namespace) -> None:
    from vadapter.data.shards import index

    print((index.verify if args.verify else index.build)(args.path, args.out), flush=True)


def _cache_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="FILE.py[:ARGS]", help="the recipe")
    sub.add_argument(
        "--data", default="", metavar="A,B", help="data sets (default: those with cache=True)"
    )
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of caches (cache_dir, or RUN/features)"
    )
    sub.add_argument(
        "--workdir",
        type=as_path,
        metavar="RUN",
        help="run directory, if a stage trains the encoder",
    )
    sub.add_argument("--dtype", choices=("bfloat16", "int8"), help="as stored (cache_dtype)")


def _cache(args: argparse.Namespace) -> None:
    from vadapter.distributed.preemption import signals
    from vadapter.stages.fill_caches import write_caches

    names = tuple(filter(None, args.data.split(",")))
    with signals() as stop:
        watch = lambda name: lambda batches: stop.watch(batches, name, "features")  # noqa: E731
        for name, config, made in write_caches(
            recipe(args), names, workdir=args.workdir, out=args.out, stored=args.dtype, watch=watch
        ):
            keys = {key: getattr(config, key) for key in ("cache", "cache_dir", "cache_dtype")}
            use = " ".join(f"--config.data.{name}.{key}={value}" for key, value in keys.items())
            print(f"{name}: {made.cache.folder}\n  {use}", flush=True)


_OFFICIAL = "folder of its official files (data/BENCHMARK, where `vadapter eval` looks)"


def _doctor_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("benchmark", nargs="?", metavar="BENCHMARK", help="default: list all of them")
    sub.add_argument("--dir", type=Path, metavar="DIR", help=_OFFICIAL)


def _doctor(args: argparse.Namespace) -> int:
    from vadapter.data.benchmarks.doctor import diagnose, list_benchmarks

    if args.benchmark is None:
        lines, usable = list_benchmarks(), True
    else:
        lines, usable = diagnose(args.benchmark, args.dir or Path("data", args.benchmark))
    print("\n".join(lines), flush=True)
    return 0 if usable else USER_ERROR


def _prepare_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("benchmark", metavar="BENCHMARK", help="its name")
    sub.add_argument("--dir", type=Path, metavar="DIR", help=_OFFICIAL)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="data_dir of tfds")


def _prepare(args: argparse.Namespace) -> None:
    from vadapter.data.benchmarks.prepare import prepare

    print(prepare(args.benchmark, args.dir or Path("data", args.benchmark), args.out), flush=True)


def _look_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("config", metavar="FILE.py[:ARGS]", help="the recipe")
    sub.add_argument(
        "--data", default="", metavar="A,B", help="data sets (default: all the stage trains on)"
    )
    sub.add_argument(
        "--stage", default="", metavar="S", help="as this stage reads them (one that reads A)"
    )
    sub.add_argument(
        "--workdir", type=as_path, metavar="RUN", help="run directory, if it has the tokenizer"
    )


def _opened(args: argparse.Namespace) -> Any:
    from vadapter.inspect.open_data import open_data

    names = tuple(filter(None, args.data.split(",")))
    return open_data(recipe(args), args.workdir, args.stage, names)


def _show_arguments(sub: argparse.ArgumentParser) -> None:
    _look_arguments(sub)
    sub.add_argument("--n", type=at_least(1), default=4, metavar="N", help="rows of each (4)")
    sub.add_argument("--out", type=Path, metavar="FILE.html", help="write a page instead")


def _show(args: argparse.Namespace) -> None:
    from vadapter.inspect import show_data

    rows = (row for data in _opened(args) for row in show_data.shown(data, args.n))
    if args.out is not None:
        from vadapter.inspect.show_page import write_page

        print(write_page(args.out, str(args.config), rows), flush=True)
        return
    color = show_data.wants_color()
    print(show_data.legend(color=color) + "\n", flush=True)
    for line in show_data.as_text(rows, color=color):
        print(line, flush=True)


def _stats_arguments(sub: argparse.ArgumentParser) -> None:
    _look_arguments(sub)
    sub.add_argument(
        "--limit", type=at_least(0), default=500, metavar="N",
        help="look at N examples, evenly spread (500); 0: all",
    )  # fmt: skip
    sub.add_argument("--json", action="store_true", help="print one JSON list")


def _stats(args: argparse.Namespace) -> None:
    from vadapter.inspect.data_stats import stats
    from vadapter.inspect.data_stats_text import as_text

    found = (stats(data, args.limit) for data in _opened(args))
    if args.json:
        print(json.dumps(list(found), indent=1), flush=True)
        return
    for facts in found:
        print(as_text(facts) + "\n", flush=True)


SUBVERBS: dict[str, Subverb] = {
    "cache": Subverb(
        "Writes the tokens of a recipe's frozen encoder, which training then reads instead of\n"
        "images. Says first how large they are, then how long it takes. Stopped or killed, the\n"
        "same command goes on behind the last complete file.",
        "configs/flickr8k.py --data=photos --out=/data/features --dtype=int8",
        _cache_arguments,
        _cache,
        computes=True,
        overrides="override a key of the recipe",
    ),
    "doctor": Subverb(
        "Says which official files of a benchmark are there, which are missing and where they\n"
        "come from, and how its splits compare with the official ones. Ends with 78 if it cannot\n"
        "be scored. Without BENCHMARK, lists all of them.",
        "vqav2 --dir=/data/vqav2",
        _doctor_arguments,
        _doctor,
    ),
    "prepare": Subverb(
        "Writes a benchmark's splits as array_record files of TensorFlow Datasets, from its\n"
        "official files. Scoring does not need it: it reads the official files.",
        "vqav2 --dir=/data/vqav2 --out=/data/tfds",
        _prepare_arguments,
        _prepare,
    ),
    "index": Subverb(
        "Indexes a folder of tar or parquet shards once: positions, counts and digests.\n"
        "Training then starts without scanning them, and stops if one has changed. A shard that\n"
        "is done is not read again, however the command was stopped.",
        "/data/pairs",
        _index_arguments,
        _index,
    ),
    "show": Subverb(
        "Draws rows as the model reads them: its images, cut and scaled for the encoder, and\n"
        "every token, colored by whether the loss counts it. Trains nothing.",
        "configs/flickr8k.py --data=train --workdir=runs/flickr8k --out=rows.html",
        _show_arguments,
        _show,
        overrides="override a key of the recipe",
    ),
    "stats": Subverb(
        "Counts what is in data sets: texts, lengths in tokens, what is cut or left out, samples\n"
        "that cannot be used, sizes of images, lengths of clips, speed. Trains nothing.",
        "configs/flickr8k.py --data=train --workdir=runs/flickr8k",
        _stats_arguments,
        _stats,
        overrides="override a key of the recipe",
    ),
}
