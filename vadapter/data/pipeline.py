"""The stream of batches: every row a pure function of (seed, global index), and nothing else.

There is no iterator state to save. Row r of global step s is computed from (seed, s, r) alone, so
a run resumes by starting at a step, in the middle of an epoch or not, and sees the same batches
with any number of workers and threads, and, host rows put together, of hosts. Grain does the work:
its shuffle is a permutation that is computed index by index, and its threads and processes only
decide when and where a row is made.

How a row comes about:

    step ── Schedule ──► stream ── Stream ──► index in the source ── transform ──► row
            (mixture)              (shuffle)                         (transforms.py)

A bad sample stays in its place with weight 0 (`batch["bad"]`): an iterator that raises loses a
batch and shifts the stream, so nothing here may raise for one sample.

Legend: B global batch, b rows of this host, n items of a source.
"""

import functools
import math
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from vadapter.data.batch import Batch, Row
from vadapter.errors import ConfigError, DataError

_FOREVER = 2**40  # steps
_SLOTS = 1000  # resolution of the mixture


class Transform(Protocol):
    """A function from an item to a row, usually a `functools.partial` of one in transforms.py."""

    def __call__(self, item: Any, *, rng: np.random.Generator | None = None) -> Row: ...


class Items(Protocol):
    """Examples, or windows of them, with random access; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


Streams = Mapping[str, tuple[Items, Transform, float]]


class Stream:
    """The endless rows of one source: a new order each epoch, a new generator each row.

    A position counts the rows of this stream over all steps and hosts. Epoch e is the positions
    e·n … (e+1)·n - 1, which hold every item once.
    """

    def __init__(self, source: Items, transform: Transform, *, seed: int, name: str = ""):
        """Prepare the order of the rows; streams of different names draw independently."""
        import grain  # half a second of CPU time, which generating text does without

        self._source, self._transform = source, transform
        self._key = (seed, zlib.crc32(name.encode()))
        # Grain adds the number of the epoch to its seed, so that epoch 1 of seed 0 would be epoch 0
        # of seed 1. Hashing the seed keeps the epochs of different runs apart.
        shuffle_seed = int(np.random.SeedSequence(self._key).generate_state(1)[0])
        self._order = grain.MapDataset.range(len(source)).shuffle(seed=shuffle_seed)

    def index(self, position: int) -> int:
        """Return the index in the source, 0..n-1, of the row at a position."""
        return int(np.asarray(self._order[position]))

    def __getitem__(self, position: int) -> Row:
        index = self.index(position)
        # Seeded by position, not by index: an image is augmented differently in every epoch.
        rng = np.random.default_rng((*self._key, position))
        row = self._transform(self._source[index], rng=rng)
        return {**row, "id": np.array(index, np.int32)}


class Schedule:
    """The stream that each step draws from, in proportion to the weights.

    All rows of a batch come from one stream, since only those have the same shapes. The choice is
    a pure function of the step: a pattern of at most about 1000 steps repeats, and every stretch of
    it gives each stream its share to within a few steps, which random draws would not. Weights are
    rounded to thousandths.
    """

    def __init__(self, weights: Mapping[str, float]):
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights.values()):
            raise ConfigError(f"weights of streams must be above 0, got {dict(weights)}")
        total = sum(weights.values())
        shares = [max(1, round(_SLOTS * weight / total)) for weight in weights.values()]
        shares = [share // math.gcd(*shares) for share in shares]
        self._names = list(weights)
        # At each step every stream earns its share, and the richest pays for the step.
        self._pattern: list[int] = []
        credit = np.zeros(len(shares), np.int64)
        for _ in range(sum(shares)):
            credit += shares
            chosen = int(credit.argmax())
            credit[chosen] -= sum(shares)
            self._pattern.append(chosen)
        # [slot, stream]: how often the pattern draws from the stream before the slot. The last row
        # is the whole pattern.
        drawn = np.array(self._pattern)[:, None] == np.arange(len(shares))
        self._before = np.concatenate([np.zeros((1, len(shares)), np.int64), drawn.cumsum(0)])

    def __call__(self, step: int) -> tuple[str, int]:
        """Return the stream of a global step, and how many steps before it drew from it."""
        repeats, slot = divmod(step, len(self._pattern))
        chosen = self._pattern[slot]
        count = repeats * self._before[-1, chosen] + self._before[slot, chosen]
        return self._names[chosen], int(count)


class _HostRows(NamedTuple):
    """The rows of every global batch that this host makes: consecutive ones."""

    global_batch: int  # B
    count: int  # b
    first: int  # of them, in 0..B-1

    @classmethod
    def of(cls, global_batch: int, host_index: int, host_count: int) -> "_HostRows":
        if global_batch < 1 or global_batch % host_count or not 0 <= host_index < host_count:
            raise ConfigError(
                f"a batch of {global_batch} cannot be divided among {host_count} hosts (this is "
                f"host {host_index}): use a multiple of their number"
            )
        count = global_batch // host_count
        return cls(global_batch, count, host_index * count)

    def locate(self, i: int) -> tuple[int, int]:
        """Return the batch of this host's i-th row, and the row's place in the global batch."""
        batch, row = divmod(i, self.count)
        return batch, self.first + row


# Partially applied, the next two are picklable functions that grain maps over 0, 1, 2, …


def _train_row(
    streams: Mapping[str, Stream], schedule: Schedule, host: _HostRows, start_step: int, i: int
) -> Row:
    """Return row i of this host from `start_step` on."""
    batch, row = host.locate(i)
    name, count = schedule(start_step + batch)
    return streams[name][count * host.global_batch + row]


def _eval_row(source: Items, transform: Transform, host: _HostRows, i: int) -> Row:
    """Return row i of this host in one pass over a source in its order."""
    batch, row = host.locate(i)
    index, last = batch * host.global_batch + row, len(source) - 1
    filled = {**transform(source[min(index, last)], rng=None)}
    if index > last:  # past the end: a copy of the last row, which keeps every number finite
        filled |= {"weights": np.zeros_like(filled["weights"]), "bad": np.array(False)}
    return {**filled, "id": np.array(index if index <= last else -1, np.int32)}


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
    threads: int | None = None,
) -> Iterator[Batch]:
    """Return the training batches of this host from `start_step` on, each of one stream.

    Args:
      streams: name -> (source, transform, weight). The weight, relative to the others, is the
        stream's share of all steps.
      global_batch: B, a multiple of `host_count`; host h yields the rows h·b … (h+1)·b - 1.
      seed: >= 0; order, mixture and every augmentation derive from it.
      num_steps: length of the whole run: the last batch is that of step num_steps - 1. None: no
        end.
      workers: processes; 0 makes the rows in this process, -1 is all cores but one. They are
        spawned, so a script that uses them needs `if __name__ == "__main__"`, and they end when
        this process ends.
      threads: prefetching threads in this process or in each worker; 0 reads on demand, None is as
        many as there are cores for, see `cores.readers`.

    Raises:
      ConfigError: the batch cannot be divided among the hosts, a weight is not positive, or
        `workers` is below -1.
      DataError: a source is empty or smaller than a batch.
    """
    host = _HostRows.of(global_batch, host_index, host_count)
    if seed < 0 or start_step < 0:
        raise ConfigError(f"seed={seed} and start_step={start_step} must be 0 or more")
    schedule = Schedule({name: weight for name, (_, _, weight) in streams.items()})
    shuffled = {}
    for name, (source, transform, _) in streams.items():
        require_usable(source, global_batch, name)
        shuffled[name] = Stream(source, transform, seed=seed, name=name)
    steps = _FOREVER if num_steps is None else max(0, num_steps - start_step)
    make_row = functools.partial(_train_row, shuffled, schedule, host, start_step)
    return _batches(make_row, steps, host.count, workers, threads)


def eval_batches(
    source: Items,
    transform: Transform,
    batch_size: int,
    *,
    host_index: int = 0,
    host_count: int = 1,
    workers: int = 0,
    threads: int | None = None,
) -> Iterator[Batch]:
    """Return the batches of one pass over a source in its order, without augmentation (rng=None).

    The last batch is filled up with rows of id -1 and weight 0, so that all hosts make the same
    number of batches of the same shape. `batch_size` is global; the other arguments, and the
    errors, are those of `make_loader`.
    """
    host = _HostRows.of(batch_size, host_index, host_count)
    require_usable(source, 1)
    steps = -(-len(source) // batch_size)
    make_row = functools.partial(_eval_row, source, transform, host)
    return _batches(make_row, steps, host.count, workers, threads)


def require_usable(source: Items, batch: int, name: str = "") -> None:
    """Raise DataError unless the source fills a batch: grain would silently end or never yield."""
    if (count := len(source)) < batch:
        what = f"{name!r} ({type(source).__name__})" if name else type(source).__name__
        raise DataError(
            f"{count} usable examples in {what}, but a batch needs {batch}: check the path, the "
            "split and the filter, or lower the batch size"
        )


def _batches(
    make_row: Callable[[int], Row], steps: int, rows: int, workers: int, threads: int | None
) -> Iterator[Batch]:
    """Return the batches of `steps * rows` rows; each row is copied once, into its batch.

    A worker makes its batches in memory that this process reads, too.
    """
    from vadapter.data import cores  # read once data is

    if workers < -1:
        raise ConfigError(f"config.workers={workers}: must be -1 (all cores but one), 0 or more")
    workers, threads = cores.readers(workers, threads, cores.available())
    if not workers and not threads:
        return _on_demand(make_row, steps, rows)
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain reads absl flags, and no absl.app parsed them here
        flags.FLAGS.mark_as_parsed()
    data = grain.MapDataset.range(steps * rows).map(make_row).batch(rows)
    ahead = max(threads, 2) if threads else 0
    read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    batches = data.to_iter_dataset(read)
    if workers:
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=_exit_with_parent)
    return iter(batches)


def _on_demand(make_row: Callable[[int], Row], steps: int, rows: int) -> Iterator[Batch]:
    """Yield batches that this thread makes when they are asked for."""
    for step in range(steps):
        made = [make_row(i) for i in range(step * rows, (step + 1) * rows)]
        yield cast(Batch, {key: np.stack([row[key] for row in made]) for key in made[0]})


def _exit_with_parent(worker: int, count: int) -> None:
    """Make this worker exit when its parent is gone: a killed trainer cannot stop its workers."""
    del worker, count
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
