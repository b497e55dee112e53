"""Visual tokens of a data set, computed once by the frozen encoder and cached on disk.

`data.features` reads and writes the files.

Legend: M the image and its mirror image, F frames, N visual tokens per frame, D encoder width,
S pixels per side, B images per batch.
"""

import contextlib
import dataclasses
import functools
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vadapter import console
from vadapter.config import digest as digest_of
from vadapter.config import plain, resolve
from vadapter.console import Progress
from vadapter.data.batch import Row
from vadapter.data.config import DataConfig
from vadapter.data.example import Example, Source
from vadapter.data.features import FORMAT, SLACK_BYTES, Cache, FeatureSource, Stored
from vadapter.data.media.images import BadMedia, ImageTransform
from vadapter.data.pipeline import eval_batches
from vadapter.distributed import hosts
from vadapter.distributed.compile import jit
from vadapter.distributed.mesh import batch_sharding, local_rows, to_mesh, with_mesh
from vadapter.errors import ConfigError, DataError
from vadapter.io import storage
from vadapter.io.json_files import write_json
from vadapter.io.lock import lock

T = TypeVar("T")
Watch = Callable[[Iterator[Any]], Iterator[Any]]

_PROGRESS_EVERY = 10.0  # seconds


def encoded(
    source: Source,
    config: DataConfig,
    workdir: Path,
    *,
    encoder: Any,
    params: Any,
    digest: str,
    mesh: jax.sharding.Mesh,
    watch: Watch = iter,
) -> FeatureSource:
    """Return a data set with visual tokens instead of images, cached as its configuration says.

    Args:
      source: of the data set.
      config: of the data set.
      workdir: the run directory.
      encoder, params, digest: the frozen encoder's module, its parameters and their digest.
      mesh: to compute on.
      watch: see `cached`.

    Raises:
      ConfigError: the cache would be in a bucket; else as `cached`.
      DataError: as `cached`.
    """
    folder = resolve(config.cache_dir, "cache_dir") if config.cache_dir else workdir / "features"
    if storage.remote(root := storage.as_path(folder)):
        raise ConfigError(
            f"visual tokens cannot be cached in a bucket ({root}): set data.NAME.cache_dir to a "
            "folder on a disk that all hosts share, or data.NAME.cache=False"
        )
    return cached(
        source,
        root,
        encode=encoder,
        params=params,
        digest=digest,
        view=config.view(encoder.view),
        frames=config.frames if source.kind == "clip" else 1,
        flip=config.flip,
        stored=config.cache_dtype,
        mesh=mesh,
        watch=watch,
    )


def cached(
    source: Source,
    folder: Path,
    *,
    encode: nn.Module,
    params: Any,
    digest: str,
    view: ImageTransform,
    frames: int,
    flip: bool,
    mesh: jax.sharding.Mesh,
    stored: Stored = "bfloat16",
    batch: int = 32,
    watch: Watch = iter,
) -> FeatureSource:
    """Return a source with visual tokens instead of images; missing shards are computed first.

    Several runs may share a folder: one computes, the others wait. On several hosts all make the
    same call, with the folder on a shared file system, and each writes its own shards.

    Args:
      source: of the images or clips.
      folder: holds any number of caches, each in a folder named by its key.
      encode, params, digest: the frozen encoder's module, its parameters and their digest.
      view, frames: how the encoder sees an example, see `transforms.caption_sample`.
      flip: also cache the tokens of the mirror image.
      mesh: to compute on.
      stored: bfloat16, or int8 with one scale per token.
      batch: B.
      watch: yields the batches, or raises to stop; the next call resumes after the last complete
        shard.

    Raises:
      ConfigError: the disk has too little space.
      DataError: tokens are not finite; a shard is corrupt, see `Cache.read`.
    """
    frames_of_one = np.zeros((1, frames, view.size, view.size, 3), np.uint8)
    tokens: Any = jax.eval_shape(encode.apply, {"params": params}, frames_of_one)
    key = {"source": source.fingerprint(), "encoder": digest, "model": plain(encode.config),
           "dtype": jnp.dtype(encode.dtype).name, "view": plain(view), "frames": frames,
           "flip": flip, "stored": stored, "format": FORMAT}  # fmt: skip
    name, shape = digest_of(key), (1 + flip, *tokens.shape[1:])
    cache = Cache(folder / name[:16], name, len(source), shape, stored)
    if _missing(cache):
        first = hosts.first()
        with _alone(cache) if first else contextlib.nullcontext():
            if missing := _missing(cache):
                row = functools.partial(_pixels, view=view, frames=frames, flip=flip)
                encode_fn = with_mesh(mesh, functools.partial(_encode, encode, stored))
                encode_fn = jit(encode_fn, out_shardings=batch_sharding(mesh))
                step = functools.partial(_run, functools.partial(encode_fn, params), mesh)
                _announce(cache, missing, key)
                _compute(cache, missing, source, row, step, mesh.size, batch, watch)
    return FeatureSource(source, cache)


def _missing(cache: Cache) -> list[int]:
    """Return the missing shards, as seen by the first host."""
    missing = [int(shard) for shard in cache.missing()]
    return hosts.exchange(missing, f"features {cache.key}", patience=hosts.WORK)[0]


@contextlib.contextmanager
def _alone(cache: Cache) -> Iterator[None]:
    """Lock the cache: another run, or an evaluation, may compute the same tokens."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    with lock(cache.folder / ".lock", wait=True):
        yield


def _announce(cache: Cache, missing: list[int], key: Any) -> None:
    """Print what will be written.

    Raises:
      ConfigError: the disk has too little space.
    """
    if not hosts.first():
        return
    count = sum(len(cache.span(shard)) for shard in missing)
    size, free = count * cache.record_bytes, shutil.disk_usage(cache.folder).free
    M, F, N, D = cache.shape
    print(
        f"features: {count:,} of {cache.count:,} examples × {M} × {F} × {N} tokens × {D:,} "
        f"{cache.stored}: {size:,} bytes ({console.size(size)}) in {len(missing)} files of "
        f"{cache.folder}, where {console.size(free)} are free",
        flush=True,
    )
    if free < size + len(missing) * SLACK_BYTES:
        raise ConfigError(
            f"{cache.folder}: the visual tokens need {size:,} bytes ({console.size(size)}), and "
            f"{console.size(free)} are free. Free space, choose another cache_dir or "
            "cache_dtype=int8, or set cache=False."
        )
    write_json(cache.folder / "key.json", key)


def _compute(
    cache: Cache, missing: list[int], source: Source, row: Any, step: Any, devices: int, batch: int,
    watch: Watch,
) -> None:  # fmt: skip
    """Write this host's share of the missing shards; all hosts take the same number of steps."""
    host, count = hosts.index(), hosts.count()
    mine = [cache.span(shard) for shard in missing[host::count]]
    # Each shard begins a batch, so that its bits do not depend on which others are missing.
    batch = max(min(batch // cache.shape[0], cache.count), 1)
    batch = (batch + -batch % devices) // count
    padded = [np.resize(span, len(span) + -len(span) % batch) for span in mine]
    real = [np.arange(len(rows)) < len(span) for rows, span in zip(padded, mine, strict=True)]
    steps_of = [-(-len(cache.span(shard)) // batch) for shard in missing]
    longest = batch * max(sum(steps_of[i::count]) for i in range(count))
    fill = np.zeros(max(longest - sum(map(len, padded)), 0), int)
    items = _Picked(source, np.concatenate([*padded, fill]))
    stored = np.concatenate([*real, fill > 0])

    steps = ((step(rows), rows["id"]) for rows in watch(eval_batches(items, row, batch)))
    with Progress("" if host else "features", int(stored.sum()), every=_PROGRESS_EVERY) as progress:

        def records_of(steps: Iterator[Any]) -> Iterator[bytes]:
            for out, ids in _ahead(steps):
                if batch_records := _records(out, stored[ids]):
                    progress.advance(len(batch_records))
                    yield from batch_records

        records = records_of(steps)
        for shard in missing[host::count]:
            cache.write(shard, records)
        for _ in records:  # other hosts may have more shards
            pass
    hosts.exchange("", f"features {cache.key} written", patience=hosts.WORK)


@dataclasses.dataclass
class _Picked:
    """Selected examples of a source."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def _pixels(
    item: Example, rng: Any = None, *, view: ImageTransform, frames: int, flip: bool
) -> Row:
    """Return frames u8[M,F,S,S,3] of an example, and in `bad` whether they could not be read."""
    from vadapter.data.media.frames import load_square  # with the readers of video

    weights, mirrored = np.ones(1, np.float32), (False, True)[: 1 + flip]
    try:
        pixels = load_square(item.media, view, frames=frames)
        both = np.stack([pixels[:, :, ::-1] if mirror else pixels for mirror in mirrored])
        return {"frames": both, "weights": weights, "bad": np.array(False)}
    except (BadMedia, OSError):
        both = np.zeros((1 + flip, frames, view.size, view.size, 3), np.uint8)
        return {"frames": both, "weights": weights, "bad": np.array(True)}


def _encode(
    encode: nn.Module, stored: Stored, params: Any, frames: jax.Array, bad: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return what `data.features` stores of frames u8[B,M,F,S,S,3], after which rows are finite.

    Returns:
      bool[B], and the tokens bfloat16[B,M,F,N,D] or (scales float32[B,M,F,N], int8[B,M,F,N,D]).
    """
    both: Any = encode.apply({"params": params}, frames.reshape(-1, *frames.shape[2:]))
    tokens = both.reshape(*frames.shape[:2], *both.shape[1:]).astype(jnp.float32)
    finite = jnp.isfinite(tokens).all((1, 2, 3, 4)) | bad

    def masked(x: jax.Array) -> jax.Array:
        """Return NaN for unusable rows: `data.features` recognizes them by that."""
        return jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)

    if stored == "bfloat16":
        return finite, (masked(tokens).astype(jnp.bfloat16),)
    scales = jnp.abs(tokens).max(-1) / 127
    values = jnp.rint(tokens / jnp.where(scales > 0, scales, 1)[..., None])
    return finite, (masked(scales), values.astype(jnp.int8))


def _run(step: Any, mesh: jax.sharding.Mesh, batch: Row) -> Any:
    """Return the result of the step, without waiting for it."""
    arrays = to_mesh({key: batch[key] for key in ("frames", "bad")}, mesh)
    return step(arrays["frames"], arrays["bad"])


def _records(out: Any, stored: np.ndarray) -> list[bytes]:
    """Return the records of this host's rows that are to be stored, bool[B]; the rest is padding.

    Raises:
      DataError: tokens are not finite.
    """
    finite, arrays = jax.tree.map(local_rows, out)
    if not finite[stored].all():
        raise DataError("the encoder's tokens are not finite; fix its weights, or its dtype")
    return [b"".join(array[i].tobytes() for array in arrays) for i in np.flatnonzero(stored)]


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next was dispatched, so that devices never wait for the disk."""
    pending = list(itertools.islice(items, 1))
    for item in items:
        yield pending.pop()
        pending.append(item)
    yield from pending
