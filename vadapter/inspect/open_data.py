"""Data sets of a recipe, opened as one of its stages reads them, without its parameters."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vadapter.config import nearest
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.image_transform import ImageTransform
from vadapter.data.open import make_source, make_stream
from vadapter.data.pipeline import Stream
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError
from vadapter.recipe.model import make_model
from vadapter.recipe.schema import Recipe, used_data
from vadapter.stages.abstract_state import view_of
from vadapter.stages.run import read_tokenizer
from vadapter.stages.stage import NO_RUN


@dataclasses.dataclass(frozen=True)
class OpenData:
    """A data set, opened for a stage."""

    name: str
    config: DataConfig
    source: Source
    stage: str
    trains: bool  # the stage trains on it, and does not only measure a loss or evaluate
    tokenizer: Tokenizer | None  # of the stage; None: not trained yet, so there are no rows
    view: ImageTransform | None  # the stage's image transform for this data set; None for text
    items: Any  # see `data.open.make_stream`
    transform: Any  # see `data.open.make_stream`
    seed: int  # of the run

    def row(self, n: int) -> tuple[int, dict[str, Any]]:
        """Return the index in `items` of the n-th row that the stage draws, and the row."""
        if self.trains:
            stream = Stream(self.items, self.transform, seed=self.seed, name=self.name)
            return stream.index(n), stream[n]
        index = min(n, len(self.items) - 1)
        return index, self.transform(self.items[index], rng=None)


def open_data(
    recipe: Recipe, workdir: Path | None, stage: str, names: Sequence[str]
) -> list[OpenData]:
    """Open data sets of a recipe; never trains a tokenizer.

    Args:
      workdir: the run directory with the tokenizer, if the run trains one.
      stage: whose image transform and tokenizer to use. By default the first stage that reads the
        data set, or without `names` the last of the chain.
      names: the data sets; by default all that the stage trains on.

    Raises:
      ConfigError: unknown names, or a data set that no stage reads.
      DataError: a source with missing or corrupt files.
    """
    for name in names:
        if name not in recipe.data:
            raise ConfigError(f"config.data: unknown {name!r}{nearest(name, recipe.data)}")
    if stage and stage not in recipe.stages:
        raise ConfigError(f"config.stages: unknown {stage!r}{nearest(stage, recipe.stages)}")
    if not names:
        reader = stage or recipe.chain[-1]
        return _open(recipe, workdir, reader, recipe.stages[reader].data)
    return [
        data
        for name in names
        for data in _open(recipe, workdir, stage or _reader(recipe, name), [name])
    ]


def without_tokenizer(data: OpenData) -> str:
    """Return what to do while the tokenizer has not been trained."""
    return (
        f"token lengths and rows need the tokenizer of stage {data.stage}: pass --workdir=RUN "
        "(`vadapter train` writes RUN/tokenizer.json before its first stage)"
    )


def _reader(recipe: Recipe, name: str) -> str:
    """Return the first stage that trains on a data set, or else measures or evaluates on it."""
    trained = [stage for stage in recipe.chain if name in recipe.stages[stage].data]
    used = [stage for stage in recipe.chain if name in used_data(recipe, recipe.stages[stage])]
    if trained or used:
        return (trained or used)[0]
    raise ConfigError(
        f"config.data.{name}: no stage of config.chain={','.join(recipe.chain)} reads it; pass the "
        "stage whose image transform and tokenizer to use with --stage"
    )


def _open(recipe: Recipe, workdir: Path | None, stage: str, names: Iterable[str]) -> list[OpenData]:
    config = recipe.stages[stage]
    tokenizer, view = read_tokenizer(recipe, config, workdir or NO_RUN), None
    if tokenizer is not None:
        view = view_of(make_model(recipe, config, tokenizer.vocab_size))
    opened = []
    for name in names:
        data, source = recipe.data[name], make_source(name, recipe.data[name])
        items, transform = source, None
        if tokenizer is not None:
            items, transform = make_stream(name, data, source, tokenizer, view)
        own_view = None if view is None or data.task == "document" else data.view(view)
        opened.append(OpenData(
            name, data, source, stage, trains=name in config.data, tokenizer=tokenizer,
            view=own_view, items=items, transform=transform, seed=recipe.seed,
        ))  # fmt: skip
    return opened
