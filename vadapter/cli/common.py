"""What the verbs of the command line share: rows of a table of verbs, options, printing."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.recipe.schema import Recipe

OVERRIDES = "override a key of the recipe"
WEIGHTS = "set the folder of public weights: components.NAME.weights=FOLDER"

# Keyword arguments of `add_argument` that several verbs use.
RUN: dict[str, Any] = {
    "type": as_path,
    "metavar": "RUN",
    "help": "run directory, the --workdir of `vadapter train`",
}
STAGE: dict[str, Any] = {
    "metavar": "S",
    "help": "stage of the run (default: the last trained stage)",
}
RECIPE: dict[str, Any] = {"metavar": "FILE.py[:ARGS]", "help": "the recipe"}

# Renamed options: {verb: {old: new}}. Old names work for one release, with a warning.
RENAMED = {"plan": {"--utilisation": "--utilization"}}


class Verb(NamedTuple):
    """A verb, or a subverb of `data`.

    Attributes:
      name: the word on the command line.
      text: its help; the first sentence is the summary.
      example: what follows the name on the command line.
      add_arguments: adds its arguments to a parser.
      run: takes the parsed arguments (with `overrides`, the `--config.…` items) and returns an
        exit code, None for 0. It imports what it needs, so that `--help` stays fast.
      computes: whether it joins the other hosts and needs the compilation cache.
      overrides: help of `--config.a.b=VALUE`; "" for verbs that take no recipe.
    """

    name: str
    text: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], Any]
    run: Callable[[argparse.Namespace], int | None]
    computes: bool = True
    overrides: str = OVERRIDES


def add_verbs(parsers: Any, verbs: tuple[Verb, ...], prefix: str) -> None:
    """Add a parser for each verb.

    Args:
      parsers: result of `add_subparsers`.
      verbs: rows of the table.
      prefix: command before the verb, for its example.
    """
    for verb in verbs:
        options = f"  --config.a.b=VALUE    {verb.overrides}\n\n" if verb.overrides else ""
        parser = parsers.add_parser(
            verb.name,
            help=verb.text.split(":")[0].split(".")[0],
            description=verb.text,
            epilog=f"{options}example:\n  {prefix} {verb.name} {verb.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        overridable = bool(verb.overrides)
        parser.set_defaults(run=verb.run, computes=verb.computes, overridable=overridable)
        verb.add_arguments(parser)


def recipe(args: argparse.Namespace) -> "Recipe":
    """Return the recipe of `--config` with its overrides.

    Raises:
      ConfigError: there is no such file, or a key or value is wrong.
    """
    from vadapter import config
    from vadapter.recipe.schema import Recipe, read

    values = config.load(args.config)
    config.override(values, args.overrides, Recipe)
    return read(values)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type for whole numbers of at least `least`."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return integer


def names(text: str) -> tuple[str, ...]:
    """Return the names in `a,b`, as an argument type."""
    return tuple(filter(None, text.split(",")))


def say(text: object = "") -> None:
    """Print a line to stdout, on the first host only."""
    from vadapter.distributed import hosts

    if hosts.first():
        print(text)
