"""The recipe's evaluations, run again with a restored stage."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from vadapter import console
from vadapter.checkpoints.array_io import read_meta
from vadapter.config import digest, nearest, plain
from vadapter.data.example import Source
from vadapter.data.open import make_source
from vadapter.errors import ConfigError
from vadapter.evaluate.evaluator import save_result, score
from vadapter.evaluate.partial_results import PartialResults
from vadapter.evaluate.runner import Decoder
from vadapter.metrics.scoring import Result
from vadapter.stages.feature_cache import encoded
from vadapter.stages.restore import Loaded, describing

PART = "predictions.jsonl.part"


def choose(loaded: Loaded, names: str = "") -> list[str]:
    """Names of evaluations: a list with commas, "all", or by default those of the stage.

    Raises:
      ConfigError: an unknown name, none at all, or a stage that cannot describe images.
    """
    evals = loaded.recipe.evals
    if loaded.view is None:
        raise ConfigError(
            f"stage {loaded.stage} reads text alone and has no evaluations; choose one of "
            f"{', '.join(describing(loaded.recipe))}"
        )
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if chosen == ["all"] or not (chosen or loaded.config.evals):
        chosen = list(evals)
    for name in chosen:
        if name not in evals:
            raise ConfigError(f"--evals={name}: unknown{nearest(name, evals)}")
    if not chosen and not loaded.config.evals:
        raise ConfigError("the recipe has no evaluations: config.evals is empty")
    return chosen or list(loaded.config.evals)


def evaluate_again(
    loaded: Loaded, name: str, *, limit: int = 0, batch: int = 0
) -> tuple[Result, Path]:
    """Runs one evaluation as training does at its end, and writes its files.

    Killed and called again, it goes on behind the last batch that was done.

    Args:
      loaded: the stage.
      name: of the evaluation.
      limit: only the first examples; 0: as the recipe says. What is measured on fewer examples is
        written beside the full result, never over it.
      batch: rows at a time; 0: as the recipe says.

    Returns:
      The result, and the directory of its predictions.jsonl and score.json.

    Raises:
      UserError: data that cannot be read.
    """
    spec = loaded.recipe.evals[name]
    partial = limit and (not spec.limit or limit < spec.limit)
    spec = dataclasses.replace(
        spec, batch=batch or spec.batch, limit=limit if partial else spec.limit
    )
    config = loaded.recipe.data[spec.data]
    source = make_source(spec.data, config)
    if config.cache:  # the rounding of cached tokens is part of the score
        encoder = loaded.model.encoder
        source = encoded(
            source,
            config,
            loaded.workdir,
            encoder=loaded.model.modules[encoder],
            params=loaded.params[encoder],
            digest=loaded.digests[encoder],
            mesh=loaded.mesh,
        )
    decoder = Decoder(loaded.model, loaded.tokenizer, loaded.mesh)
    folder = f"{name}-first-{limit}" if partial else name
    directory = loaded.workdir / loaded.stage / "eval" / folder
    asked = dataclasses.replace(spec, batch=1)  # which does not change a text
    part = PartialResults(directory / PART, text_key(loaded, source, asked, config))
    result = score(decoder, loaded.params, source, config, spec, loaded.view, part, name)
    if jax.process_index() == 0:
        save_result(directory, result, eval=plain(spec))
    part.remove()
    return result, directory


def text_key(loaded: Loaded, source: Source, *settings: Any) -> str:
    """A digest of all that a stage's texts about a source depend on."""
    checkpoint = loaded.workdir / loaded.stage / "checkpoints" / str(loaded.step)
    facts = (read_meta(checkpoint), source.fingerprint(), *settings)
    return digest([plain(fact) for fact in facts])


def as_table(results: Mapping[str, Result]) -> str:
    """Scores as columns, in per cent; `n` as such."""
    columns = list(dict.fromkeys(key for result in results.values() for key in result.scores))
    columns.sort(key=lambda key: key != "n")
    form = lambda key, value: str(int(value)) if key == "n" else f"{100 * value:.1f}"  # noqa: E731
    rows = [
        (name, *(form(k, r.scores[k]) if k in r.scores else "—" for k in columns))
        for name, r in results.items()
    ]
    return console.table(rows, ("evaluation", *columns))
