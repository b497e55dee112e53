"""Painting of scenes with numpy: signed distances to outlines, blended over a background.

Legend: F frames, H height, W width, S image side in pixels.
"""

import math
from collections.abc import Callable

import numpy as np

from vadapter.data.scenes.dice import Dice
from vadapter.data.scenes.world import Scene, Thing, phases


def _edges(x: np.ndarray, y: np.ndarray, count: int, apothem: float) -> list[np.ndarray]:
    """Return signed distances to the sides of a regular polygon with a corner at the top."""
    turns = (2 * math.pi * (k + 0.5) / count for k in range(count))
    return [math.sin(a) * x - math.cos(a) * y - apothem for a in turns]


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # A pentagram: every point in it is inside at least four of the five lines.
    first = second = np.full_like(x, -9)
    for d in _edges(x, y, 5, 0.4):
        second = np.maximum(second, np.minimum(first, d))
        first = np.maximum(first, d)
    return second


# Signed distance to the outline, roughly in units of the radius, negative inside.
OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.sqrt(x * x + y * y) - 1,
    "ring": lambda x, y: np.abs(np.sqrt(x * x + y * y) - 0.75) - 0.25,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum.reduce(_edges(x, y + 0.1, 3, 0.6)),
    "cross": lambda x, y: np.maximum(
        np.maximum(np.abs(x), np.abs(y)) - 1, np.minimum(np.abs(x), np.abs(y)) - 0.3
    ),
    "star": _star,
}


def render(scene: Scene, size: int, dice: Dice) -> np.ndarray:
    """Paint a scene, u8[F,S,S,3]; `dice` draws the grain of a grainy background."""
    times = phases(scene.kind)
    # Channels first while painting: numpy is slow if the innermost axis has length 3. Thanks to
    # the margin no shape has to be clipped.
    margin = size // 4
    planes = np.zeros((len(times), 3, size + 2 * margin, size + 2 * margin), np.float32)
    shown = planes[..., margin : margin + size, margin : margin + size]
    shown[:] = _background(scene, size, dice)
    for thing in scene.things:
        path = size * np.array([thing.at(phase) for phase in times], np.float32)
        _paint(planes, thing, path + np.array([margin, margin, 0], np.float32))
    # Colors, jitter and grain are chosen to stay inside 0..255: rounding is all that is left.
    return np.ascontiguousarray((shown + 0.5).astype(np.uint8).transpose(0, 2, 3, 1))


def _background(scene: Scene, size: int, dice: Dice) -> np.ndarray:
    """Return the background, f32[3,S,S], or f32[3,1,1] if it is plain."""
    first, second = np.array(scene.ground, np.float32)[:, :, None, None]
    if scene.texture == "plain":
        return first
    if scene.texture == "grainy":
        return first + 22 * dice.grain(size)
    ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    c, s = math.cos(scene.slope), math.sin(scene.slope)
    mix = 0.5 + (c * ramp[None, :] + s * ramp[:, None]) / (abs(c) + abs(s))
    # Far enough apart to be visible as shading.
    return first + mix * (second - first + (40 if scene.tone == "dark" else -40))


def _paint(planes: np.ndarray, thing: Thing, path: np.ndarray) -> None:
    """Blend one shape into f32[F,3,H,W], in place, by each pixel's distance to the outline.

    The planes have room for the whole shape. `path` is f32[F,3], (x, y, radius) in pixels.
    """
    x, y, radius = path.T[..., None, None]
    reach = int(1.25 * path[:, 2].max()) + 2
    corner = path[:, :2].astype(np.int32) - reach  # left and top of the patch in each frame
    grid = np.arange(2 * reach + 1, dtype=np.float32) + 0.5
    u = (grid[None, :] + corner[:, 0, None, None] - x) / radius
    v = (grid[:, None] + corner[:, 1, None, None] - y) / radius
    c, s = np.float32(math.cos(thing.angle)), np.float32(math.sin(thing.angle))
    distance = OUTLINES[thing.shape](c * u + s * v, c * v - s * u) * radius
    cover = np.minimum(np.maximum(0.5 - distance, 0), 1)
    rgb = np.array(thing.rgb, np.float32)[:, None, None]
    for plane, alpha, (left, top) in zip(planes, cover, corner.tolist(), strict=True):
        patch = plane[:, top : top + len(grid), left : left + len(grid)]
        patch += alpha * (rgb - patch)
