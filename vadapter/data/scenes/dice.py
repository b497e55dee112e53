"""Random draws as a pure function of (seed, purpose, index)."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.random.bit_generator import ISeedSequence

T = TypeVar("T")


class _Key(ISeedSequence):
    """A Philox key used unchanged; `Philox(key=...)` would read system entropy every time."""

    def __init__(self, *words: int):
        self._words = words

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return np.array(self._words[:n_words], dtype)


class Dice:
    """Uniform draws from one Philox stream that is addressed by example.

    Raw bits are read in blocks and turned into numbers here: this is fast, and independent of how
    a numpy release draws integers or permutations.
    `space` numbers (medium, split), `stream` the purpose, so that new wording does not change the
    pixels.
    """

    def __init__(self, seed: int, space: int, index: int, stream: int):
        key: Any = _Key(seed, space)
        counter = np.array([0, 0, index, stream], np.uint64)
        self._bits = np.random.Philox(key, counter=counter)
        self._pool: list[float] = []

    def random(self) -> float:
        if not self._pool:
            self._pool = ((self._bits.random_raw(64) >> 11) * 2.0**-53).tolist()
        return self._pool.pop()

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def weighted(self, weights: Mapping[str, float]) -> str:
        """Return a key of `weights`, drawn in proportion to its value."""
        edges = list(itertools.accumulate(weights.values()))
        return list(weights)[bisect.bisect(edges, self.random() * edges[-1], hi=len(edges) - 1)]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            out[i], out[j] = out[j], out[i]
        return out

    def grain(self, size: int) -> np.ndarray:
        """Return f32[size,size], uniform in [-1, 1)."""
        return np.random.Generator(self._bits).random((size, size), np.float32) * 2 - 1
