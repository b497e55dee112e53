"""What the verbs of the command line share: a function as a verb, its arguments, printing."""

import argparse
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from vadapter.console import note
from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.recipe.schema import Recipe
    from vadapter.stages.stage import Stage

OVERRIDES = "override a key of the recipe"
WEIGHTS = "set the folder of public weights: components.NAME.weights=FOLDER"

Argument = Callable[[Any], Any]  # adds itself to a parser, or to a group of one


class Verb(NamedTuple):
    """A verb, or a subverb of `data`; its help is the docstring of `run`.

    Attributes:
      run: takes the parsed arguments (with `overrides`, the `--config.…` items) and returns an
        exit code, None for 0. It imports what it needs, so that `--help` stays fast.
      arguments: see `arg`.
      example: what follows the name on the command line.
      computes: whether it joins the other hosts and needs the compilation cache.
      overrides: help of `--config.a.b=VALUE`; "" for verbs that take no recipe.
    """

    run: Callable[[argparse.Namespace], int | None]
    arguments: tuple[Argument, ...]
    name: str
    example: str
    computes: bool = True
    overrides: str = OVERRIDES


def verb(*arguments: Argument, name: str = "", **settings: Any) -> Callable[[Callable], Verb]:
    """Make a function a verb, by default of its own name, see `Verb`."""
    return lambda run: Verb(run, arguments, name or run.__name__, **settings)


def add_verbs(parsers: Any, verbs: tuple[Verb, ...], prefix: str) -> None:
    """Add a parser for each verb to the result of `add_subparsers`, after a prefix in examples."""
    for row in verbs:
        text = inspect.getdoc(row.run) or ""
        options = f"  --config.a.b=VALUE    {row.overrides}\n\n" if row.overrides else ""
        parser = parsers.add_parser(
            row.name,
            help=text.split(":")[0].split(".")[0],
            description=text,
            epilog=f"{options}example:\n  {prefix} {row.name} {row.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.set_defaults(row=row)
        for argument in row.arguments:
            argument(parser)


def arg(*names: str, **options: Any) -> Argument:
    """Return an argument of a verb, given as to `ArgumentParser.add_argument`."""
    return lambda parser: parser.add_argument(*names, **options)


def either(*arguments: Argument) -> Argument:
    """Return arguments of which only one may be given."""

    def add(parser: argparse.ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for argument in arguments:
            argument(group)

    return add


class Renamed(argparse.Action):
    """The old name of an option, which still works for one release, with a warning."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        note(
            f"warning: {option_string} is now --{self.dest}; the old name will be removed in the "
            "next release"
        )
        setattr(namespace, self.dest, values)


def at_least(least: int) -> Callable[[str], int]:
    """Return an argument type for whole numbers of at least `least`."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"{text}: must be at least {least}")
        return value

    return integer


# Arguments of several verbs.
RUN = arg(
    "workdir", type=as_path, metavar="RUN", help="run directory, the --workdir of `vadapter train`"
)
STAGE = arg("--stage", metavar="S", help="stage of the run (default: the last trained stage)")
RECIPE = "FILE.py[:ARGS]"
CONFIG = arg(
    "--config", required=True, metavar=RECIPE, help="the recipe, or the config.json of a run"
)


def recipe(args: argparse.Namespace) -> "Recipe":
    """Return the recipe of `args.config` with its overrides.

    Raises:
      ConfigError: there is no such file, or a key or value is wrong.
    """
    from vadapter import config
    from vadapter.recipe.schema import Recipe, read

    if args.config.endswith(".json"):
        from vadapter.stages.restore import stored_recipe

        values = stored_recipe(config.find_recipe(args.config))
    else:
        values = config.load(args.config)
    config.override(values, args.overrides, Recipe)
    return read(values)


def note_stage(stage: "Stage") -> None:
    """Print to stderr which stage is used, and its step, on the first host only."""
    from vadapter.distributed import hosts

    if hosts.first():
        note(f"using stage {stage.name}, step {stage.step}")


def say(text: object = "") -> None:
    """Print a line to stdout, on the first host only."""
    from vadapter.distributed import hosts

    if hosts.first():
        print(text)
