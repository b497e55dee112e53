"""`vadapter inspect`: every subject in turn, then one page and one JSON file."""

import gc
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vadapter
from vadapter.config import require_one_of
from vadapter.console import listing
from vadapter.distributed import hosts
from vadapter.errors import ConfigError, DataError
from vadapter.inspect.inspection import (
    Facts,
    Inspected,
    Settings,
    inspect_files,
    inspect_held_out,
    open_probe,
)
from vadapter.inspect.subjects import Subject
from vadapter.io import storage
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.restore import open_run
from vadapter.stages.stage import Stage

MAX_NEW = 32  # tokens of the caption of a file, as in `vadapter caption`


def look(
    subjects: Sequence[Subject], files: Sequence[Path], settings: Settings,
    overrides: Sequence[str] = (), say: Any = lambda text: None,
) -> tuple[Facts, list[Inspected], dict[Path, str]]:  # fmt: skip
    """Look at subjects one after the other, which need memory one at a time.

    Args:
      files: images and clips to look at; none: held-out items.
      overrides: see `read_run`.
      say: is called with a line before each subject.

    Returns:
      What becomes JSON, the same with pixels, and why some files cannot be read.

    Raises:
      UserError: a run or its data cannot be read, or subjects have different held-out items.
    """
    if hosts.count() > 1:
        raise ConfigError("`vadapter inspect` runs on one host; it uses all devices of that host")
    found: list[Inspected] = []
    errors: dict[Path, str] = {}
    for subject in subjects:
        stage = open_run(subject.workdir, subject.stage, overrides=overrides)
        say(f"looking at {subject.label}: stage {stage.name}, step {stage.step}")
        probe = open_probe(stage, settings)
        if files:
            inspected, reasons = inspect_files(subject.label, probe, files, settings, MAX_NEW)
            errors |= reasons
        else:
            evals = evaluations(stage, settings.evals)
            inspected = inspect_held_out(subject.label, probe, evals, settings)
            _require_same_items(found, inspected)
        found.append(inspected)
        del stage, probe
        gc.collect()  # parameters on the devices, before those of the next subject
    facts = {
        "format": "vadapter-inspect",
        "version": 1,
        "vadapter": vadapter.__version__,
        "limit": settings.limit,
        "unreadable": {str(file): reason for file, reason in errors.items()},
        "subjects": [each.facts for each in found],
    }
    return facts, found, errors


def evaluations(stage: Stage, names: Sequence[str] = ()) -> dict[str, EvalConfig]:
    """Return the evaluations of a recipe that are looked at, by name.

    By default those of the stage, or all of the recipe, or one of each data set on which the stage
    measures its loss.

    Raises:
      ConfigError: an unknown name, or nothing to look at.
    """
    known = stage.recipe.evals
    for name in names:
        require_one_of(f"--evals={name}", name, known)
    chosen = names or stage.config.evals or tuple(known)
    evals = {name: known[name] for name in chosen}
    evals = evals or {name: EvalConfig(name) for name in stage.config.loss}
    if not evals:
        raise ConfigError(
            f"the recipe of {stage.workdir} has no held-out data (evals, or loss of stage "
            f"{stage.name}): give images to look at, or add --config.evals.NAME.data=DATA"
        )
    return evals


def _require_same_items(before: Sequence[Inspected], new: Inspected) -> None:
    """Raise DataError unless subjects that share an evaluation have the same items of it."""
    for other in before:
        shared = other.facts["evals"].keys() & new.facts["evals"].keys()
        for name in sorted(shared):
            first, second = other.facts["evals"][name], new.facts["evals"][name]
            pairs = ((f["fingerprint"], [i["index"] for i in f["items"]]) for f in (first, second))
            if len({repr(pair) for pair in pairs}) > 1:
                raise DataError(
                    f"{other.label} and {new.label} have different items in evaluation {name}: "
                    f"only runs over the same data can be shown together (of {listing(shared)})"
                )


# -- command line ----------------------------------------------------------------------------------

PAGE, FILES = "inspect.html", "inspect_files.html"
_HEADER = (
    "adapter", "evaluation", "items", "loss", "wrong", "blank", "score", "wrong", "blank",
    "own words, %", "another's", "ended, %",
)  # fmt: skip


def divide(paths: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Return the run directories and the files among the arguments; the first is a directory."""
    folders = [path for i, path in enumerate(paths) if not i or path.is_dir()]
    return folders, [path for i, path in enumerate(paths) if i and not path.is_dir()]


def destination(out: Path | None, folders: Sequence[Path], files: Sequence[Path]) -> Path:
    """Return where the page is written, which is possible now.

    Raises:
      ConfigError: several runs and no place, not the name of an HTML file, or it cannot be written.
    """
    if out is None:
        if len(folders) > 1:
            raise ConfigError("several runs: say where to write the page with --out=FILE.html")
        out = storage.as_path(folders[0]) / (FILES if files else PAGE)
    elif out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"--out={out}: the name of the page, which ends in .html; images to look at are given "
            "behind the run, without --out"
        )
    for path in (out, out.with_suffix(".json")):
        require_writable(path)
    return out


def require_writable(path: Path) -> None:
    """Raise ConfigError if a local file cannot be written; nothing is left behind."""
    if storage.remote(path):
        return
    hint = f"choose another file with --out=FILE{path.suffix}"
    if path.is_dir():
        raise ConfigError(f"{path} cannot be written: it is a directory; {hint}")
    parent = next(each for each in path.absolute().parents if each.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(b"1")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); {hint}") from error


def write(out: Path, name: str, facts: Facts, found: Sequence[Inspected]) -> Path:
    """Write the page, and the JSON file beside it; return the page."""
    from vadapter.inspect.look_page import inspection_page

    content = inspection_page(f"What the language model reads: {name}", found)
    storage.write_bytes(out.with_suffix(".json"), f"{json.dumps(facts)}\n".encode())
    storage.write_bytes(out, content.encode("utf-8", "replace"))
    return out


def overview(found: Sequence[Inspected]) -> tuple[list[list[str]], tuple[str, ...]]:
    """Return the rows and the header of a table for the terminal."""
    rows = []
    for each in found:
        for name, facts in each.facts["evals"].items():
            losses, scores = facts["inputs"]["loss"], facts["inputs"]["score"]
            near = facts.get("nearest", {})
            rows.append([
                each.label, name, str(facts["n"]),
                *(_cell(losses, key, 1, 3) for key in ("right", "wrong", "blank")),
                *(_cell(scores, key, 100, 1) for key in ("right", "wrong", "blank")),
                *(_cell(near, key, 100, 1) for key in ("own", "other")),
                f"{100 * facts['generations']['ended']:.0f}",
            ])  # fmt: skip
    return rows, _HEADER


def _cell(measured: Facts, key: str, factor: float, digits: int) -> str:
    return f"{factor * measured[key]['value']:.{digits}f}" if key in measured else "—"
