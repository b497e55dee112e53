"""The rows by name, each with what it measures; loading a row's code is left to `load`."""

import importlib
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row: its kind is a key of `KINDS`, `settings` are the arguments of its class."""

    kind: str
    settings: dict[str, Any]
    about: str


KINDS = {  # kind -> module and class
    "train": ("train_rows", "TrainRow"),
}
RECIPES = {  # name -> recipe, and the visual tokens that its runs cache
    "nano": ("configs/quickstart.py", None),
    "flickr8k": ("configs/flickr8k.py", (49, 1280)),
    "s30m": ("benches/peer/s30m.py", None),
}
STAGES = {"lm": "llm", "decoder": "decoder", "vadapter": "vadapter", "perceiver": "perceiver"}


def _train(name: str, stage: str) -> Row:
    recipe, features = RECIPES[name]
    features = features if stage != "lm" else None
    settings = {"recipe": recipe, "stage": STAGES[stage], "features": features}
    return Row("train", settings, f"train step of {STAGES[stage]} in {recipe}")


ROWS: dict[str, Row] = {
    f"{name}-{stage}": _train(name, stage)
    for name in RECIPES
    for stage in STAGES
    if (name, stage) != ("s30m", "lm")
}


def load(name: str) -> Any:
    """Return the function (rounds, compiled) -> result of a row."""
    from benches.peer.case import Case

    row = ROWS[name]
    module, cls = KINDS[row.kind]
    make = getattr(importlib.import_module(f"benches.peer.{module}"), cls)
    settings = dict(row.settings)
    return make(
        Case(settings.pop("recipe"), settings.pop("stage"), settings.pop("features")), **settings
    )
