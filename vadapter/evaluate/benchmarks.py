"""A trained stage on the benchmarks: predictions, scores, a file to submit, a gallery."""

import contextlib
import functools
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vadapter import __version__
from vadapter.config import digest, plain, require_one_of
from vadapter.console import note
from vadapter.data.benchmarks.source import open_benchmark
from vadapter.data.items import items_of
from vadapter.distributed import hosts
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.describe import require_images
from vadapter.evaluate.few_shot import build_prompts
from vadapter.evaluate.partial_results import FILE, PartialResults
from vadapter.evaluate.protocols import POSTS, PROTOCOLS, Protocol, resolve
from vadapter.evaluate.recipe_evals import generations_key
from vadapter.evaluate.runner import Decoder, predict, save_result
from vadapter.evaluate.submission import submission
from vadapter.metrics.scoring import METRICS, Generation, score_generations
from vadapter.report.gallery import Section, load_frames, write_gallery

BATCH = 32


def choose(names: str, protocol: str, overrides: Sequence[str] = ()) -> list[Protocol]:
    """Return a protocol for each of the benchmarks `a,b`, or "all"; `overrides`: see `resolve`.

    Raises:
      ConfigError: an unknown name, field or value, or no name.
    """
    require_one_of(f"--protocol={protocol}", protocol, PROTOCOLS)
    table = PROTOCOLS[protocol]
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if chosen == ["all"]:
        chosen = list(table)
    if not chosen:
        raise ConfigError(f"--benchmarks={names}: pass all, or some of {', '.join(table)}")
    return [resolve(table, name, overrides) for name in chosen]


def run(
    decoder: Decoder, protocol: Protocol, data: Path, *, limit: int = 0, batch: int = 0
) -> Path:
    """Run a benchmark; write predictions.jsonl, score.json, gallery.html and submission.*.

    Returns the directory of the files, which the first host writes. An interrupted benchmark
    resumes after its last complete batch; one that is complete is not run again.

    Args:
      decoder: of the restored stage; benchmarks whose rows have the same shape share its program.
      data: contains the folder of the benchmark's official files, named like the benchmark.
      limit, batch: number of items, 0: all; rows per batch, 0: `BATCH`.

    Raises:
      ConfigError: a text-only stage, or a prompt longer than the language model's context.
      DataError: files that are missing or unusable.
    """
    loaded = decoder.stage
    require_images(loaded)
    name, folder = protocol.benchmark, data / protocol.benchmark
    with _suggest_doctor(name, folder):
        source = open_benchmark(name, folder, protocol.split)
        items = items_of(source, protocol.task, limit)
        notes = [source.note] if not source.official else []
        if limit and limit < len(items_of(source, protocol.task)):
            notes.append(f"only the first {limit}")
        for reason in notes:
            _log(f"{name}: not official: {reason}")
        prompts = build_prompts(loaded, protocol, folder, source.kind, items)

    directory = loaded.directory / "eval" / _directory(protocol, limit)
    shots = {"frames": prompts.frames, "examples": list(prompts.examples)}
    key = generations_key(loaded, source, protocol, limit, shots)
    versions = {
        "vadapter": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    record = plain({
        "benchmark": name, "official": not notes, "note": "; ".join(notes),
        "stage": loaded.name, "step": loaded.step, "limit": limit, "versions": versions,
        "protocol": protocol, "protocol_digest": digest(protocol), "texts": key, **shots,
    })  # fmt: skip
    partial = PartialResults(directory / FILE, key)
    complete = hosts.first() and _is_complete(directory, record)
    what = f"looking for results of {name}"
    if hosts.of_first(complete, what, patience=hosts.WORK):  # the first may be writing others
        _log(f"{name}: already complete; to run it again, delete {directory}")
        partial.remove()
        return directory
    generations = predict(
        decoder, loaded.params, items, prompts.row, batch=batch or BATCH, how=protocol.decode,
        shown=prompts.shown, partial=partial, title=name,
    )  # fmt: skip
    if hosts.first():
        _write(directory, protocol, items, generations, prompts.frames, record)
        partial.remove()
    return directory


@contextlib.contextmanager
def _suggest_doctor(name: str, folder: Path) -> Iterator[None]:
    """Add to a DataError the command that checks the official files of the benchmark."""
    try:
        yield
    except DataError as error:
        if not folder.is_dir():  # the message already suggests it
            raise
        raise DataError(
            f"{error}; run `vadapter data doctor {name} --dir={folder}` to check the files"
        ) from error


def _log(text: str) -> None:
    if hosts.first():
        note(text)


def _is_complete(directory: Path, record: Mapping[str, Any]) -> bool:
    """Return whether the directory has all files of this result; score.json is written last."""
    names = ("score.json", "predictions.jsonl", "gallery.html")
    if not all((directory / name).is_file() for name in names):
        return False
    saved = json.loads((directory / "score.json").read_text(encoding="utf-8"))
    of_scores = ("scores", "intervals")  # earlier versions wrote no intervals
    return {key: value for key, value in saved.items() if key not in of_scores} == record


def _write(
    directory: Path, protocol: Protocol, items: Any, generations: Sequence[Generation], frames: int,
    record: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the files of a result; `record` is the content of score.json without the scores."""
    post = POSTS[protocol.post]
    generations = [g._replace(text=g.text and post(g.text)) for g in generations]
    result = score_generations(items, generations, METRICS[protocol.metric])
    name, text = submission(protocol.benchmark, protocol.task, result.rows)
    (directory / name).write_text(text, encoding="utf-8")
    media = functools.partial(load_frames, items=items, frames=frames)
    section = Section(protocol.benchmark, protocol.task, {record["stage"]: result.rows}, media)
    title = f"{record['stage']}: {protocol.benchmark}, {protocol.name} {digest(protocol)[:8]}"
    write_gallery(directory / "gallery.html", title, [section], record["note"])
    save_result(directory, result, **record)


def _directory(protocol: Protocol, limit: int) -> str:
    """Return a name of its own for each protocol, so that no result replaces another."""
    name = protocol.benchmark
    if PROTOCOLS["paper"].get(name) != protocol:
        name += f"-{digest(protocol)[:8]}"
    return f"{name}-first-{limit}" if limit else name
