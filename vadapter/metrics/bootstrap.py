"""Intervals of scores and tests of the difference of two systems, by the bootstrap over clusters.

The captions or questions of one image or clip are not independent, so whole images and clips are
drawn: clusters (Field and Welsh, Bootstrapping clustered data, 2007). The score of a resample is
computed from sums over its items, as that of the test set is: a mean is a sum of scores over a
number of items, corpus BLEU a function of summed counts. Everything is drawn from one seed: the
same scores have the same interval.

`RESAMPLES` moves an end of an interval by about 0.03 standard errors, and takes 0.3 s for 5,000
clusters and 2 s for 40,000.

Legend: I items, G clusters, S sums that a score is computed from, R resamples.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vadapter.errors import DataError

LEVEL = 0.95
RESAMPLES = 10_000
_SEED = 0
_CELLS = 1 << 18  # counts that exist at a time: the 2 MiB of them stay in the processor's cache
_DIGITS = 12  # differences below it are ties: sums of the same numbers differ in their last bits

Interval = tuple[float, float]  # its lower and upper end


def mean(sums: np.ndarray) -> np.ndarray:
    """Return means, f64[…], from sums of scores and numbers of items, f64[…, 2]."""
    return sums[..., 0] / sums[..., 1]


def share(sums: np.ndarray) -> np.ndarray:
    """Return shares, f64[…], from sums of parts and of wholes, f64[…, 2]; 0 where there is none."""
    part, whole = sums[..., 0], sums[..., 1]
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


@dataclasses.dataclass(frozen=True)
class Sample:
    """The items of a test set, and what a score is computed from.

    Attributes:
      items: of length I, names each item, so that two systems are compared on the same ones.
      clusters: of length I, the image or clip of each item.
      parts: f64[I, S], what each item adds to the sums.
      score: the score from the sums, from f64[…, S] to f64[…].

    Raises:
      DataError: the lengths differ, or a part is not finite.
    """

    items: Sequence[Hashable]
    clusters: Sequence[Hashable]
    parts: np.ndarray
    score: Callable[[np.ndarray], np.ndarray] = mean

    def __post_init__(self) -> None:
        lengths = len(self.items), len(self.clusters), len(self.parts)
        if len(set(lengths)) > 1:
            raise DataError("got {} items, {} clusters and {} scores: one each".format(*lengths))
        bad = np.flatnonzero(~np.isfinite(self.parts).all(axis=1))
        if len(bad):
            raise DataError(
                f"the score of item {self.items[bad[0]]!r} is not a finite number (the first of "
                f"{len(bad)} such items of {len(self.parts)}): score them again"
            )

    @classmethod
    def of_means(
        cls, items: Sequence[Hashable], clusters: Sequence[Hashable], scores: Sequence[float]
    ) -> "Sample":
        """Return the sample whose score is the mean of the items' scores."""
        values = np.asarray(scores, np.float64)
        return cls(items, clusters, np.stack([values, np.ones_like(values)], axis=-1))

    @classmethod
    def of_shares(
        cls,
        items: Sequence[Hashable],
        clusters: Sequence[Hashable],
        sums: Sequence[tuple[float, float]],
    ) -> "Sample":
        """Return the sample whose score is what all items have over what they could have.

        `sums` are both amounts of each item. It is 0 if no item could have any.
        """
        return cls(items, clusters, np.asarray(sums, np.float64).reshape(-1, 2), share)

    def where(self, chosen: Sequence[bool]) -> "Sample":
        """Return the sample of some of the items; `chosen` says for each item whether it is one."""
        indices = [i for i, wanted in enumerate(chosen) if wanted]
        return self._take(indices)

    def _take(self, indices: Sequence[int]) -> "Sample":
        return dataclasses.replace(
            self,
            items=[self.items[i] for i in indices],
            clusters=[self.clusters[i] for i in indices],
            parts=self.parts[indices],
        )

    @property
    def value(self) -> float:
        """The score of all items; nan without items."""
        return float(self.score(self.parts.sum(0))) if len(self.parts) else float("nan")

    def cluster_sums(self) -> np.ndarray:
        """Return the sums over the items of each cluster, f64[G, S]."""
        numbers: dict[Hashable, int] = {}
        owner = [numbers.setdefault(cluster, len(numbers)) for cluster in self.clusters]
        columns = (np.bincount(owner, column, len(numbers)) for column in self.parts.T)
        return np.stack([*columns], axis=-1) if owner else self.parts


def intervals(samples: Mapping[str, Sample]) -> dict[str, Interval]:
    """Return the 95 % percentile interval of each score (Efron and Tibshirani 1993, chapter 13).

    A sample of fewer than two clusters has none. Scores of as many clusters share their draws.
    """
    by_count: dict[int, dict[str, np.ndarray]] = {}
    for name, sample in samples.items():
        sums = sample.cluster_sums()
        if len(sums) > 1:
            by_count.setdefault(len(sums), {})[name] = sums
    found: dict[str, Interval] = {}
    for group in by_count.values():
        for name, drawn in zip(group, _resample([*group.values()]), strict=True):
            found[name] = _percentiles(samples[name].score(drawn))
    return {name: found[name] for name in samples if name in found}


def interval(sample: Sample) -> Interval | None:
    """Return the interval of one score, see `intervals`; None for fewer than two clusters."""
    return intervals({"": sample}).get("")


class Difference(NamedTuple):
    """The score of a system minus that of another on the same items."""

    value: float
    interval: Interval | None  # 95 %; None for fewer than two clusters, like p
    p: float | None  # two-sided


def paired(first: Sample, second: Sample) -> Difference:
    """Return the difference of two systems' scores, by resampling both with the same draws.

    The interval has the percentiles of the resampled differences. With b and a resamples whose
    difference is at most and at least 0, p = min(1, 2 (1 + min(b, a)) / (1 + R)): the level at
    which the interval ends at 0 (Efron and Tibshirani 1993, section 15.4; one-sided in Koehn 2004),
    with the 1 of Davison and Hinkley 1997, section 4.2, for the observed sample; it is never 0.
    The items may be in different orders.

    Raises:
      DataError: the items, their clusters or the kinds of score differ, or an item occurs twice.
    """
    if first.score is not second.score:
        raise DataError("the two systems have scores of different kinds: compare equal ones")
    second = _in_order_of(first, second)
    value = first.value - second.value
    sums = first.cluster_sums(), second.cluster_sums()
    if len(sums[0]) < 2:
        return Difference(value, None, None)
    of_first, of_second = _resample(sums)
    differences = np.round(first.score(of_first) - second.score(of_second), _DIGITS)
    tail = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(1.0, 2 * (1 + int(tail)) / (1 + RESAMPLES))
    return Difference(value, _percentiles(differences), p)


def average(samples: Sequence[Sample]) -> Sample:
    """Return the sample of several runs of one system, such as seeds, on the same items.

    A mean becomes the mean of the runs' scores; counts become their averages. The runs are taken as
    they are: an interval of the result is over items, not over seeds.

    Raises:
      DataError: the items differ, see `paired`.
    """
    first, *others = samples
    aligned = [first, *(_in_order_of(first, other) for other in others)]
    return dataclasses.replace(first, parts=np.mean([each.parts for each in aligned], axis=0))


def _in_order_of(first: Sample, second: Sample) -> Sample:
    """Return `second` with its items in the order of `first`; DataError if they differ."""
    wanted, found = _places(first, "first"), _places(second, "second")
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    if missing or unknown:
        raise DataError(
            f"The two evaluations have different items: {_some(missing)} only in the first, "
            f"{_some(unknown)} only in the second. Evaluate both on the same data and as many items"
        )
    return second._take([found[key] for key in wanted])


def _places(sample: Sample, which: str) -> dict[tuple[Hashable, Hashable], int]:
    """Return the position of each item with its cluster."""
    repeated = [item for item, count in Counter(sample.items).items() if count > 1]
    if repeated:
        raise DataError(
            f"the {which} evaluation has several items named {repeated[0]!r}: each needs a name of "
            "its own"
        )
    keys = zip(sample.items, sample.clusters, strict=True)
    return {key: place for place, key in enumerate(keys)}


def _some(keys: Sequence[tuple[Hashable, Hashable]]) -> str:
    named = ", ".join(repr(item) for item, _ in keys[:3])
    return f"{len(keys)} (first: {named})" if keys else "none"


def _resample(groups: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the sums of `RESAMPLES` draws of as many clusters with replacement, f64[R, S] each.

    Args:
      groups: sums of each cluster, f64[G, S], all of the same G and resampled with equal draws.
    """
    sums = np.concatenate(groups, axis=1)
    clusters = len(sums)
    random = np.random.default_rng(_SEED)
    rows = max(1, _CELLS // clusters)
    drawn = np.empty((RESAMPLES, sums.shape[1]))
    for start in range(0, RESAMPLES, rows):
        count = min(rows, RESAMPLES - start)
        draws = random.integers(0, clusters, (count, clusters))
        draws += clusters * np.arange(count)[:, None]
        times = np.bincount(draws.ravel(), minlength=count * clusters).reshape(count, clusters)
        drawn[start : start + count] = times.astype(np.float64) @ sums
    return np.split(drawn, np.cumsum([group.shape[1] for group in groups])[:-1], axis=1)


def _percentiles(scores: np.ndarray) -> Interval:
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
