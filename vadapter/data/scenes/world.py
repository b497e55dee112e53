"""The world of the "scenes" data set: colored shapes at random places, some of them moving.

A scene is one to three shapes on a background. A shape has a color, a size, a place and, in a clip,
a motion; no two shapes of a scene have the same color and shape.
"""

import dataclasses
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any

from vadapter.data.scenes.dice import Dice

FRAMES = 8
SPLITS = ("train", "val", "test", "unseen")

COLORS = {
    "red": (222, 38, 38),
    "green": (30, 168, 62),
    "blue": (45, 85, 235),
    "yellow": (246, 224, 40),
    "orange": (250, 132, 20),
    "purple": (156, 50, 200),
    "white": (248, 248, 248),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
# Never painted in train, val and test; each shape once, with a different color.
HELD_OUT = tuple(zip(("green", "purple", "blue", "red", "yellow", "white"), SHAPES, strict=True))
PAIRS = tuple((color, shape) for color in COLORS for shape in SHAPES)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

# Motion -> direction in (x, y, log radius); y points down. The reversal of a motion is a motion.
MOTIONS = {
    "left": (-1, 0, 0),
    "right": (1, 0, 0),
    "up": (0, -1, 0),
    "down": (0, 1, 0),
    "grow": (0, 0, 1),
    "shrink": (0, 0, -1),
    "still": (0, 0, 0),
}
MOVING = tuple(m for m in MOTIONS if m != "still")
# Radius in image sides; a growing shape goes from the small to the large one.
RADII = {"small": 0.09, "large": 0.155, "": 0.118}
GROWTH = 1.75


@dataclasses.dataclass(frozen=True)
class Thing:
    """One shape. Lengths are in image sides, the origin is the top left corner, y points down.

    x, y and radius are those in the middle of a clip. A pair (color, shape) occurs once in a scene.
    """

    color: str
    shape: str
    size: str  # "small", "large", or "" if it changes
    cell: int = -1  # row * 3 + column of a 3x3 grid, or -1 in clips
    motion: str = "still"  # a key of MOTIONS
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.1
    travel: float = 0.0  # length of the path of a moving shape
    angle: float = 0.0  # radians
    rgb: tuple[float, float, float] = (0.0, 0.0, 0.0)  # the color as painted, 0..255

    pair = property(lambda self: (self.color, self.shape))
    row = property(lambda self: self.cell // 3)
    column = property(lambda self: self.cell % 3)

    def at(self, phase: float) -> tuple[float, float, float]:
        """Return (x, y, radius) at `phase`, from -0.5 (first frame) to 0.5 (last frame)."""
        dx, dy, dr = MOTIONS[self.motion]
        step = self.travel * phase
        return self.x + dx * step, self.y + dy * step, self.radius * GROWTH ** (dr * phase)


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of an image or a clip, from which both texts and pixels are generated."""

    kind: str  # "image" or "clip"
    things: tuple[Thing, ...]  # one to three; later ones are painted over earlier ones
    tone: str  # "dark" or "light"
    texture: str  # "plain", "shaded" or "grainy"
    ground: tuple[tuple[float, ...], ...]  # two colors, 0..255; only "shaded" uses the second
    slope: float  # direction of the shading in radians


def phases(kind: str) -> tuple[float, ...]:
    """Return the phase of every frame, exactly symmetric about 0."""
    frames = 1 if kind == "image" else FRAMES
    return tuple((2 * t + 1 - frames) / (2 * FRAMES - 2) for t in range(frames))


def split_of(things: Sequence[Thing]) -> str:
    """Return the split of a combination of attributes, by hash: 80 % train, 10 % val, 10 % test.

    Scenes that differ only in jitter and background share a split, so that a test scene is a new
    combination and not just new noise.
    """
    what = sorted((t.color, t.shape, t.size, t.cell, t.motion) for t in things)
    bucket = zlib.crc32(repr(what).encode()) % 10
    return {0: "val", 1: "test"}.get(bucket, "train")


def draw(dice: Dice, kind: str, split: str, pairs: Sequence[tuple[str, str]] = SEEN) -> Scene:
    """Draw an image or a clip of a split with some of the (color, shape) pairs.

    "unseen" scenes use all pairs, at least one of HELD_OUT, in combinations that belong to "test",
    so that no training document describes them.
    """
    first, owner = pairs, split
    if split == "unseen":
        first, pairs, owner = HELD_OUT, PAIRS, "test"
    things: list[Thing] = []
    while not things or split_of(things) != owner:
        things = _attributes(dice, kind, pairs, first)
    # White would be invisible on a light background.
    pale = all(t.color != "white" for t in things) and dice.chance(0.4)
    tone = "light" if pale else "dark"
    low, high = (165, 215) if tone == "light" else (40, 90)
    ground = tuple(_tint(dice, dice.between(low, high)) for _ in range(2))
    placed = _placed(dice, kind, things)
    texture = dice.pick(("plain", "shaded", "grainy"))
    return Scene(kind, placed, tone, texture, ground, slope=dice.between(0, 2 * math.pi))


def _attributes(
    dice: Dice, kind: str, pairs: Sequence[tuple[str, str]], first: Sequence[tuple[str, str]]
) -> list[Thing]:
    """Draw shapes without places: the first pair from `first`, the others from `pairs`."""
    count = dice.pick((1, 2, 3))
    chosen = [dice.pick(first)]
    while len(chosen) < count:
        # Colors and shapes repeat more often than by chance, or most counts would be one.
        color, shape = dice.pick(pairs)
        like = dice.random()
        pair = (chosen[0][0] if like < 0.25 else color, chosen[0][1] if like > 0.75 else shape)
        if pair in pairs and pair not in chosen:
            chosen.append(pair)
    chosen = dice.shuffled(chosen)
    sizes = [dice.pick(("small", "large")) for _ in chosen]
    if kind == "image":
        cells = dice.shuffled(range(9))
        return [Thing(*p, size=s, cell=c) for p, s, c in zip(chosen, sizes, cells, strict=False)]
    movers = min(count, dice.pick((1, 2)))
    moving = [dice.pick(MOVING) for _ in range(movers)]
    motions = dice.shuffled(moving + ["still"] * (count - movers))
    return [
        Thing(*p, size="" if m in ("grow", "shrink") else s, motion=m)
        for p, s, m in zip(chosen, sizes, motions, strict=True)
    ]


def _placed(dice: Dice, kind: str, things: Sequence[Thing]) -> tuple[Thing, ...]:
    if kind == "image":
        return tuple(_in_cell(dice, thing) for thing in things)
    placed = tuple(_on_path(dice, thing) for thing in things)
    for _ in range(100):  # if all are too crowded, the shapes overlap for a while
        if not _touch(placed):
            break
        placed = tuple(_on_path(dice, thing) for thing in things)
    return placed


def _in_cell(dice: Dice, t: Thing) -> Thing:
    x, y = ((2 * n + 1) / 6 + dice.between(-0.02, 0.02) for n in (t.column, t.row))
    return dataclasses.replace(t, x=x, y=y, **_look(dice, t))


def _on_path(dice: Dice, t: Thing) -> Thing:
    """Center the path at random: a moving shape may be nearly anywhere at any time."""
    look, travel = _look(dice, t), dice.between(0.18, 0.26)
    dx, dy, _ = MOTIONS[t.motion]
    x_edge, y_edge = (look["radius"] + abs(d) * travel / 2 for d in (dx, dy))
    x, y = dice.between(x_edge, 1 - x_edge), dice.between(y_edge, 1 - y_edge)
    return dataclasses.replace(t, x=x, y=y, travel=travel, **look)


def _touch(things: Sequence[Thing]) -> bool:
    paths = [[t.at(p) for p in phases("clip")] for t in things]
    return any(
        (ax - bx) ** 2 + (ay - by) ** 2 < (ar + br) ** 2
        for a, b in itertools.combinations(paths, 2)
        for (ax, ay, ar), (bx, by, br) in zip(a, b, strict=True)
    )


def _look(dice: Dice, thing: Thing) -> dict[str, Any]:
    return {
        "radius": RADII[thing.size] * dice.between(0.94, 1.06),
        "angle": dice.between(-0.2, 0.2),
        "rgb": tuple(min(max(c + dice.between(-12, 12), 0.0), 255.0) for c in COLORS[thing.color]),
    }


def _tint(dice: Dice, level: float) -> tuple[float, ...]:
    return tuple(level + dice.between(-14, 14) for _ in range(3))
