"""`vadapter inspect RUN [IMAGE…]`: what an adapter says to the language model."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vadapter.cli.common import arg, at_least, say, verb
from vadapter.console import note, table
from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path

if TYPE_CHECKING:
    from vadapter.inspect.inspection import Inspected


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


@verb(
    arg("paths", nargs="+", type=as_path, metavar="RUN", help="run directories, or the directory "
        "of a comparison; then, optionally, images and clips to look at"),
    arg("--stage", metavar="S",
        help="stage of the run (default: all adapter stages, side by side)"),
    arg("--evals", type=_names, default=(), metavar="A,B",
        help="evaluations whose items are looked at (default: those of the stage)"),
    arg("--layer", default="", metavar="N,M",
        help="layers of the language model to read words from (default: the middle one)"),
    arg("--limit", type=at_least(0), default=None, metavar="N",
        help="items of each evaluation, evenly spaced (default: 200); 0: all"),
    arg("--show", type=at_least(1), default=None, metavar="N",
        help="items of each evaluation on the page, with attention maps (default: 4)"),
    arg("--top", type=at_least(1), default=None, metavar="N",
        help="nearest words of each soft token (default: 5)"),
    arg("--out", type=Path, metavar="FILE.html",
        help="page to write, and beside it FILE.json (default: RUN/inspect.html, or "
        "RUN/inspect_files.html for images; with --probe FILE.json, default: RUN/probe.json)"),
    arg("--probe", action="store_true",
        help="instead, probe the frozen encoder on generated scenes, by default that of the last "
        "stage that sees images"),
    arg("--steps", default=None, metavar="N,M",
        help="with --probe and --stage: probe the encoder in these checkpoints, or in all of them "
        "(default: the newest)"),
    arg("--scenes", type=at_least(4), default=None, metavar="N",
        help="with --probe: images that probes are trained on (default: 4000)"),
    example="runs/quickstart photo.jpg",
    overrides="override data, evals, mesh, workers, components.NAME.weights",
)  # fmt: skip
def inspect(args: argparse.Namespace) -> int:
    """Show what an adapter says to the language model, and whether the image is used.

    Loss and score with the right image, a wrong, a blank and (clips) a frame-shuffled one; the
    nearest words of every soft token, where the queries look, and the words in the language
    model's states. Writes one HTML page and one JSON file, for several stages, runs or the arms of
    a comparison side by side. With images, only these are looked at; those that cannot be read are
    reported and skipped, and the exit code is then 78.

    With --probe: which facts (color, shape, size, place, count, motion) a linear layer and one
    attention layer can read of an encoder's tokens, on held-out scenes.
    """
    if args.probe:
        return _probe(args)
    from vadapter.errors import ConfigError
    from vadapter.inspect import look, subjects
    from vadapter.inspect.inspection import Settings
    from vadapter.inspect.probe import parse_numbers

    for option in ("steps", "scenes"):
        if (value := getattr(args, option)) is not None:
            raise ConfigError(f"--{option}={value}: only with --probe")
    given = {key: getattr(args, key) for key in ("limit", "show", "top")}
    settings = Settings(
        **{key: value for key, value in given.items() if value is not None},
        layers=parse_numbers("--layer", args.layer), evals=args.evals,
    )  # fmt: skip
    folders, files = look.divide(args.paths)
    chosen = subjects.find(folders, args.stage, args.overrides)
    out = look.destination(args.out, folders, files)
    facts, found, errors = look.look(chosen, files, settings, args.overrides, note)
    for file, reason in errors.items():
        note(f"{_printable(file)}: {reason}")
    if len(errors) < len(set(files)) or not files:
        say(_files(found) if files else table(*look.overview(found), right=range(2, 12)))
        page = look.write(out, " · ".join(map(str, folders)), facts, found)
        say(f"\n{page}")
    return USER_ERROR if errors else 0


def _probe(args: argparse.Namespace) -> int:
    from vadapter.errors import ConfigError
    from vadapter.inspect import probe_encoder
    from vadapter.inspect.look import require_writable

    others = {"--evals": args.evals, "--layer": args.layer, "--limit": args.limit,
              "--show": args.show, "--top": args.top}  # fmt: skip
    for option, value in others.items():
        if value not in (None, "", ()):
            raise ConfigError(f"{option}: not with --probe, which has --scenes=N alone")
    out = args.out
    if out is None:
        if len(args.paths) > 1:
            raise ConfigError("several runs: say where to write the numbers, --out=FILE.json")
        out = args.paths[0] / "probe.json"
    elif out.suffix.lower() != ".json":
        raise ConfigError(f"--out={out}: with --probe the name of a file that ends in .json")
    targets = probe_encoder.find(args.paths, args.stage, args.steps or "")
    for path in (out, out.with_suffix(".csv")):
        require_writable(path)
    scenes = args.scenes or probe_encoder.SCENES
    record = probe_encoder.probe(targets, scenes, args.overrides, note)
    say(table(probe_encoder.rows(record), probe_encoder.HEADER, right=range(4, 8)))
    say()
    for path in probe_encoder.write(out, record):
        say(path)
    return 0


def _files(found: "list[Inspected]") -> str:
    """Return the caption of every file by every subject."""
    lines = []
    for each in found:
        for facts in each.facts["files"]:
            words = [token[0][0] for token in facts.get("soft_tokens", [])]
            lines.append(f"{facts['file']}: {each.label}: {facts['text']}")
            if words:
                lines.append(f"  nearest words: {' '.join(words)}")
    return "\n".join(lines)


def _printable(path: Any) -> str:
    return str(path).encode("utf-8", "backslashreplace").decode()
