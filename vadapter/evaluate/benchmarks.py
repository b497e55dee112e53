"""A trained stage on the benchmarks: predictions, scores, a file to send in, a gallery."""

import contextlib
import json
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vadapter import __version__
from vadapter.config import digest, plain
from vadapter.data.benchmarks.source import open_benchmark
from vadapter.data.media.frames import load_media
from vadapter.errors import ConfigError, DataError
from vadapter.evaluate.evaluator import save_result
from vadapter.evaluate.few_shot import Prompts, prompting
from vadapter.evaluate.partial_results import PartialResults
from vadapter.evaluate.protocol import POSTS, Protocol, resolve
from vadapter.evaluate.protocols import PROTOCOLS, find_protocol
from vadapter.evaluate.recipe_evals import PART, text_key
from vadapter.evaluate.runner import Decoder, everywhere, predict
from vadapter.evaluate.submission import submission
from vadapter.metrics.scoring import METRICS, Text, items_of, score_texts
from vadapter.report.gallery import Section, write_gallery
from vadapter.stages.restore import Loaded, describing

BATCH = 32


def choose(names: str, protocol: str, overrides: Sequence[str] = ()) -> list[Protocol]:
    """The protocols of some benchmarks.

    Args:
      names: with commas, or "all": every benchmark that the protocol knows.
      protocol: its name.
      overrides: see `protocol.resolve`.

    Raises:
      ConfigError: an unknown name, field or value, or no name.
    """
    table = find_protocol(protocol)
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if chosen == ["all"]:
        chosen = list(table)
    if not chosen:
        raise ConfigError(f"--benchmarks={names}: names none; all, or some of {', '.join(table)}")
    return [resolve(table, name, overrides) for name in chosen]


def run(loaded: Loaded, protocol: Protocol, data: Path, *, limit: int = 0, batch: int = 0) -> Path:
    """Runs a benchmark and writes its files: predictions.jsonl, score.json, submission.* and
    gallery.html. Killed and called again, it goes on behind the last batch that was done; what is
    complete stays as it is.

    Args:
      loaded: the stage.
      protocol: from `choose`.
      data: the folder that holds the benchmark's own, of its name, with the official files.
      limit: only the first items; 0: all.
      batch: rows at a time; 0: `BATCH`.

    Returns:
      The directory of its files, which the first host writes.

    Raises:
      ConfigError: a stage that sees no images, a prompt longer than the language model's room.
      DataError: files that are missing or cannot be used.
    """
    if loaded.view is None:
        raise ConfigError(
            f"stage {loaded.stage} reads text alone; choose one of "
            f"{', '.join(describing(loaded.recipe))}"
        )
    folder = data / protocol.benchmark
    with _doctor(protocol.benchmark, folder):
        source = open_benchmark(protocol.benchmark, folder, protocol.split)
        items = items_of(source, protocol.task, limit)
        notes = [source.note] if not source.official else []
        if limit and limit < len(items_of(source, protocol.task)):
            notes.append(f"only the first {limit}")
        for note in notes:
            _tell(f"{protocol.benchmark}: not official: {note}")
        prompts = prompting(loaded, protocol, folder, source.kind, items)

    directory = loaded.workdir / loaded.stage / "eval" / _folder(protocol, limit)
    key = text_key(loaded, source, protocol, limit, prompts.facts())
    record = plain({
        "benchmark": protocol.benchmark, "official": not notes, "note": "; ".join(notes),
        "stage": loaded.stage, "step": loaded.step, "limit": limit, "versions": _versions(),
        "protocol": protocol, "protocol_digest": digest(protocol), "texts": key, **prompts.facts(),
    })  # fmt: skip
    part = PartialResults(directory / PART, key)
    if everywhere(_is_complete(directory, record)):
        _tell(f"{protocol.benchmark}: done before; to do it again, delete {directory}")
        part.remove()
        return directory
    texts = predict(
        Decoder(loaded.model, loaded.tokenizer, loaded.mesh), loaded.params, items, prompts.row,
        batch=batch or BATCH, how=protocol.decode, shown=prompts.shown, part=part,
        title=protocol.benchmark,
    )  # fmt: skip
    if jax.process_index() == 0:
        _write(directory, protocol, items, texts, prompts, record)
        part.remove()
    return directory


@contextlib.contextmanager
def _doctor(name: str, folder: Path) -> Iterator[None]:
    """Where the official files of a benchmark cannot be used: names the command that lists them."""
    try:
        yield
    except DataError as error:
        if not folder.is_dir():  # says so itself
            raise
        raise DataError(
            f"{error}; `vadapter data doctor {name} --dir={folder}` lists what is there"
        ) from error


def _tell(text: str) -> None:
    if jax.process_index() == 0:
        print(f"vadapter: {text}", file=sys.stderr, flush=True)


def _is_complete(directory: Path, record: Mapping[str, Any]) -> bool:
    """Whether it holds the files of this very result; score.json is written when all others are."""
    names = ("score.json", "predictions.jsonl", "gallery.html")
    if not all((directory / name).is_file() for name in names):
        return False
    before = json.loads((directory / "score.json").read_text(encoding="utf-8"))
    before.pop("scores")
    return before == record


def _write(
    directory: Path,
    protocol: Protocol,
    items: Any,
    texts: Sequence[Text],
    prompts: Prompts,
    record: Mapping[str, Any],
) -> None:
    """The files of a result; `record` is what score.json says beside the scores."""
    post = POSTS[protocol.post]
    texts = [(i, text and post(text), ended) for i, text, ended in texts]
    result = score_texts(items, texts, METRICS[protocol.metric])
    name, text = submission(protocol.benchmark, protocol.task, result.rows)
    (directory / name).write_text(text, encoding="utf-8")
    section = Section(
        protocol.benchmark, protocol.task, {record["stage"]: result.rows},
        lambda item: load_media(_example(items, item["index"]).media, frames=prompts.frames),
    )  # fmt: skip
    title = f"{record['stage']}: {protocol.benchmark}, {protocol.name} {digest(protocol)[:8]}"
    write_gallery(directory / "gallery.html", title, [section], record["note"])
    save_result(directory, result, **record)


def _folder(protocol: Protocol, limit: int) -> str:
    """Results of different protocols never replace each other."""
    usual = PROTOCOLS["paper"].get(protocol.benchmark) == protocol
    name = protocol.benchmark if usual else f"{protocol.benchmark}-{digest(protocol)[:8]}"
    return f"{name}-first-{limit}" if limit else name


def _example(items: Any, index: int) -> Any:
    item = items[index]
    return item[0] if isinstance(item, tuple) else item


def _versions() -> dict[str, str]:
    return {
        "vadapter": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
