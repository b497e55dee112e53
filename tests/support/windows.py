"""Pooling over a grid of tokens by loops over tokens one by one, as a reference.

Tokens are [B, h · w, D], row by row; `grid` is (h, w).
"""

import math
from collections.abc import Iterator

import numpy as np


def windows(grid: tuple[int, int], r: int) -> Iterator[list[int | None]]:
    """Of every window, row by row, its tokens' indices row by row; None where there is no token."""
    h, w = grid
    for top in range(0, h, r):
        for left in range(0, w, r):
            places = [(top + i, left + j) for i in range(r) for j in range(r)]
            yield [i * w + j if i < h and j < w else None for i, j in places]


def shuffled(x: np.ndarray, grid: tuple[int, int], r: int) -> np.ndarray:
    """The tokens of each window one after the other, zeros where there is none."""
    none = np.zeros_like(x[:, 0])
    rows = [
        np.concatenate([none if i is None else x[:, i] for i in window], axis=-1)
        for window in windows(grid, r)
    ]
    return np.stack(rows, axis=1)


def averaged(x: np.ndarray, grid: tuple[int, int], r: int) -> np.ndarray:
    """The mean of the tokens that each window has."""
    rows = [
        np.mean([x[:, i] for i in window if i is not None], axis=0) for window in windows(grid, r)
    ]
    return np.stack(rows, axis=1)


def resized(x: np.ndarray, grid: tuple[int, int], side: int) -> np.ndarray:
    """The mean of tokens ⌊i·h/side⌋ up to, without it, ⌈(i+1)·h/side⌉ of both dimensions."""
    h, w = grid
    reach = lambda n, i: range(n * i // side, math.ceil(n * (i + 1) / side))  # noqa: E731
    rows = [
        np.mean([x[:, a * w + b] for a in reach(h, i) for b in reach(w, j)], axis=0)
        for i in range(side)
        for j in range(side)
    ]
    return np.stack(rows, axis=1)
