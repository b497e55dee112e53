"""`vadapter VERB`: the parser, the setup of a process, and the exit codes.

The verbs are in the modules beside this one; each imports what it needs when it runs.
"""

import argparse
import difflib
import gc
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from vadapter import __version__, errors
from vadapter.cli import compare, data, evaluate, inspect, plan, train, use
from vadapter.cli.common import add_verbs
from vadapter.console import note
from vadapter.io.buckets import bucket_errors

VERBS = (
    train.quickstart, train.train, train.rewind, train.check, evaluate.evaluate, use.caption,
    use.ask, inspect.inspect, use.export, plan.plan, compare.compare,
)  # fmt: skip
DATA = "Inspect and prepare data sets."
SUBVERBS = (data.cache, data.doctor, data.prepare, data.index, data.show, data.stats)
FAILURES = (errors.UserError, errors.NonFiniteError, errors.Preempted, errors.HostError)
_FORMAT_WARNING = warnings.formatwarning
EXIT_CODES = (
    "exit codes: 0 success, 1 a host died or hung, or an internal error, 2 invalid command line,\n"
    "75 stopped by a signal with its state saved: rerun the same command, 77 training diverged,\n"
    "78 user error: fix the configuration, data, checkpoint, disk space or device memory,\n"
    "134 aborted by JAX because another host died, 137 killed"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors name the option that is nearest to an unknown one."""

    _words: Sequence[str] = ()  # that are parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; an unknown one is an error of the verb, which prints its own usage."""
        self._words = sys.argv[1:] if args is None else list(args)
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """Print the usage and the error, then exit with 2."""
        super().error(f"{message}{''.join(map(self._hint, self._words))}")

    def _hint(self, word: str) -> str:
        """Return what an unknown option was meant to be; "" for other words."""
        name, dot, key = word.partition("=")[0].partition(".")
        known = self._option_string_actions
        if not name.startswith("--") or name in known:
            return ""
        close = difflib.get_close_matches(name, known, 1, 0.65)
        return f"; {name}{dot}{key}: did you mean {close[0]}{dot}{key}?" if close else ""


def main(argv: list[str] | None = None) -> int:
    """Run a verb, by default that of this process, and return its exit code, see `vadapter.errors`.

    Raises:
      SystemExit: with 2 for a mistake in the command line, with 0 after `--help`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file gets its lines as they are printed
    warnings.formatwarning = _one_line
    parser, overrides, rest = _parser(), [], []
    for word in sys.argv[1:] if argv is None else argv:
        (overrides if word.startswith("--config.") else rest).append(word)
    try:
        args = parser.parse_args(rest)
    except errors.UserError as error:  # an invalid path
        return _failed(error)
    if overrides and not args.row.overrides:
        parser.error(f"{args.verb} takes no recipe: {overrides[0]}")
    args.overrides = [word.removeprefix("--config.") for word in overrides]
    code, reason = _attempt(args)
    if not args.row.computes:
        return code
    from vadapter.distributed.shutdown import end_job

    return end_job(code, reason)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="vadapter",
        description="Align a frozen vision encoder with a frozen language model.",
        epilog=f"See `vadapter VERB --help` for the options of a verb.\n\n{EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    add_verbs(verbs, VERBS, "vadapter")
    group = verbs.add_parser("data", help=DATA.rstrip("."), description=DATA, allow_abbrev=False)
    subverbs = group.add_subparsers(dest="subverb", required=True, metavar="SUBVERB")
    add_verbs(subverbs, SUBVERBS, "vadapter data")
    return parser


def _attempt(args: argparse.Namespace) -> tuple[int, str]:
    """Run the verb; return the exit code, and the reason if it is not 0."""
    try:
        if args.row.computes:
            _prepare()
        with bucket_errors(), errors.disk_errors():
            return args.row.run(args) or 0, ""
    except FAILURES as error:
        return _failed(error), str(error)
    except KeyboardInterrupt:
        note("stopped")
        return 130, "stopped"
    except BrokenPipeError:  # the reader of the output has exited, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13, "the reader of its output has exited"
    except Exception as error:
        if not args.row.computes:
            raise
        return _unexpected(error)


def _one_line(message: Any, category: type[Warning], *place: Any) -> str:
    """Return a warning as text, for renamed keys without the line of code that warns."""
    if issubclass(category, errors.RenamedWarning):
        return f"vadapter: warning: {message}\n"
    return _FORMAT_WARNING(message, category, *place)


def _failed(error: Any) -> int:
    note(error)
    return error.exit_code


def _unexpected(error: Exception) -> tuple[int, str]:
    """Return the exit code and the reason of an error that no handler expects.

    Exhausted device memory is a user error wherever it occurs. On a single host everything else
    is raised. On several, the traceback is printed here and the job ended at once: the other hosts
    would wait for this one until their deadline.
    """
    from vadapter.distributed import hosts, memory, shutdown

    if memory.exhausted(error):
        reason = memory.described(error)
        note(reason)
        return errors.USER_ERROR, reason
    if hosts.count() == 1:
        raise error
    if cause := shutdown.cause(error):  # another host failed first
        note(cause[1])
        return cause
    traceback.print_exception(error)
    return errors.LOST, f"{type(error).__name__}: {error}"


def _prepare() -> None:
    """Join the other hosts and set up the compilation cache, in a directory of the user.

    Raises:
      ConfigError: others can write to the directory, see `results.keep_in`.
    """
    # Modules and traced programs are millions of objects that stay: looking for cycles among them
    # takes 6 % of a short run (BUILD_NOTES, "Compile time").
    gc.set_threshold(50_000, 20, 50)
    import jax

    from vadapter.distributed import cpu, hosts, shutdown
    from vadapter.io import results, storage

    cpu.prepare()
    hosts.start()
    shutdown.follow()
    if jax.distributed.is_initialized():
        jax.devices()  # hosts start their backends together: one alone would wait for the others

    cache = Path(os.environ.get("VADAPTER_COMPILE_CACHE") or storage.user_cache("compiled"))
    results.keep_in(cache)
    if results.folder():
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # Small models compile in less than JAX's limit of a second, several programs of them.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
