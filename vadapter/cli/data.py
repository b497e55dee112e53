"""`vadapter data SUBVERB`: inspect and prepare data sets, without training."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from vadapter.cli.common import RECIPE, Verb, at_least, names, recipe
from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.inspect.open_data import OpenData

_OFFICIAL = "folder of its official files (default: data/BENCHMARK, as in `vadapter eval`)"


def _index_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=as_path, metavar="PATH", help="a folder of shards")
    parser.add_argument(
        "--out", type=as_path, metavar="FILE", help="index file (default: PATH/index.vadapter)"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all shards again and compare their digests"
    )


def _index(args: argparse.Namespace) -> None:
    from vadapter.data.shards import index

    print((index.verify if args.verify else index.build)(args.path, args.out))


def _cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", **RECIPE)
    parser.add_argument(
        "--data", type=names, default=(), metavar="A,B",
        help="data sets (default: those with cache=True)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="cache folder (default: cache_dir, or RUN/features)"
    )
    parser.add_argument(
        "--workdir", type=as_path, metavar="RUN",
        help="run directory, if a stage of it trains the encoder",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("bfloat16", "int8"), help="storage dtype (default: cache_dtype)"
    )


def _cache(args: argparse.Namespace) -> None:
    from vadapter.distributed.preemption import signals
    from vadapter.stages.fill_caches import write_caches

    with signals() as stop:
        for name, config, made in write_caches(
            recipe(args), args.data, workdir=args.workdir, out=args.out, stored=args.dtype,
            watch=lambda name: lambda batches: stop.watch(batches, name, "features"),
        ):  # fmt: skip
            keys = {key: getattr(config, key) for key in ("cache", "cache_dir", "cache_dtype")}
            use = " ".join(f"--config.data.{name}.{key}={value}" for key, value in keys.items())
            print(f"{name}: {made.cache.folder}\n  {use}")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmark", nargs="?", metavar="BENCHMARK", help="its name (default: list all benchmarks)"
    )
    parser.add_argument("--dir", type=Path, metavar="DIR", help=_OFFICIAL)


def _doctor(args: argparse.Namespace) -> int:
    from vadapter.data.benchmarks.doctor import diagnose, list_benchmarks

    if args.benchmark is None:
        lines, usable = list_benchmarks(), True
    else:
        lines, usable = diagnose(args.benchmark, args.dir or Path("data", args.benchmark))
    print("\n".join(lines))
    return 0 if usable else USER_ERROR


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="BENCHMARK", help="its name")
    parser.add_argument("--dir", type=Path, metavar="DIR", help=_OFFICIAL)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="data_dir of TensorFlow Datasets"
    )


def _prepare(args: argparse.Namespace) -> None:
    from vadapter.data.benchmarks.prepare import prepare

    print(prepare(args.benchmark, args.dir or Path("data", args.benchmark), args.out))


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", **RECIPE)
    parser.add_argument(
        "--data", type=names, default=(), metavar="A,B",
        help="data sets (default: all that the stage trains on)",
    )  # fmt: skip
    parser.add_argument(
        "--stage", default="", metavar="S",
        help="stage whose image size and tokenizer are used (default: the first that reads the "
        "data)",
    )  # fmt: skip
    parser.add_argument(
        "--workdir", type=as_path, metavar="RUN", help="run directory, for its tokenizer"
    )


def _open(args: argparse.Namespace) -> "list[OpenData]":
    from vadapter.inspect.open_data import open_data

    return open_data(recipe(args), args.workdir, args.stage, args.data)


def _show_arguments(parser: argparse.ArgumentParser) -> None:
    _inspect_arguments(parser)
    parser.add_argument(
        "--n", type=at_least(1), default=4, metavar="N", help="rows of each data set (default: 4)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="write an HTML page instead")


def _show(args: argparse.Namespace) -> None:
    from vadapter.inspect import show_data

    rows = (row for data in _open(args) for row in show_data.shown(data, args.n))
    if args.out is not None:
        from vadapter.inspect.show_page import write_page

        print(write_page(args.out, str(args.config), rows))
        return
    color = show_data.wants_color()
    print(show_data.legend(color=color) + "\n")
    for line in show_data.as_text(rows, color=color):
        print(line)


def _stats_arguments(parser: argparse.ArgumentParser) -> None:
    _inspect_arguments(parser)
    parser.add_argument(
        "--limit", type=at_least(0), default=500, metavar="N",
        help="examples to read, evenly spaced (default: 500); 0: all",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON list")


def _stats(args: argparse.Namespace) -> None:
    from vadapter.inspect.data_stats import as_text, stats

    results = (stats(data, args.limit) for data in _open(args))
    if args.json:
        print(json.dumps(list(results), indent=1))
        return
    for facts in results:
        print(as_text(facts) + "\n")


TEXT = "Inspect and prepare data sets."
SUBVERBS = (
    Verb(
        "cache",
        "Precompute the tokens of a recipe's frozen encoder.\n"
        "Training then reads them instead of images. Prints their size, then the time left. Rerun\n"
        "the same command to resume after the last complete file.",
        "configs/flickr8k.py --data=photos --out=/data/features --dtype=int8",
        _cache_arguments,
        _cache,
    ),
    Verb(
        "doctor",
        "Check the official files of a benchmark.\n"
        "Lists those that are present, those that are missing with the page to get them from, and\n"
        "how the splits compare with the official ones. Exits with 78 if it cannot be scored.",
        "vqav2 --dir=/data/vqav2",
        _doctor_arguments,
        _doctor,
        computes=False,
        overrides="",
    ),
    Verb(
        "prepare",
        "Write a benchmark as array_record files of TensorFlow Datasets.\n"
        "Reads its official files. Evaluation does not need this: it reads the official files.",
        "vqav2 --dir=/data/vqav2 --out=/data/tfds",
        _prepare_arguments,
        _prepare,
        computes=False,
        overrides="",
    ),
    Verb(
        "index",
        "Index a folder of tar or parquet shards: positions, counts and digests.\n"
        "Training then starts without scanning them, and stops if one has changed. Rerun the same\n"
        "command to resume; finished shards are not read again.",
        "/data/pairs",
        _index_arguments,
        _index,
        computes=False,
        overrides="",
    ),
    Verb(
        "show",
        "Show rows as the model reads them.\n"
        "Prints the images, resized and cropped for the encoder, and every token, colored by\n"
        "whether it counts in the loss.",
        "configs/flickr8k.py --data=train --workdir=runs/flickr8k --out=rows.html",
        _show_arguments,
        _show,
        computes=False,
    ),
    Verb(
        "stats",
        "Summarize data sets.\n"
        "Counts texts, lengths in tokens, texts that are cut or left out, unusable samples, image\n"
        "sizes and video lengths, and measures the reading speed.",
        "configs/flickr8k.py --data=train --workdir=runs/flickr8k",
        _stats_arguments,
        _stats,
        computes=False,
    ),
)
