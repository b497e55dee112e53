"""Held-out items with the right image, a wrong one, a blank one and frames in shuffled order.

Legend: B batch, F frames, S pixels a side, N visual tokens a frame, D encoder width.
"""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vadapter.data.blank import GRAY
from vadapter.data.config import DataConfig
from vadapter.data.example import Example, Features, Source
from vadapter.data.items import items_of
from vadapter.data.open import make_stream
from vadapter.data.pipeline import eval_batches
from vadapter.distributed.mesh import filled
from vadapter.errors import DataError
from vadapter.evaluate.runner import prompt_row
from vadapter.inspect.probe import Probe
from vadapter.recipe.schema import EvalConfig
from vadapter.stages.stage import Stage

CONDITIONS = ("right", "wrong", "blank", "shuffled")
_NO_PIXELS = Features(np.zeros((1, 1, 1, 1), ml_dtypes.bfloat16))
_PROMPT = "prompt_row"  # key of the row to continue, beside those of the row with the texts


class Chosen:
    """Some of the items of `items_of`, in an order of their own."""

    def __init__(self, items: Any, indices: Sequence[int]):
        self._items, self.indices = items, list(indices)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self._items[self.indices[index]]

    def text_only(self, index: int) -> Any:
        """Return the item without its media."""
        return self._items.text_only(self.indices[index])


def choose(items: Any, limit: int) -> Chosen:
    """Return at most `limit` items, evenly spaced; 0: all. Questions about one image are apart.

    Batches then hold different images, of which each can be the wrong one of another.
    """
    count = min(limit or len(items), len(items))
    indices = [i * len(items) // count for i in range(count)]
    seen: dict[str, int] = {}
    rank = {}
    for i in indices:
        name = _example(items.text_only(i)).id
        rank[i] = seen[name] = seen.get(name, -1) + 1
    return Chosen(items, sorted(indices, key=lambda i: (rank[i], i)))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The items of an evaluation, as a stage reads them.

    Its name and section of the recipe, the section of its data set, that data set, and those of its
    items that are looked at.
    """

    name: str
    spec: EvalConfig
    data: DataConfig
    source: Source
    items: Chosen

    @property
    def frames(self) -> int:
        """The number of frames of an item."""
        return self.data.frames if self.source.kind == "clip" else 1

    @property
    def conditions(self) -> tuple[str, ...]:
        """The inputs that there are: only frames of clips can be shuffled."""
        return CONDITIONS if self.frames > 1 else CONDITIONS[:-1]

    def example(self, index: int) -> Example:
        """Return the example of an item, without its media."""
        return _example(self.items.text_only(index))


def open_held_out(stage: Stage, name: str, spec: EvalConfig, limit: int) -> HeldOut:
    """Open the data of an evaluation.

    Raises:
      ConfigError: the data section is wrong.
      DataError: its files are missing or corrupt, or it has fewer than two images.
    """
    data = stage.recipe.data[spec.data]
    try:
        source = stage.source(spec.data)
        items = choose(items_of(source, data.task, spec.limit), limit)
    except DataError as error:
        raise DataError(
            f"{error}; if the data has moved, pass --config.data.{spec.data}.source.KEY=VALUE"
        ) from error
    held = HeldOut(name, spec, data, source, items)
    if len({held.example(i).id for i in range(len(items))}) < 2:
        raise DataError(
            f"evaluation {name} has fewer than two images or clips with a text: none could be the "
            "wrong one of another, and CIDEr needs two. Use more items"
        )
    return held


class Rows(NamedTuple):
    """A batch of items: what the encoder reads, and rows with and without the texts."""

    index: np.ndarray  # i64[B] in `HeldOut.items`; -1: a row that only fills the batch
    frames: np.ndarray  # u8[B,F,S,S,3]
    usable: np.ndarray  # bool[B]
    texts: dict[str, np.ndarray]  # rows whose texts are the targets of the loss
    prompts: dict[str, np.ndarray]  # rows to continue


def batches(held: HeldOut, stage: Stage) -> Iterator[Rows]:
    """Yield the items in batches of similar size, at most that of the evaluation."""
    count = len(held.items)
    parts = -(-count // held.spec.batch)
    size = filled(-(-count // parts), stage.mesh)
    _, texts = make_stream(held.spec.data, held.data, held.source, stage.tokenizer, stage.view)
    prompts = prompt_row(held.data, held.source, stage.tokenizer, stage.view)
    row = functools.partial(_row, texts=texts, prompts=prompts, question=_asks(held))
    for each in eval_batches(held.items, row, size):
        batch: dict[str, Any] = dict(each)
        asked = batch.pop(_PROMPT) | {"id": batch["id"]}
        asked.pop("features")
        usable = (batch["id"] >= 0) & ~batch["bad"]
        asked["bad"] = ~usable
        index = batch["id"].astype(np.int64)
        yield Rows(index, batch.pop("frames"), usable, batch, asked)


def _asks(held: HeldOut) -> bool:
    return held.data.task == "question"


def _row(item: Any, *, texts: Any, prompts: Any, question: bool, rng: Any = None) -> Any:
    """Return the row with the texts of an item, and in it that of its prompt."""
    example = _example(item)
    blind = dataclasses.replace(example, media=_NO_PIXELS)
    if question:
        asked = dataclasses.replace(example, qa=(item[1],))
        return {**texts(asked, texts_per_image=1, rng=rng), _PROMPT: prompts((blind, item[1]))}
    return {**texts(example, rng=rng), _PROMPT: prompts(blind)}


def _example(item: Any) -> Example:
    return item[0] if isinstance(item, tuple) else item


class Inputs(NamedTuple):
    """Visual tokens of a batch."""

    of: dict[str, np.ndarray]  # condition -> [B,F,N,D]
    partner: np.ndarray  # i64[B], the item whose image is the wrong one; -1: there is none


class Encoded:
    """The visual tokens of batches under each condition.

    They are rounded as in the feature cache of the data set (bfloat16), if it has one, so that
    losses and scores are those of an evaluation.
    """

    def __init__(self, probe: Probe, held: HeldOut):
        self._probe, self._held = probe, held
        self._ids = [held.example(i).id for i in range(len(held.items))]
        size = held.data.view(probe.stage.view).size
        self._blank = self._encode(np.full((1, held.frames, size, size, 3), GRAY, np.uint8))
        self._spare: dict[int, np.ndarray] = {}  # item -> tokens, of two different images

    def _encode(self, frames: np.ndarray) -> np.ndarray:
        tokens = self._probe.encode(frames)
        return tokens.astype(ml_dtypes.bfloat16) if self._held.data.cache else tokens

    def inputs(self, rows: Rows) -> Inputs:
        """Return the visual tokens of a batch: right, wrong, blank and, of clips, shuffled."""
        right = self._encode(rows.frames)
        tokens = {int(i): right[row] for row, i in enumerate(rows.index) if rows.usable[row]}
        for i, each in tokens.items():
            if not self._spare or (len(self._spare) == 1 and self._partner(i, self._spare) >= 0):
                self._spare[i] = each
        partner, wrong = np.full(len(right), -1), right.copy()
        for row in np.flatnonzero(rows.usable):
            own = int(rows.index[row])
            after = sorted(tokens, key=lambda i: (i <= own, i))
            partner[row] = self._partner(own, [*after, *self._spare])
            if partner[row] >= 0:
                wrong[row] = (tokens | self._spare)[int(partner[row])]
        of = {"right": right, "wrong": wrong, "blank": np.repeat(self._blank, len(right), axis=0)}
        if "shuffled" in self._held.conditions:
            orders = [_shuffled(int(i), right.shape[1]) for i in rows.index]
            of["shuffled"] = np.stack([x[o] for x, o in zip(right, orders, strict=True)])
        return Inputs(of, partner)

    def _partner(self, item: int, others: Iterable[int]) -> int:
        """Return the first of other items with another image; -1 if there is none."""
        return next((i for i in others if self._ids[i] != self._ids[item]), -1)


def _shuffled(index: int, frames: int) -> np.ndarray:
    """Return an order of the frames that is not theirs, drawn from the item's index."""
    rng = np.random.default_rng((0, index + 1))
    order = np.arange(frames)
    while (order == np.arange(frames)).all():
        order = rng.permutation(frames)
    return order
