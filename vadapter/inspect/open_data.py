"""The data sets of a recipe as one of its stages reads them, without its parameters."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vadapter.config import nearest
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.media.images import ImageTransform
from vadapter.data.open import make_source, make_stream
from vadapter.data.pipeline import Stream
from vadapter.data.tokenizers import Tokenizer
from vadapter.errors import ConfigError
from vadapter.recipe.schema import Recipe, make_model
from vadapter.stages.abstract_state import view_of
from vadapter.stages.run import read_tokenizer

NOWHERE = Path("RUN")  # where no run directory is given: no tokenizer is there


@dataclasses.dataclass(frozen=True)
class OpenData:
    """A data set, opened for a stage.

    Attributes:
      name, config, source: of the data set.
      stage: the name of the stage; trains: it trains on it, and does not only look at it.
      tokenizer: of the stage; None where it is yet to be trained: no `transform`, no rows.
      view: the stage's, for this data set; None for text only.
      items, transform: see `train.inputs.make_stream`.
      seed: of the run.
    """

    name: str
    config: DataConfig
    source: Source
    stage: str
    trains: bool
    tokenizer: Tokenizer | None
    view: ImageTransform | None
    items: Any
    transform: Any
    seed: int

    def row(self, n: int) -> tuple[int, dict[str, Any]]:
        """The n-th row that the stage draws from it, from 0, and its index in `items`."""
        if self.trains:
            stream = Stream(self.items, self.transform, seed=self.seed, name=self.name)
            return stream.index(n), stream[n]
        index = min(n, len(self.items) - 1)
        return index, self.transform(self.items[index], rng=None)


def open_data(
    recipe: Recipe, workdir: Path | None, stage: str, names: Sequence[str]
) -> list[OpenData]:
    """Opens data sets of a recipe; never trains a tokenizer.

    Args:
      workdir: the run directory, for the tokenizer that was trained in it.
      stage: whose view and tokenizer; "": of named data sets the first stage that reads one, else
        the last of the chain.
      names: the data sets; none: all that the stage trains on.

    Raises:
      ConfigError: unknown names; a data set that no stage reads.
      DataError: what a source finds wrong with its files.
    """
    for name in names:
        if name not in recipe.data:
            raise ConfigError(f"config.data: unknown {name!r}{nearest(name, recipe.data)}")
    if stage and stage not in recipe.stages:
        raise ConfigError(f"config.stages: unknown {stage!r}{nearest(stage, recipe.stages)}")
    wanted = names or [""]
    return [
        data
        for name in wanted
        for data in _of_stage(recipe, workdir, stage or _reader(recipe, name), name)
    ]


def without_tokenizer(data: OpenData) -> str:
    """What to do where there is no tokenizer yet."""
    return (
        f"stage {data.stage} trains its tokenizer when the run begins, and none is there yet: name "
        "a run that has one with --workdir=RUN (`vadapter train` writes RUN/tokenizer.json first)"
    )


def _reader(recipe: Recipe, name: str) -> str:
    """The first stage of the chain that reads a data set; of none in particular the last."""
    if not name:
        return recipe.chain[-1]
    for trains_first in (True, False):
        for stage in recipe.chain:
            config = recipe.stages[stage]
            looks = (*config.loss, *(recipe.evals[e].data for e in config.evals))
            if name in (config.data if trains_first else looks):
                return stage
    raise ConfigError(
        f"config.data.{name}: no stage of config.chain={','.join(recipe.chain)} reads it; name one "
        "whose view and tokenizer to use with --stage"
    )


def _of_stage(recipe: Recipe, workdir: Path | None, stage: str, name: str) -> list[OpenData]:
    config = recipe.stages[stage]
    tokenizer = read_tokenizer(recipe, config, workdir or NOWHERE)
    view = None
    if tokenizer is not None:
        view = view_of(make_model(recipe, config, tokenizer.vocab_size))
    opened = []
    for each in [name] if name else config.data:
        data, source = recipe.data[each], make_source(each, recipe.data[each])
        items, transform = source, None
        if tokenizer is not None:
            items, transform = make_stream(each, data, source, tokenizer, view)
        opened.append(
            OpenData(
                each,
                data,
                source,
                stage,
                each in config.data,
                tokenizer,
                None if view is None or data.task == "document" else data.view(view),
                items,
                transform,
                recipe.seed,
            )
        )
    return opened
