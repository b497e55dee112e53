"""A recipe over drawn shapes with a tokenizer, and nothing trained."""

from pathlib import Path
from typing import Any

from support.recipes import draw, tiny_recipe

from vadapter.data.open import make_source, train_tokenizer
from vadapter.inspect.open_data import OpenData, open_data
from vadapter.recipe.schema import Recipe, read


def recipe(root: Path, **changes: Any) -> Recipe:
    """The recipe over root/shapes; `changes` are keys of its data set `images`."""
    config = tiny_recipe(root / "shapes")
    config.data.images.update(changes)
    return read(config)


def prepare(root: Path) -> Path:
    """Draw root/shapes and write root/run/tokenizer.json."""
    draw(root / "shapes")
    made = recipe(root)
    sources = {name: make_source(name, made.data[name]) for name in made.tokenizer.data}
    train_tokenizer(made.tokenizer, sources, root / "run" / "tokenizer.json")
    return root


def opened(root: Path, name: str, stage: str = "", **changes: Any) -> OpenData:
    """One data set of it."""
    (data,) = open_data(recipe(root, **changes), root / "run", stage, [name])
    return data
