"""Visual tokens of a data set, computed once by the frozen encoder and cached on disk.

`data.features` reads and writes the files.

Legend: M the image and its mirror image, F frames, N visual tokens per frame, D encoder width,
S pixels per side, B images per batch.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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

Watch = Callable[[Iterator[Any]], Iterator[Any]]


def encoded(
    source: Source, config: DataConfig, workdir: Path, *, encoder: Any, params: Any, digest: str,
    mesh: jax.sharding.Mesh, watch: Watch = iter, batch: int = 32,
) -> FeatureSource:  # fmt: skip
    """Return a data set with visual tokens instead of images; missing shards are computed first.

    Several runs may share a folder: one computes, the others wait. On several hosts all make the
    same call, with the folder on a shared file system, and each writes its own shards.

    Args:
      config: of the data set; its folder holds any number of caches, each in a folder named by its
        key. Without a folder, they are in the run directory.
      encoder, params, digest: the frozen encoder's module, its parameters and their digest.
      watch: yields the batches, or raises to stop; the next call resumes after the last complete
        shard.
      batch: B.

    Raises:
      ConfigError: the cache would be in a bucket, or the disk has too little space.
      DataError: tokens are not finite; a shard is corrupt, see `Cache.verify`.
    """
    folder = resolve(config.cache_dir, "cache_dir") if config.cache_dir else workdir / "features"
    if storage.remote(root := storage.as_path(folder)):
        raise ConfigError(
            f"visual tokens cannot be cached in a bucket ({root}): set data.NAME.cache_dir to a "
            "folder on a disk that all hosts share, or data.NAME.cache=False"
        )
    view, flip, stored = config.view(encoder.view), config.flip, config.cache_dtype
    frames = config.frames if source.kind == "clip" else 1
    pixels = np.zeros((1, frames, view.size, view.size, 3), np.uint8)
    tokens: Any = jax.eval_shape(encoder.apply, {"params": params}, pixels)
    key = {"source": source.fingerprint(), "encoder": digest, "model": plain(encoder.config),
           "dtype": jnp.dtype(encoder.dtype).name, "view": view.fields, "frames": frames,
           "flip": flip, "stored": stored, "format": FORMAT}  # fmt: skip
    count = len(source)
    if config.blank:  # one image, whatever the data set
        key, count = {**key, "source": "blank"}, 1
    name, shape = digest_of(key), (1 + flip, *tokens.shape[1:])
    cache = Cache(root / name[:16], name, count, shape, stored)
    if not _missing(cache):
        return FeatureSource(source, cache)

    encode = with_mesh(mesh, functools.partial(_encode, encoder, stored))
    encode = jit(encode, out_shardings=batch_sharding(mesh))

    def step(rows: Row) -> Any:
        arrays = to_mesh({key: rows[key] for key in ("frames", "bad")}, mesh)
        return encode(params, arrays["frames"], arrays["bad"])

    # Another run, or an evaluation, may compute the same tokens.
    with lock(cache.folder / ".lock", wait=True) if hosts.first() else contextlib.nullcontext():
        if missing := _missing(cache):
            _announce(cache, missing, key)
            row = functools.partial(_pixels, view=view, frames=frames, flip=flip)
            _compute(cache, missing, source, row, step, mesh.size, batch, watch)
    return FeatureSource(source, cache)


def _missing(cache: Cache) -> list[int]:
    """Return the missing shards, as seen by the first host."""
    missing = [int(shard) for shard in cache.missing()]
    return hosts.of_first(missing, f"features {cache.key}", patience=hosts.WORK)


def _announce(cache: Cache, missing: list[int], key: Any) -> None:
    """Print what will be written; ConfigError if the disk has too little space."""
    if not hosts.first():
        return
    count = sum(len(cache.span(shard)) for shard in missing)
    size, free = count * cache.record_bytes, shutil.disk_usage(cache.folder).free
    *tokens, width = cache.shape
    print(
        f"feature cache: {count:,} of {cache.count:,} examples, {math.prod(tokens):,} tokens × "
        f"{width:,} {cache.stored} each, {console.size(size)} in "
        f"{console.quantity(len(missing), 'file')} in {cache.folder} ({console.size(free)} free)",
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
    items = _Selection(source, np.concatenate([*padded, fill]))
    stored = np.concatenate([*real, fill > 0])

    steps = ((step(rows), rows["id"]) for rows in watch(eval_batches(items, row, batch)))
    with Progress("" if host else "features", int(stored.sum())) as progress:

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
class _Selection:
    """Examples of a source, in an order of their own."""

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

    try:
        pixels, bad = load_square(item.media, view, frames=frames), False
    except (BadMedia, OSError):
        pixels, bad = np.zeros((frames, view.size, view.size, 3), np.uint8), True
    both = np.stack([pixels, pixels[:, :, ::-1]][: 1 + flip])
    return {"frames": both, "weights": np.ones(1, np.float32), "bad": np.array(bad)}


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


def _records(out: Any, stored: np.ndarray) -> list[bytes]:
    """Return the records of this host's rows that are to be stored, bool[B]; the rest is padding.

    DataError if tokens are not finite.
    """
    finite, arrays = jax.tree.map(local_rows, out)
    if not finite[stored].all():
        raise DataError("the encoder's tokens are not finite; fix its weights, or its dtype")
    return [b"".join(array[i].tobytes() for array in arrays) for i in np.flatnonzero(stored)]


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """Yield each item after the next was dispatched, so that devices never wait for the disk."""
    pending = list(itertools.islice(items, 1))
    for item in items:
        yield pending.pop()
        pending.append(item)
    yield from pending
