"""Generated scenes with what is to be seen in them, as labels of classes, to probe an encoder.

Legend: n scenes, F frames, S pixels a side, C colors.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from vadapter.console import listing
from vadapter.data.config import DataConfig
from vadapter.data.example import Source
from vadapter.data.image_transform import ImageTransform
from vadapter.data.scenes.source import ScenesSource
from vadapter.data.scenes.world import COLORS, MOTIONS, SHAPES, Scene, Thing
from vadapter.errors import ConfigError
from vadapter.stages.stage import Stage

# Scenes of the splits train and val, drawn apart from those of a recipe with the same seed: an
# encoder has not been trained on them, nor is anything chosen by them.
SEED = 1_000_003
TRAIN, HELD_OUT = "train", "val"
SIZES = ("small", "large")
UNKNOWN = -1  # a label that does not exist, such as the place of a thing that is not there

_COLORS, _MOTIONS = tuple(COLORS), tuple(MOTIONS)


@dataclasses.dataclass(frozen=True)
class Labels:
    """The facts of scenes; UNKNOWN where there is none.

    Attributes:
      of_colors: by fact (present, shape, size, place; of clips present and motion), i64[n,C]: of
        the only thing of that color in a scene.
      count: i64[n], the number of things less one.
      cells: i64[n,9], whether the cell of a 3x3 grid has a thing; of images alone.
      things: the things, one after the other: i64[m] by column: scene, color, shape, size.
      centers: f64[m,2], where those things are, (x, y) in image sides.
    """

    of_colors: dict[str, np.ndarray]
    count: np.ndarray
    cells: np.ndarray
    things: dict[str, np.ndarray]
    centers: np.ndarray


def labels(scenes: Sequence[Scene]) -> Labels:
    """Return the facts of scenes, all of one medium."""
    facts = ("shape", "size", "place") if scenes[0].kind == "image" else ("motion",)
    of_colors = {fact: np.full((len(scenes), len(COLORS)), UNKNOWN) for fact in facts}
    present = np.zeros((len(scenes), len(COLORS)), int)
    cells = np.zeros((len(scenes), 9), int)
    things = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.things]
    for i, thing in things:
        color = _COLORS.index(thing.color)
        present[i, color] += 1
        cells[i, thing.cell] = 1
        for fact in facts:
            of_colors[fact][i, color] = _class(thing, fact)
    for table in of_colors.values():
        table[present > 1] = UNKNOWN
    columns = {
        fact: np.array([_class(t, fact) for _, t in things]) for fact in ("color", "shape", "size")
    }
    return Labels(
        {"present": np.minimum(present, 1), **of_colors},
        np.array([len(scene.things) - 1 for scene in scenes]),
        cells,
        {"scene": np.array([i for i, _ in things]), **columns},
        np.array([(thing.x, thing.y) for _, thing in things]),
    )


CLASSES = {
    "present": 2, "color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES), "place": 9,
    "count": 3, "cells": 2, "motion": len(MOTIONS),
}  # fmt: skip


def _class(thing: Thing, fact: str) -> int:
    """Return the class of a fact of a thing."""
    if fact == "place":
        return thing.cell
    names = {"color": _COLORS, "shape": SHAPES, "size": SIZES, "motion": _MOTIONS}[fact]
    value = getattr(thing, fact)
    return names.index(value) if value in names else UNKNOWN  # a growing thing has no size


@dataclasses.dataclass(frozen=True)
class Pixels:
    """Scenes of one medium: frames u8[n,F,S,S,3] and their labels."""

    frames: np.ndarray
    labels: Labels


def open_scenes(stage: Stage) -> tuple[str, ScenesSource]:
    """Return the name and the source of the first generated images or clips of the recipe.

    Raises:
      ConfigError: it has none; of other images nobody knows the facts.
    """
    data = stage.recipe.data
    for name, config in data.items():
        if config.source.get("kind") == "scenes" and not config.blank:
            source: Source = stage.source(name)
            if isinstance(source, ScenesSource) and source.kind != "text":
                return name, source
    listed = listing(f"{name} ({config.source.get('kind')})" for name, config in data.items())
    raise ConfigError(
        "--probe needs images whose facts are known, generated scenes, but the recipe's data sets "
        f"are {listed}. Give a run whose recipe has such images (kind scenes), or add "
        "--config.data.NAME.source for one of its data sets"
    )


def draw(
    source: ScenesSource, media: str, split: str, count: int, config: DataConfig,
    view: ImageTransform,
) -> Pixels:  # fmt: skip
    """Return `count` scenes of a medium and split, drawn like those of a source."""
    from vadapter.data.media.frames import load_square

    source = dataclasses.replace(
        source, media=media, split=split, count=count, seed=source.seed + SEED
    )
    frames = config.frames if media == "clip" else 1
    pixels = [load_square(source[i].media, view, frames=frames) for i in range(count)]
    return Pixels(np.stack(pixels), labels([source.scene(i) for i in range(count)]))
