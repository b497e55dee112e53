"""`vadapter data SUBVERB`: inspect and prepare data sets, without training."""

import argparse
import json
from pathlib import Path

from vadapter.cli.common import RECIPE, Argument, arg, at_least, recipe, verb
from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path

_RECIPE = arg("config", metavar=RECIPE, help="the recipe")
_OFFICIAL = arg(
    "--dir",
    type=Path,
    metavar="DIR",
    help="folder of its official files (default: data/BENCHMARK, as in `vadapter eval`)",
)


def _data(default: str) -> Argument:
    return arg(
        "--data", type=lambda text: tuple(filter(None, text.split(","))), default=(), metavar="A,B",
        help=f"data sets (default: {default})",
    )  # fmt: skip


@verb(
    _RECIPE,
    _data("those with cache=True"),
    arg("--out", type=Path, metavar="DIR",
        help="cache folder (default: cache_dir, or RUN/features)"),
    arg("--workdir", type=as_path, metavar="RUN",
        help="run directory, if a stage of it trains the encoder"),
    arg("--dtype", choices=("bfloat16", "int8"), help="storage dtype (default: cache_dtype)"),
    example="configs/flickr8k.py --data=photos --out=/data/features --dtype=int8",
)  # fmt: skip
def cache(args: argparse.Namespace) -> None:
    """Precompute the tokens of a recipe's frozen encoder.

    Training then reads them instead of images. Prints their size, then the time left. Rerun the
    same command to resume after the last complete file.
    """
    from vadapter.distributed.preemption import signals
    from vadapter.stages.fill_caches import write_caches

    with signals() as stop:
        for name, config, source in write_caches(
            recipe(args), args.data, workdir=args.workdir, out=args.out, stored=args.dtype,
            watch=lambda name: lambda batches: stop.watch(batches, name, "features"),
        ):  # fmt: skip
            keys = {key: getattr(config, key) for key in ("cache", "cache_dir", "cache_dtype")}
            use = " ".join(f"--config.data.{name}.{key}={value}" for key, value in keys.items())
            print(f"{name}: {source.cache.folder}\n  {use}")


@verb(
    arg(
        "benchmark", nargs="?", metavar="BENCHMARK", help="its name (default: list all benchmarks)"
    ),
    _OFFICIAL,
    example="vqav2 --dir=/data/vqav2",
    computes=False,
    overrides="",
)
def doctor(args: argparse.Namespace) -> int:
    """Check the official files of a benchmark.

    Lists those that are present, those that are missing with the page to get them from, and how
    the splits compare with the official ones. Exits with 78 if it cannot be scored.
    """
    from vadapter.data.benchmarks.doctor import diagnose, list_benchmarks

    if args.benchmark is None:
        lines, usable = list_benchmarks(), True
    else:
        lines, usable = diagnose(args.benchmark, args.dir or Path("data", args.benchmark))
    print("\n".join(lines))
    return 0 if usable else USER_ERROR


@verb(
    arg("benchmark", metavar="BENCHMARK", help="its name"),
    _OFFICIAL,
    arg("--out", type=Path, required=True, metavar="DIR", help="data_dir of TensorFlow Datasets"),
    example="vqav2 --dir=/data/vqav2 --out=/data/tfds",
    computes=False,
    overrides="",
)
def prepare(args: argparse.Namespace) -> None:
    """Write a benchmark as array_record files of TensorFlow Datasets.

    Reads its official files. Evaluation does not need this: it reads the official files.
    """
    from vadapter.data.benchmarks.builders import prepare

    print(prepare(args.benchmark, args.dir or Path("data", args.benchmark), args.out))


@verb(
    arg("path", type=as_path, metavar="PATH", help="a folder of shards"),
    arg("--out", type=as_path, metavar="FILE", help="index file (default: PATH/index.vadapter)"),
    arg("--verify", action="store_true", help="read all shards again and compare their digests"),
    example="/data/pairs",
    computes=False,
    overrides="",
)
def index(args: argparse.Namespace) -> None:
    """Index a folder of tar or parquet shards: positions, counts and digests.

    Training then starts without scanning them, and stops if one has changed. Rerun the same
    command to resume; finished shards are not read again.
    """
    from vadapter.data.shards import index

    print((index.verify if args.verify else index.build)(args.path, args.out))


_INSPECT = (
    _RECIPE,
    _data("all that the stage trains on"),
    arg("--stage", default="", metavar="S",
        help="stage whose image size and tokenizer are used (default: the first that reads the "
        "data)"),
    arg("--workdir", type=as_path, metavar="RUN", help="run directory, for its tokenizer"),
)  # fmt: skip


@verb(
    *_INSPECT,
    arg("--n", type=at_least(1), default=4, metavar="N", help="rows of each data set (default: 4)"),
    arg("--out", type=Path, metavar="FILE.html", help="write an HTML page instead"),
    example="configs/flickr8k.py --data=photos --workdir=runs/flickr8k --out=rows.html",
    computes=False,
)
def show(args: argparse.Namespace) -> None:
    """Show rows as the model reads them.

    Prints the images, resized and cropped for the encoder, and every token, colored by whether it
    counts in the loss.
    """
    from vadapter.inspect import show_data, show_page
    from vadapter.inspect.open_data import open_data

    opened = open_data(recipe(args), args.workdir, args.stage, args.data)
    rows = (row for data in opened for row in show_data.shown(data, args.n))
    if args.out is not None:
        print(show_page.write_page(args.out, str(args.config), rows))
        return
    color = show_data.wants_color()
    print(show_data.legend(color=color) + "\n")
    for line in show_data.as_text(rows, color=color):
        print(line)


@verb(
    *_INSPECT,
    arg("--limit", type=at_least(0), default=500, metavar="N",
        help="examples to read, evenly spaced (default: 500); 0: all"),
    arg("--json", action="store_true", help="print one JSON list"),
    example="configs/flickr8k.py --data=photos --workdir=runs/flickr8k", computes=False,
)  # fmt: skip
def stats(args: argparse.Namespace) -> None:
    """Summarize data sets.

    Counts texts, lengths in tokens, texts that are cut or left out, unusable samples, image sizes
    and clip lengths, and measures the reading speed.
    """
    from vadapter.inspect import data_stats
    from vadapter.inspect.open_data import open_data

    opened = open_data(recipe(args), args.workdir, args.stage, args.data)
    results = (data_stats.stats(data, args.limit) for data in opened)
    if args.json:
        print(json.dumps(list(results), indent=1))
        return
    for facts in results:
        print(data_stats.as_text(facts) + "\n")
