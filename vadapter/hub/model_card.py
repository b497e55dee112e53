"""The model card of an exported stage: a page for the hub, from the run's own records."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

from vadapter.console import markdown_table
from vadapter.errors import CheckpointError
from vadapter.hub.record import WEIGHTS, Exported, frozen_file
from vadapter.recipe.schema import Recipe
from vadapter.stages.restore import Loaded
from vadapter.weights.hub import repository

_USE = """```python
from vadapter import VAdapter

model = VAdapter.from_pretrained("OWNER/NAME")  # or the folder
print(model.caption(["photo.jpg", "clip.mp4"]))
print(model.ask("photo.jpg", "What color is the circle?"))
```"""
_LICENCE = """The license of what was trained is its author's to choose. The base models
keep theirs, which hold for whoever loads them."""


def card(loaded: Loaded, exported: Exported) -> str:
    """The page, with the YAML header that the hub reads.

    Raises:
      CheckpointError: a score.json that cannot be read.
    """
    bases = {name: _base(loaded.recipe, exported, name) for name in exported.components}
    sections = [
        _header(bases.values()),
        f"# {_line(loaded.recipe.name)}: {exported.stage}",
        f"Lets the frozen language model `{exported.lm}` see: `{' → '.join(loaded.model.names())}`."
        if exported.lm in exported.frozen
        else f"Writes about images: `{' → '.join(loaded.model.names())}`.",
        "Trained with vadapter, an implementation of PaLM2-VAdapter "
        "([arXiv 2402.10896](https://arxiv.org/abs/2402.10896)).",
        "## Use",
        _USE,
        _where_else(exported),
        "## Parts",
        _parts(loaded, exported, bases),
        "## Training",
        _training(loaded),
        "## Scores",
        _scores(loaded.workdir / exported.stage / "eval"),
        "## License",
        _LICENCE,
    ]
    return "\n\n".join(section.strip("\n") for section in sections if section) + "\n"


def _base(recipe: Recipe, exported: Exported, name: str) -> tuple[str, str]:
    """(hub id or name of the folder, commit) of the public weights that a part is or started from;
    empty without."""
    if name in exported.frozen:
        weights = exported.frozen[name].place
    else:
        weights = _started_from(recipe, exported.stage, name)
    repo_id, revision = repository(weights) if weights else ("", "")
    return (repo_id, revision) if revision else (Path(weights).name, "")


def _started_from(recipe: Recipe, stage: str, name: str) -> str:
    """The public weights that a trained part started from, perhaps stages before; "" if none."""
    while True:
        weights = recipe.components[name].get("weights", "")
        source = recipe.stages[stage].start.get(name, "weights")
        if source not in recipe.stages:
            return weights if source == "weights" else ""
        name, stage = recipe.stages[stage].rename.get(name, name), source


def _header(bases: Iterable[tuple[str, str]]) -> str:
    """Only hub ids may stand in it, and those need no quotes."""
    ids = list(dict.fromkeys(base for base, _ in bases if "/" in base))
    lines = ["base_model:", *(f"- {base}" for base in ids), "base_model_relation: adapter"]
    tags = ("vadapter", "image-captioning", "visual-question-answering")
    more = ["library_name: vadapter", "pipeline_tag: image-text-to-text"]
    more += ["tags:", *(f"- {tag}" for tag in tags)]
    return "\n".join(["---", *(lines if ids else []), *more, "---"])


def _where_else(exported: Exported) -> str:
    public = [name for name, part in exported.frozen.items() if part.weights]
    if not public:
        return ""
    places = ", ".join(f'"{name}": "FOLDER"' for name in public)
    return (
        "The frozen parts are fetched at the commits below; copies of them elsewhere are named "
        f"with `from_pretrained(…, weights={{{places}}})`. Either is checked against its digest."
    )


def _parts(loaded: Loaded, exported: Exported, bases: dict[str, tuple[str, str]]) -> str:
    rows = []
    for name in exported.components:
        base, revision = bases[name]
        public = f"{base} at `{revision}`" if revision else base
        if name in exported.trained:
            started = f", started from {public}" if public else ""
            state, where = "trained", f"`{WEIGHTS}`{started}"
        elif public:
            state, where = "frozen", public
        else:
            state, where = "frozen", f"`{frozen_file(name)}`: trained in the run, so it is enclosed"
        count = sum(x.size for x in jax.tree.leaves(loaded.params[name]))
        kind = exported.components[name]["kind"]
        rows.append((f"`{name}`", kind, f"{count:,}", state, where))
    return markdown_table(rows, ("part", "kind", "parameters", "", "where"))


def _training(loaded: Loaded) -> str:
    config, recipe = loaded.config, loaded.recipe
    optim = config.optim
    facts = [
        f"stage `{loaded.stage}` of kind {config.kind}, the last of "
        f"`{' → '.join(recipe.chain[: recipe.chain.index(loaded.stage) + 1])}`"
        if loaded.stage in recipe.chain
        else f"stage `{loaded.stage}` of kind {config.kind}",
        f"step {loaded.step:,} of {config.steps:,}, batches of {config.batch}, seed {recipe.seed}, "
        f"computed in {recipe.dtype}",
        f"AdamW, learning rate {optim.lr:g} ({optim.schedule}, {optim.warmup:,} steps of warm-up), "
        f"weight decay {optim.weight_decay:g}, gradients clipped at {optim.clip:g}",
    ]
    rows = [
        (name, recipe.data[name].source.get("kind", ""), recipe.data[name].task, f"{weight:g}")
        for name, weight in config.data.items()
    ]
    table = markdown_table(rows, ("data", "source", "task", "weight"))
    return "\n".join(f"- {fact}" for fact in facts) + "\n\n" + table


def _scores(folder: Path) -> str:
    """The evaluations of the stage that have been run, in per cent but for `n`."""
    found = {path.parent.name: _read(path) for path in sorted(folder.glob("*/score.json"))}
    if not found:
        return "Not evaluated."
    columns = {key for scores in found.values() for key in scores}
    names = sorted(columns, key=lambda key: (key != "n", key))
    form = lambda key, value: f"{value:.0f}" if key == "n" else f"{100 * value:.1f}"  # noqa: E731
    rows = [
        (name, *(form(key, scores[key]) if key in scores else "—" for key in names))
        for name, scores in found.items()
    ]
    return markdown_table(rows, ("evaluation", *names))


def _read(path: Path) -> dict[str, Any]:
    try:
        return {key: float(x) for key, x in json.loads(path.read_text("utf-8"))["scores"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error!r}): evaluate again, or remove it"
        ) from None


def _line(text: str) -> str:
    return " ".join(text.split())
