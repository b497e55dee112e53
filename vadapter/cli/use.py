"""Verbs that use a trained stage: `caption`, `ask`, `export`."""

import argparse
from pathlib import Path

from vadapter.cli.common import RUN, STAGE, WEIGHTS, arg, at_least, note_stage, verb
from vadapter.console import note
from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path

_MODEL = arg(
    "workdir",
    type=as_path,
    metavar="RUN",
    help="run directory, or a folder written by `vadapter export`",
)
_MAX_NEW = arg(
    "--max-new", type=at_least(1), default=32, metavar="N",
    help="maximum length of the generated text, in tokens (default: 32)",
)  # fmt: skip


@verb(
    _MODEL,
    arg("files", nargs="+", type=Path, metavar="FILE", help="images and clips"),
    STAGE,
    _MAX_NEW,
    example="runs/quickstart photo.jpg clip.mp4",
    overrides=WEIGHTS,
)
def caption(args: argparse.Namespace) -> int:
    """Caption images and clips: prints one line `FILE: CAPTION` for each.

    Files that cannot be read are reported and skipped; the exit code is then 78. Clips are
    sampled at eight frames, or at as many as the stage was trained with.
    """
    return _describe(args, args.files, None)


@verb(
    _MODEL,
    arg("file", type=Path, metavar="FILE", help="an image or a clip"),
    arg("question", metavar="QUESTION", help="the question, in quotes"),
    STAGE,
    _MAX_NEW,
    example='runs/quickstart photo.jpg "What color is the circle?"',
    overrides=WEIGHTS,
)
def ask(args: argparse.Namespace) -> int:
    """Answer a question about an image or a clip.

    Prints the answer.
    """
    return _describe(args, [args.file], args.question)


def _describe(args: argparse.Namespace, files: list[Path], question: str | None) -> int:
    """Print results to stdout and everything else to stderr."""
    from vadapter.evaluate.describe import Describer
    from vadapter.hub.load import open_either

    loaded = open_either(args.workdir, args.stage, args.overrides)
    note_stage(loaded)
    code = 0
    questions = None if question is None else [question] * len(files)
    for reply in Describer(loaded).replies(files, questions, max_new=args.max_new):
        name = str(reply.media).encode("utf-8", "backslashreplace").decode()
        if reply.error:
            code = USER_ERROR
            note(f"{name}: {reply.error}")
        else:
            print(reply.text if question else f"{name}: {reply.text}")
    return code


@verb(
    RUN,
    arg("folder", type=Path, metavar="DIR", help="the folder to write"),
    STAGE,
    arg(
        "--components",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="STAGE/NAME,…",
        help="write these components of finished stages instead",
    ),
    arg(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of written components (default: float32)",
    ),
    example="runs/flickr8k flickr8k-adapter",
    overrides=WEIGHTS,
)
def export(args: argparse.Namespace) -> None:
    """Write a trained stage as a folder to share.

    It holds the trained components, the tokenizer and a model card. Frozen components from the
    Hugging Face Hub are referred to by id, commit and digest; those that only the run has are
    included. DIR may be an earlier export, which is replaced.

    With --components, DIR/NAME is the weights of a component for other recipes:
    components.NAME.weights=DIR/NAME. DIR/recipe.json trains them again.
    """
    from vadapter.errors import ConfigError

    if args.components:
        from vadapter.hub import components

        if args.stage or args.overrides:
            raise ConfigError("--components names stages: without --stage and --config")
        components.export(args.workdir, args.components, args.folder, args.dtype)
        print(components.report(args.folder))
        return
    if args.dtype != "float32":
        raise ConfigError(f"--dtype={args.dtype}: only with --components")
    from vadapter.hub import write
    from vadapter.stages.restore import open_run

    loaded = open_run(args.workdir, args.stage, overrides=args.overrides)
    note_stage(loaded)
    write.export(loaded, args.folder)
    print(write.report(args.folder))
