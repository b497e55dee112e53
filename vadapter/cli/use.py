"""Verbs that use a trained stage: `caption`, `ask`, `export`."""

import argparse
import sys
from pathlib import Path

from vadapter.cli.common import RUN, STAGE, WEIGHTS, Verb, at_least
from vadapter.errors import USER_ERROR
from vadapter.io.storage import as_path


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "workdir", type=as_path, metavar="RUN",
        help="run directory, or a folder written by `vadapter export`",
    )  # fmt: skip


def _decode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stage", **STAGE)
    parser.add_argument(
        "--max-new", type=at_least(1), default=32, metavar="N",
        help="maximum length of the generated text, in tokens (default: 32)",
    )  # fmt: skip


def _caption_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="images and videos")
    _decode_arguments(parser)


def _caption(args: argparse.Namespace) -> int:
    return _describe(args, args.files, None)


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("file", type=Path, metavar="FILE", help="an image or a video")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    _decode_arguments(parser)


def _ask(args: argparse.Namespace) -> int:
    return _describe(args, [args.file], args.question)


def _describe(args: argparse.Namespace, files: list[Path], question: str | None) -> int:
    """Print results to stdout and everything else to stderr."""
    from vadapter.evaluate.describe import describe
    from vadapter.hub.load import open_either

    loaded = open_either(args.workdir, args.stage, args.overrides)
    print(f"vadapter: {loaded.name}, step {loaded.step}", file=sys.stderr)
    failed = 0
    for reply in describe(loaded, files, question=question, max_new=args.max_new):
        name = str(reply.media).encode("utf-8", "backslashreplace").decode()
        if reply.error:
            failed += 1
            print(f"vadapter: {name}: {reply.error}", file=sys.stderr)
        else:
            print(reply.text if question else f"{name}: {reply.text}")
    return USER_ERROR if failed else 0


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("workdir", **RUN)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write")
    parser.add_argument("--stage", **STAGE)


def _export(args: argparse.Namespace) -> None:
    from vadapter.hub.write import export, report
    from vadapter.stages.restore import open_run

    loaded = open_run(args.workdir, args.stage, overrides=args.overrides)
    print(f"{loaded.name}, step {loaded.step}")
    print(report(args.folder, export(loaded, args.folder)))


VERBS = (
    Verb(
        "caption",
        "Caption images and videos: prints one line `FILE: CAPTION` for each.\n"
        "Files that cannot be read are reported and skipped; the exit code is then 78. Videos are\n"
        "sampled at eight frames, or at as many as the stage was trained with.",
        "runs/quickstart photo.jpg clip.mp4",
        _caption_arguments,
        _caption,
        overrides=WEIGHTS,
    ),
    Verb(
        "ask",
        "Answer a question about an image or a video.\nPrints the answer.",
        'runs/quickstart photo.jpg "What color is the circle?"',
        _ask_arguments,
        _ask,
        overrides=WEIGHTS,
    ),
    Verb(
        "export",
        "Write a trained stage as a folder to share.\n"
        "It holds the trained components, the tokenizer and a model card. Frozen components from\n"
        "the Hugging Face Hub are referred to by id, commit and digest; those that only the run\n"
        "has are included. DIR may be an earlier export, which is replaced.",
        "runs/flickr8k flickr8k-adapter",
        _export_arguments,
        _export,
        overrides=WEIGHTS,
    ),
)
