"""The stream of batches: every row a pure function of (seed, global index), and nothing else.

There is no iterator state to save. Row r of global step s is computed from (seed, s, r) alone, so
a run resumes by starting at a step, in the middle of an epoch or not, and sees the same batches
with any number of workers and threads, and, host rows put together, of hosts. Grain does the work:
its shuffle is a permutation that is computed index by index, and its threads and processes only
decide when and where a row is made.

A bad sample stays in its place with weight 0 (`batch["bad"]`): an iterator that raises loses a
batch and shifts the stream, so nothing here may raise for one sample.

Legend: B global batch, b rows of this host.
"""

import dataclasses
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import grain
import numpy as np
from absl import flags

from vadapter.data.batch import Batch, Row
from vadapter.errors import ConfigError, DataError

_FOREVER = 2**40  # steps
_SLOTS = 1000  # resolution of the mixture


class Transform(Protocol):
    """What makes a row of an item, usually a `functools.partial` of one in transforms.py."""

    def __call__(self, item: Any, *, rng: np.random.Generator | None = None) -> Row: ...


class Items(Protocol):
    """A source of examples, or of windows of them; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Streams = Mapping[str, tuple[Items, Transform, float]]


class Stream:
    """The endless rows of one source: a new order each epoch, a new generator each row.

    Epoch e holds the global indices e·n … (e+1)·n - 1, and in it every item once.
    """

    def __init__(self, source: Items, transform: Transform, *, seed: int, name: str = ""):
        """Args:
        source: n items.
        transform: makes a row of an item.
        seed: of the run, >= 0.
        name: streams of different names draw independently.
        """
        self._source, self._transform = source, transform
        self._key = (seed, zlib.crc32(name.encode()))
        # The shuffle of grain adds the epoch to its seed: hashed, no two runs share an epoch.
        shuffle_seed = int(np.random.SeedSequence(self._key).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed)

    def index(self, position: int) -> int:
        """The index in the source of the row at a global position, in 0..n-1."""
        return int(np.asarray(self._order[position]))

    def __getitem__(self, position: int) -> Row:
        index = self.index(position)
        rng = np.random.default_rng((*self._key, position))
        row = self._transform(self._source[index], rng=rng)
        return {**row, "id": np.array(index, np.int32)}


class Schedule:
    """Which stream a step draws from, in proportion to the weights; a pure function of the step.

    A pattern of at most about 1000 steps repeats: in every stretch of it each name has had its
    share of the steps, to within a few, with no luck involved. Weights are rounded to thousandths.
    """

    def __init__(self, weights: Mapping[str, float]):
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights.values()):
            raise ConfigError(f"Streams need weights above 0, got {dict(weights)}.")
        total = sum(weights.values())
        shares = [max(1, round(_SLOTS * weight / total)) for weight in weights.values()]
        shares = [share // math.gcd(*shares) for share in shares]
        self._names = list(weights)
        # Each step, every stream earns its share, and the richest pays for the step.
        self._pattern: list[int] = []
        credit = np.zeros(len(shares), np.int64)
        for _ in range(sum(shares)):
            credit += shares
            chosen = int(credit.argmax())
            credit[chosen] -= sum(shares)
            self._pattern.append(chosen)
        drawn = np.array(self._pattern)[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), drawn.cumsum(0)])

    def __call__(self, step: int) -> tuple[str, int]:
        """The stream of a global step, and how many steps before it drew from that stream."""
        round_, slot = divmod(step, len(self._pattern))
        chosen = self._pattern[slot]
        count = round_ * self._before[-1, chosen] + self._before[slot, chosen]
        return self._names[chosen], int(count)


@dataclasses.dataclass(frozen=True)
class _TrainRows:
    """Row i of this host's stream, from `start_step` on: what grain maps over."""

    streams: Mapping[str, Stream]
    schedule: Schedule
    global_batch: int
    rows: int  # of this host
    first_row: int  # of this host in a global batch
    start_step: int

    def __call__(self, i: int) -> Row:
        step, row = divmod(i, self.rows)
        name, count = self.schedule(self.start_step + step)
        return self.streams[name][count * self.global_batch + self.first_row + row]


@dataclasses.dataclass(frozen=True)
class _EvalRows:
    """Row i of this host's part of one pass in order."""

    source: Items
    transform: Transform
    global_batch: int
    rows: int
    first_row: int

    def __call__(self, i: int) -> Row:
        step, row = divmod(i, self.rows)
        index = step * self.global_batch + self.first_row + row
        last = len(self.source) - 1
        made = {**self.transform(self.source[min(index, last)], rng=None)}
        if index > last:  # a copy of the last row keeps every number finite
            made |= {"weights": np.zeros_like(made["weights"]), "bad": np.array(False)}
        return {**made, "id": np.array(index if index <= last else -1, np.int32)}


def make_loader(
    streams: Streams,
    *,
    global_batch: int,
    seed: int,
    start_step: int = 0,
    num_steps: int | None = None,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 4,
) -> Iterator[Batch]:
    """The batches of this host from `start_step` on, each of one of the streams.

    Args:
      streams: name -> (source, transform, weight); of all steps, each stream gets the share that
        its weight has.
      global_batch: B, a multiple of `host_count`; host h yields the rows h·b … (h+1)·b - 1.
      seed: >= 0; order, mixture position and every augmentation derive from it.
      start_step: the global step of the first batch.
      num_steps: length of the whole run: the last batch is that of step num_steps - 1. None: never.
      host_index, host_count: which part of every batch to make.
      workers: processes; 0 makes the rows in this process. They are spawned, so a script that
        uses them guards its main part by `if __name__ == "__main__"`, and they end with it.
      threads: threads that prefetch, in this process or in each worker; 0 reads when asked.

    Returns:
      An iterator of host batches (numpy), see batch.py.

    Raises:
      ConfigError: a batch that the hosts cannot share, weights that are not positive.
      DataError: a source that is empty or smaller than a batch.
    """
    rows, first_row = _share(global_batch, host_index, host_count)
    if seed < 0 or start_step < 0:
        raise ConfigError(f"seed={seed} and start_step={start_step} must be 0 or more.")
    schedule = Schedule({name: weight for name, (_, _, weight) in streams.items()})
    for name, (source, _, _) in streams.items():
        require_usable(source, global_batch, name)
    made = {
        name: Stream(source, transform, seed=seed, name=name)
        for name, (source, transform, _) in streams.items()
    }
    steps = _FOREVER if num_steps is None else max(0, num_steps - start_step)
    map_rows = _TrainRows(made, schedule, global_batch, rows, first_row, start_step)
    return _iterate(map_rows, steps, rows, workers, threads)


def eval_batches(
    source: Items,
    transform: Transform,
    batch_size: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int = 4,
) -> Iterator[Batch]:
    """One pass over a source in its order, without augmentation (rng=None).

    The last batch is filled with rows of id -1 and weight 0, so all hosts make the same number of
    batches of the same shape. `batch_size` is global; the other arguments as in `make_loader`.

    Raises:
      ConfigError: a batch that the hosts cannot share.
      DataError: the source is empty.
    """
    rows, first_row = _share(batch_size, host_index, host_count)
    require_usable(source, 1)
    map_rows = _EvalRows(source, transform, batch_size, rows, first_row)
    return _iterate(map_rows, -(-len(source) // batch_size), rows, workers, threads)


def require_usable(source: Items, batch: int, name: str = "") -> None:
    """Raises DataError unless the source fills a batch: grain would end, or spin, in silence."""
    if (count := len(source)) < batch:
        what = f"{name!r} ({type(source).__name__})" if name else type(source).__name__
        raise DataError(
            f"{count} usable examples in {what}, and a batch needs {batch}: check the path, the "
            "split and the filter, or lower the batch size."
        )


def _share(global_batch: int, host_index: int, host_count: int) -> tuple[int, int]:
    if global_batch < 1 or global_batch % host_count or not 0 <= host_index < host_count:
        raise ConfigError(
            f"A batch of {global_batch} cannot be shared by {host_count} hosts (this is host "
            f"{host_index}): make it a multiple of their number."
        )
    rows = global_batch // host_count
    return rows, host_index * rows


def _iterate(map_rows: Any, steps: int, rows: int, workers: int, threads: int) -> Iterator[Batch]:
    if not flags.FLAGS.is_parsed():  # grain reads absl flags
        flags.FLAGS.mark_as_parsed()
    data = grain.MapDataset.range(steps * rows).map(map_rows).batch(rows)
    read = grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(threads, 2) * (threads > 0)
    )
    batches = data.to_iter_dataset(read)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=_end_with_parent)
    return iter(batches)


def _end_with_parent(worker: int, count: int) -> None:
    """A killed trainer cannot stop its workers: they look for it, and end when it is gone."""
    del worker, count
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
