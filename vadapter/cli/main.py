"""`vadapter VERB`: thin; every verb imports what it needs when it runs."""

import argparse
import json
import os
import stat
import sys
import traceback
from pathlib import Path
from typing import Any

from vadapter import __version__
from vadapter.cli import evaluate, plan
from vadapter.cli.data import add_data, at_least
from vadapter.cli.data import recipe as _recipe
from vadapter.errors import (
    LOST,
    USER_ERROR,
    ConfigError,
    HostError,
    NonFiniteError,
    Preempted,
    UserError,
    disk_errors,
)
from vadapter.io.buckets import bucket_errors
from vadapter.io.storage import as_path

RUN: dict[str, Any] = {
    "type": as_path,
    "metavar": "RUN",
    "help": "run directory, the --workdir of `vadapter train`",
}
TRAINED: dict[str, Any] = RUN | {"help": "run directory, or a folder of `vadapter export`"}
STAGE: dict[str, Any] = {
    "metavar": "S",
    "help": "stage of the run (default: the last that is trained)",
}
MAX_NEW: dict[str, Any] = {
    "default": 32,
    "metavar": "N",
    "help": "longest text in tokens (32)",
}
MOVED = "where public weights lie now: components.NAME.weights=FOLDER"
CONFIG: dict[str, Any] = {"metavar": "FILE.py[:ARGS]"}
EXIT_CODES = (
    "exit codes: 0 finished, 1 a host was lost or hung, or a bug, 2 mistake in the command,\n"
    "75 stopped by a signal and saved, 77 training diverged,\n"
    "78 something to mend in configuration, data, checkpoints, disk or device memory,\n"
    "134 ended by JAX as another host died or fell silent, 137 killed"
)


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns its exit code, see `vadapter.errors`; 2: a mistake in the command."""
    parser, overrides, rest = _parser(), [], []
    for item in sys.argv[1:] if argv is None else argv:  # not argparse's business
        (overrides if item.startswith("--config.") else rest).append(item)
    try:
        args = parser.parse_args(rest)
    except UserError as error:  # of a path
        print(f"vadapter: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    if overrides and not args.overridable:
        parser.error(f"{args.verb} takes no recipe: {overrides[0]}")
    args.overrides = [item.removeprefix("--config.") for item in overrides]
    code, reason = _attempt(args)
    if not args.computes:
        return code
    from vadapter.distributed.shutdown import end_job

    return end_job(code, reason)


def _attempt(args: argparse.Namespace) -> tuple[int, str]:
    """Runs the verb; returns the exit code, and why it is not 0."""
    try:
        if args.computes:
            _prepare()
        with bucket_errors(), disk_errors():
            return args.run(args) or 0, ""
    except (UserError, NonFiniteError, Preempted, HostError) as error:
        print(f"vadapter: {error}", file=sys.stderr, flush=True)
        return error.exit_code, str(error)
    except KeyboardInterrupt:
        print("vadapter: stopped", file=sys.stderr, flush=True)
        return 130, "stopped"
    except BrokenPipeError:  # the reader of the output has gone, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13, "nobody reads its output"
    except Exception as error:
        if not args.computes:
            raise
        return _unforeseen(error)


def _unforeseen(error: Exception) -> tuple[int, str]:
    """What no handler knows has a traceback: in a job of several hosts soon, or all would wait.

    But for memory that is used up, wherever that was.
    """
    from vadapter.distributed import hosts, memory, shutdown

    if memory.exhausted(error):
        told = memory.described(error)
        print(f"vadapter: {told}", file=sys.stderr, flush=True)
        return USER_ERROR, told
    if hosts.count() == 1:
        raise error
    if of_another := shutdown.cause(error):
        print(f"vadapter: {of_another[1]}", file=sys.stderr, flush=True)
        return of_another
    traceback.print_exception(error)
    return LOST, f"{type(error).__name__}: {error}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vadapter",
        description="Aligns a frozen vision encoder with a frozen language model.",
        epilog=f"`vadapter VERB --help` tells more.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, example: str, overrides: str):
        options = f"  --config.a.b=VALUE    {overrides}\n\n" if overrides else ""
        sub = verbs.add_parser(
            name,
            help=text.split(":")[0].split(".")[0],
            description=text,
            epilog=f"{options}example:\n  vadapter {name} {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=run, computes=True, overridable=bool(overrides))
        return sub

    sub = verb(
        "quickstart", _quickstart,
        "Trains the whole method on embedded scenes, with nothing to download.\n"
        "Stage by stage, then prints a table and writes a plot and a gallery. The same command\n"
        "again goes on where it stopped, and reuses what is done.",
        "--workdir=runs/quickstart", overrides="override a key of the recipe",
    )  # fmt: skip
    sub.add_argument(
        "--workdir", type=as_path, default=Path("runs/quickstart"), metavar="DIR",
        help="run directory (runs/quickstart)",
    )  # fmt: skip
    sub.add_argument("--config", default="configs/quickstart.py", **CONFIG, help="another recipe")

    sub = verb(
        "train", _train,
        "Trains the stages of a recipe: what is done is not done again, what was stopped is\n"
        "resumed. With evaluations it ends with table.md, plots/ and gallery.html in RUN.",
        "--config=configs/flickr8k.py --workdir=runs/flickr8k --config.seed=1",
        overrides="override a key of the recipe",
    )  # fmt: skip
    sub.add_argument("--config", required=True, **CONFIG, help="the recipe")
    sub.add_argument("--workdir", required=True, type=as_path, metavar="RUN", help="run directory")

    sub = verb(
        "rewind", _rewind,
        "Goes back to an earlier checkpoint of a run that is stopped: later ones are put aside in\n"
        "`quarantine/`, and the next `vadapter train` continues from there.",
        "runs/flickr8k --step=4000", overrides="",
    )  # fmt: skip
    sub.set_defaults(computes=False)
    sub.add_argument("workdir", **RUN)
    sub.add_argument(
        "--step", type=at_least(0), required=True, metavar="N", help="the last that stays"
    )
    sub.add_argument("--stage", metavar="S", help="stage of the run (the one it has come to)")

    sub = verb(
        "check", _check,
        "Shows what a recipe would train, and all that would stop it: joined parts, shapes,\n"
        "parameters, starts, tokenizers, data, memory. Reads no tensor and writes nothing.",
        "--config=configs/flickr8k.py --workdir=runs/flickr8k",
        overrides="override a key of the recipe",
    )  # fmt: skip
    sub.set_defaults(computes=False)
    sub.add_argument("--config", required=True, **CONFIG, help="the recipe")
    sub.add_argument(
        "--workdir", type=as_path, metavar="RUN", help="run directory, where stages may be finished"
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object")

    sub = verb(
        "eval", evaluate.run, evaluate.TEXT, evaluate.EXAMPLE, overrides=evaluate.OVERRIDES
    )  # fmt: skip
    sub.add_argument("workdir", **RUN)
    sub.add_argument("--stage", **STAGE)
    evaluate.add_arguments(sub)

    sub = verb(
        "caption", _caption,
        "Captions images and clips: prints `FILE: CAPTION` lines.\n"
        "A file that cannot be read is reported and the others are captioned; the exit code is\n"
        "then 78. Of a clip eight frames are read, or as many as the stage was trained with.",
        "runs/quickstart photo.jpg clip.mp4", overrides=MOVED,
    )  # fmt: skip
    sub.add_argument("workdir", **TRAINED)
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE", help="images and clips")
    sub.add_argument("--stage", **STAGE)
    sub.add_argument("--max-new", type=at_least(1), **MAX_NEW)

    sub = verb(
        "ask", _ask,
        "Answers a question about an image or a clip: prints the answer.",
        'runs/quickstart photo.jpg "What color is the circle?"', overrides=MOVED,
    )  # fmt: skip
    sub.add_argument("workdir", **TRAINED)
    sub.add_argument("file", type=Path, metavar="FILE", help="an image or a clip")
    sub.add_argument("question", metavar="QUESTION", help="in quotes")
    sub.add_argument("--stage", **STAGE)
    sub.add_argument("--max-new", type=at_least(1), **MAX_NEW)

    sub = verb(
        "export", _export,
        "Writes a trained stage as a folder to share: its trained parts, its tokenizer, a model\n"
        "card, and of frozen parts the hub id, commit and digest. Frozen parts that only the run\n"
        "has are enclosed. DIR may be an earlier export, which is then replaced.",
        "runs/flickr8k flickr8k-adapter", overrides=MOVED,
    )  # fmt: skip
    sub.add_argument("workdir", **RUN)
    sub.add_argument("folder", type=Path, metavar="DIR", help="the folder to write")
    sub.add_argument("--stage", **STAGE)

    plan.add_verb(verb)
    add_data(verbs)
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from vadapter.cli.quickstart import quickstart

    quickstart(_recipe(args), args.workdir)


def _train(args: argparse.Namespace) -> None:
    from vadapter.train.loop import train

    recipe = _recipe(args)
    train(recipe, args.workdir)
    import jax

    if jax.process_index() == 0 and any(recipe.stages[name].evals for name in recipe.chain):
        from vadapter.cli.quickstart import show
        from vadapter.report.report import write_report

        show(write_report(args.workdir, recipe))


def _rewind(args: argparse.Namespace) -> None:
    from vadapter.train.rewind import rewind

    stage, step, later = rewind(args.workdir, args.step, args.stage)
    told = ", ".join(map(str, later)) or "none"
    print(f"{stage}: goes on from step {step}; put aside: {told}", flush=True)


def _check(args: argparse.Namespace) -> None:
    from vadapter.inspect.check import check
    from vadapter.inspect.check_text import as_text

    facts, problems = check(lambda: _recipe(args), args.workdir)
    print(json.dumps(facts, indent=1) if args.json else as_text(facts), flush=True)
    problems.settle()


def _caption(args: argparse.Namespace) -> int:
    return _describe(args, args.files, None)


def _ask(args: argparse.Namespace) -> int:
    return _describe(args, [args.file], args.question)


def _describe(args: argparse.Namespace, files: list[Path], question: str | None) -> int:
    """Results to stdout, everything else to stderr."""
    from vadapter.evaluate.describe import describe
    from vadapter.hub.load import open_either

    loaded = open_either(args.workdir, args.stage, args.overrides)
    print(f"vadapter: {loaded.stage}, step {loaded.step}", file=sys.stderr, flush=True)
    failed = 0
    for reply in describe(loaded, files, question=question, max_new=args.max_new):
        name = str(reply.media).encode("utf-8", "backslashreplace").decode()
        if reply.error:
            failed += 1
            print(f"vadapter: {name}: {reply.error}", file=sys.stderr, flush=True)
        else:
            print(reply.text if question else f"{name}: {reply.text}", flush=True)
    return USER_ERROR if failed else 0


def _export(args: argparse.Namespace) -> None:
    from vadapter.hub.write import export, report
    from vadapter.stages.restore import open_run

    loaded = open_run(args.workdir, args.stage, overrides=args.overrides)
    print(f"{loaded.stage}, step {loaded.step}", flush=True)
    print(report(args.folder, export(loaded, args.folder)), flush=True)


def _prepare() -> None:
    """Joins the other hosts; keeps compiled programs on disk, in a directory of the user's own."""
    import jax

    from vadapter.distributed import hosts, shutdown
    from vadapter.distributed.compile import keep_memory

    hosts.start()
    shutdown.follow()
    keep_memory()

    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("VADAPTER_COMPILE_CACHE", root / "vadapter" / "compiled"))
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return  # no home to write to: compile again
    info = cache.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(
            f"{cache}: others can write to the compilation cache, and so run code as you; "
            f"chmod 700 it, or set VADAPTER_COMPILE_CACHE to a directory of your own"
        )
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
