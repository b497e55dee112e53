"""The recipe's evaluations, run again with a restored stage."""

import dataclasses
from pathlib import Path
from typing import Any

from vadapter.checkpoints.array_io import read_meta
from vadapter.config import digest, plain, require_one_of
from vadapter.data.example import Source
from vadapter.distributed import hosts
from vadapter.errors import ConfigError
from vadapter.evaluate.describe import require_images
from vadapter.evaluate.partial_results import FILE, PartialResults
from vadapter.evaluate.runner import Decoder, evaluate, limited, record_of, save_result
from vadapter.metrics.scoring import Result
from vadapter.stages.stage import Stage


def choose(loaded: Stage, names: str = "") -> list[str]:
    """Return the evaluations `a,b` or "all" of the recipe, by default the stage's own.

    Raises:
      ConfigError: an unknown name, no evaluations, or a stage that cannot describe images.
    """
    require_images(loaded)
    evals = loaded.recipe.evals
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    chosen = chosen or list(loaded.config.evals)
    if chosen in ([], ["all"]):
        chosen = list(evals)
    for name in chosen:
        require_one_of(f"--evals={name}", name, evals)
    if not chosen:
        raise ConfigError("the recipe has no evaluations: config.evals is empty")
    return chosen


def run_eval(decoder: Decoder, name: str, *, limit: int = 0, batch: int = 0) -> tuple[Result, Path]:
    """Run one evaluation of a restored stage as training does at its end, and write its files.

    An interrupted evaluation resumes after its last complete batch. Returns the result, and the
    directory with predictions.jsonl and score.json; with fewer items than the recipe says it is
    another one, so that they never replace the full result.

    Args:
      limit, batch: number of items, rows per batch; 0: as the recipe says.

    Raises:
      UserError: data that cannot be read.
    """
    loaded = decoder.stage
    full = loaded.recipe.evals[name]
    spec = dataclasses.replace(limited(full, limit), batch=batch or full.batch)
    data = loaded.recipe.data[spec.data]
    source = loaded.features(spec.data, loaded.params)  # cached ones are scored as rounded
    fewer = f"-first-{limit}" if spec.limit != full.limit else ""
    directory = loaded.directory / "eval" / f"{name}{fewer}"
    # The batch size does not change a generation, so it is not part of the key.
    key = generations_key(loaded, source, dataclasses.replace(spec, batch=1), data)
    partial = PartialResults(directory / FILE, key)
    result = evaluate(
        decoder, loaded.params, source, data, spec, loaded.view, partial=partial, title=name
    )
    if hosts.first():
        save_result(directory, result, **record_of(source, data, spec, result))
    partial.remove()
    return result, directory


def generations_key(loaded: Stage, source: Source, *settings: Any) -> str:
    """Return a digest of everything the generations of a stage for a source depend on."""
    checkpoint = loaded.directory / "checkpoints" / str(loaded.step)
    facts = (read_meta(checkpoint), source.fingerprint(), *settings)
    return digest([plain(fact) for fact in facts])
