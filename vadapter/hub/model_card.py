"""The model card of an exported stage: a page for the hub, from the records of the run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from vadapter.console import markdown_table
from vadapter.errors import CheckpointError
from vadapter.hub.record import WEIGHTS, Exported, frozen_file
from vadapter.recipe.schema import Recipe
from vadapter.report.table import score_table
from vadapter.stages.stage import Stage
from vadapter.weights.hub import PACKAGED, repository

_HEADER = """library_name: vadapter
pipeline_tag: image-text-to-text
tags:
- vadapter
- image-captioning
- visual-question-answering
---"""
_USAGE = """## Usage

```python
from vadapter import VAdapter

model = VAdapter.from_pretrained("OWNER/NAME")  # or the folder
print(model.caption(["photo.jpg", "clip.mp4"]))
print(model.ask("photo.jpg", "What color is the circle?"))
```"""
_LICENSE = """## License

The adapter's license is up to its author. The base models remain under their own
licenses."""


def model_card(loaded: Stage, exported: Exported) -> str:
    """Return the Markdown page, with the YAML header that the hub reads.

    Raises:
      CheckpointError: a score.json is corrupt.
    """
    bases = {name: _base(loaded.recipe, exported, name) for name in exported.components}
    purpose = "Generates text about images"
    if exported.lm in exported.frozen:
        purpose = f"A vision adapter for the frozen language model `{exported.lm}`"
    sections = [
        _header(bases.values()),
        f"# {' '.join(loaded.recipe.name.split())}: {exported.stage}",
        f"{purpose}: `{' → '.join(loaded.adapter_model.names())}`.",
        "Trained with vadapter, an implementation of PaLM2-VAdapter "
        "([arXiv 2402.10896](https://arxiv.org/abs/2402.10896)).",
        _USAGE,
        _base_models(exported),
        f"## Components\n\n{_components(loaded, exported, bases)}",
        f"## Training\n\n{_training(loaded)}",
        f"## Scores\n\n{_scores(loaded.directory / 'eval')}",
        _LICENSE,
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _base(recipe: Recipe, exported: Exported, name: str) -> tuple[str, str]:
    """Return (hub id, commit) or (name, "") of the public weights a component started from.

    The name is that of their folder or `packaged:NAME`. Both are empty without public weights.
    """
    part = exported.frozen.get(name)
    weights = part.location if part else _initial_weights(recipe, exported.stage, name)
    repo_id, revision = repository(weights)
    if revision:
        return repo_id, revision
    return (weights if weights.startswith(PACKAGED) else Path(weights).name), ""


def _initial_weights(recipe: Recipe, stage: str, name: str) -> str:
    """Return the public weights a trained component started from, through earlier stages."""
    while True:
        weights = recipe.components[name].get("weights", "")
        source = recipe.stages[stage].start.get(name, "weights")
        if source not in recipe.stages:
            return weights if source == "weights" else ""
        name, stage = recipe.stages[stage].rename.get(name, name), source


def _header(bases: Iterable[tuple[str, str]]) -> str:
    """Return the YAML header; hub ids need no quotes, and nothing else may be a base model."""
    ids = list(dict.fromkeys(base for base, _ in bases if repository(base)[0]))
    models = ["base_model:", *(f"- {base}" for base in ids), "base_model_relation: adapter"]
    return "\n".join(["---", *(models if ids else []), _HEADER])


def _base_models(exported: Exported) -> str:
    weights = ", ".join(f'"{name}": "FOLDER"' for name in exported.public())
    return weights and (
        "The base models are downloaded at the commits below; to use local copies, pass "
        f"`from_pretrained(…, weights={{{weights}}})`. Both are verified by their digests."
    )


def _components(loaded: Stage, exported: Exported, bases: dict[str, tuple[str, str]]) -> str:
    rows = []
    for name, spec in exported.components.items():
        base, revision = bases[name]
        public = f"{base} at `{revision}`" if revision else base
        state = "trained" if name in exported.trained else "frozen"
        weights = public or f"`{frozen_file(name)}`: trained in an earlier stage"
        if state == "trained":
            weights = f"`{WEIGHTS}`" + (f", initialized from {public}" if public else "")
        count = sum(x.size for x in jax.tree.leaves(loaded.params[name]))
        rows.append((f"`{name}`", spec["kind"], f"{count:,}", state, weights))
    return markdown_table(rows, ("component", "kind", "parameters", "state", "weights"))


def _training(loaded: Stage) -> str:
    config, recipe, chain = loaded.config, loaded.recipe, loaded.recipe.chain
    optim = config.optim
    earlier = chain[: chain.index(loaded.name) + 1] if loaded.name in chain else ()
    position = f", the last of `{' → '.join(earlier)}`" if earlier else ""
    facts = [
        f"stage `{loaded.name}` of kind {config.kind}{position}",
        f"step {loaded.step:,} of {config.steps:,}, batches of {config.batch}, seed {recipe.seed}, "
        f"computed in {recipe.dtype}",
        f"AdamW, learning rate {optim.lr:g} ({optim.schedule}, {optim.warmup:,} warm-up steps), "
        f"weight decay {optim.weight_decay:g}, gradients clipped at {optim.clip:g}"
        + "".join(f"; {name}'s rate × {x:g}" for name, x in optim.lr_mults.items()),
    ]
    data = {name: recipe.data[name] for name in config.data}
    rows = [(n, d.source.get("kind", ""), d.task, f"{config.data[n]:g}") for n, d in data.items()]
    table = markdown_table(rows, ("data", "source", "task", "weight"))
    return "\n".join(f"- {fact}" for fact in facts) + "\n\n" + table


def _scores(folder: Path) -> str:
    """Return a table of the stage's evaluations, in percent with intervals, except for `n`."""
    results = {path.parent.name: _read(path) for path in sorted(folder.glob("*/score.json"))}
    if not results:
        return "Not evaluated."
    return markdown_table(*score_table(results))


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the scores and the intervals of a score.json, in the order of their names."""
    try:
        record = json.loads(path.read_text("utf-8"))
        scores = {key: float(value) for key, value in sorted(record["scores"].items())}
        intervals = record.get("intervals", {}).items()
        return {
            "scores": scores,
            "intervals": {k: [float(x) for x in pair] for k, pair in intervals},
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({error!r}): run the evaluation again, or delete the file"
        ) from None
