"""`vadapter <verb>`: thin; every verb imports what it needs when it runs."""

import argparse
import os
import stat
import sys
from pathlib import Path

from vadapter import __version__
from vadapter.errors import NonFiniteError, Preempted, UserError


def main(argv: list[str] | None = None) -> int:
    """Runs a verb and returns its exit code, see `vadapter.errors`."""
    parser, overrides = _parser(), []
    argv = list(sys.argv[1:] if argv is None else argv)
    rest = []
    for item in argv:  # --config.a.b=v is not argparse's business
        (overrides if item.startswith("--config.") else rest).append(item)
    args = parser.parse_args(rest)
    args.overrides = [item.removeprefix("--config.") for item in overrides]
    try:
        _prepare()
        args.run(args)
    except (UserError, NonFiniteError, Preempted) as error:
        print(f"vadapter: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vadapter", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train a stage or a chain of stages; resumes by itself")
    train.add_argument("--config", required=True, metavar="FILE.py[:ARGS]", help="the recipe")
    train.add_argument("--workdir", required=True, type=Path, help="run directory")
    train.add_argument(
        "--config.a.b=VALUE", dest="_", metavar="", nargs="?", help="override a key of the recipe"
    )
    train.set_defaults(run=_train)
    return parser


def _train(args: argparse.Namespace) -> None:
    from vadapter import config
    from vadapter.train.loop import train
    from vadapter.train.recipe import read

    values = config.load(args.config)
    config.override(values, args.overrides)
    train(read(values), args.workdir)


def _prepare() -> None:
    """Compiled programs are kept on disk, in a directory of the user's own."""
    import jax

    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    cache = Path(os.environ.get("VADAPTER_COMPILE_CACHE", root / "vadapter" / "compiled"))
    try:
        cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return  # no home to write to: compile anew
    info = cache.stat()
    if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise UserError(
            f"{cache}: others can write to the compilation cache, and so run code as you; "
            f"chmod 700 it, or set VADAPTER_COMPILE_CACHE to a directory of your own"
        )
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
