"""The frozen encoder's tokens of a data set, computed once and kept; `data.features` has the files.

Legend: n examples, M the image and its mirror image, F frames, N visual tokens a frame, D encoder
width, S pixels a side, B images at a time.
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
    """A data set's source as a stage's frozen encoder sees it, cached as the data set says.

    Args:
      config: of the data set.
      workdir: the run directory.
      encoder, params, digest: the frozen encoder's module and what identifies it.
      watch, and the errors: see `cached`.
    """
    folder = resolve(config.cache_dir, "cache_dir") if config.cache_dir else workdir / "features"
    if storage.remote(root := storage.as_path(folder)):
        raise ConfigError(
            f"cached tokens cannot lie in a bucket ({root}): set data.NAME.cache_dir to a folder "
            "on a disk that all hosts share, or data.NAME.cache=False"
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
    """The source with its images encoded; what `folder` lacks of their tokens is computed first.

    Several runs may share a folder: one computes, the others wait. On several hosts all make the
    same call, with the folder on a shared file system, and each writes shards of its own.

    Args:
      folder: of any number of caches, each in a folder that is named by its key.
      encode, params, digest: the frozen encoder and what identifies it.
      view, frames: of the pictures, see `transforms.caption_sample`.
      flip: also of the mirror image.
      stored: as bfloat16, or as int8 with a scale a token.
      batch: images at a time.
      watch: passes the batches on, or raises to stop; the next call then goes on behind the last
        complete shard.

    Raises:
      ConfigError: no space for them.
      DataError: tokens that are not finite; a shard that is damaged, see `Cache.read`.
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
                where = batch_sharding(mesh)
                step = with_mesh(mesh, functools.partial(_encode, encode, stored))
                step = jit(step, out_shardings=where)
                step = functools.partial(_run, functools.partial(step, params), mesh)
                _announce(cache, missing, key)
                _compute(cache, missing, source, row, step, mesh.size, batch, watch)
    return FeatureSource(source, cache)


def _missing(cache: Cache) -> list[int]:
    """Shards that are not there, as the first host sees it."""
    missing = [int(shard) for shard in cache.missing()]
    return hosts.exchange(missing, f"features {cache.key}", patience=hosts.WORK)[0]


@contextlib.contextmanager
def _alone(cache: Cache) -> Iterator[None]:
    """An evaluation, or another run, may want the same tokens meanwhile."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    with lock(cache.folder / ".lock", wait=True):
        yield


def _announce(cache: Cache, missing: list[int], key: Any) -> None:
    """Says what will be written, and refuses what the disk has no room for.

    Raises:
      ConfigError: it has not.
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
            f"{cache.folder}: the cached tokens need {size:,} bytes ({console.size(size)}), and "
            f"{console.size(free)} are free. Free space, choose another cache_dir or "
            "cache_dtype=int8, or set cache=False."
        )
    write_json(cache.folder / "key.json", key)


def _compute(
    cache: Cache, missing: list[int], source: Source, row: Any, step: Any, devices: int, batch: int,
    watch: Watch,
) -> None:  # fmt: skip
    """Writes this host's share of the missing shards; all hosts take the same number of steps."""
    host, count = hosts.index(), hosts.count()
    mine = [cache.span(shard) for shard in missing[host::count]]
    # Each shard begins a batch, so that its bits do not depend on which others are missing.
    batch = max(min(batch // cache.shape[0], cache.count), 1)
    batch = (batch + -batch % devices) // count
    padded = [np.resize(span, len(span) + -len(span) % batch) for span in mine]
    real = [np.arange(len(rows)) < len(span) for rows, span in zip(padded, mine, strict=True)]
    steps_of = lambda shard: -(-len(cache.span(shard)) // batch)  # noqa: E731
    longest = batch * max(sum(map(steps_of, missing[i::count])) for i in range(count))
    fill = np.zeros(max(longest - sum(map(len, padded)), 0), int)
    items = _Picked(source, np.concatenate([*padded, fill]))
    wanted = np.concatenate([*real, fill > 0])

    steps = ((step(rows), rows["id"]) for rows in watch(eval_batches(items, row, batch)))
    with Progress("" if host else "features", int(wanted.sum()), every=_PROGRESS_EVERY) as progress:

        def records_of(steps: Iterator[Any]) -> Iterator[bytes]:
            for out, ids in _ahead(steps):
                if batch_records := _records(out, wanted[ids]):
                    progress.advance(len(batch_records))
                    yield from batch_records

        records = records_of(steps)
        for shard in missing[host::count]:
            cache.write(shard, records)
        for _ in records:  # the others have more
            pass
    hosts.exchange("", f"features {cache.key} written", patience=hosts.WORK)


@dataclasses.dataclass
class _Picked:
    """Some of a source's examples."""

    source: Source
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


def _pixels(
    item: Example, rng: Any = None, *, view: ImageTransform, frames: int, flip: bool
) -> Row:
    """frames u8[M,F,S,S,3] of an example, and whether they could not be read."""
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
    """What `data.features` stores of u8[B,M,F,S,S,3], part by part; and where it is finite."""
    both: Any = encode.apply({"params": params}, frames.reshape(-1, *frames.shape[2:]))
    tokens = both.reshape(*frames.shape[:2], *both.shape[1:]).astype(jnp.float32)
    finite = jnp.isfinite(tokens).all((1, 2, 3, 4)) | bad
    masked = lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x)  # noqa: E731
    if stored == "bfloat16":
        return finite, (masked(tokens).astype(jnp.bfloat16),)
    scales = jnp.abs(tokens).max(-1) / 127
    values = jnp.rint(tokens / jnp.where(scales > 0, scales, 1)[..., None])
    return finite, (masked(scales), values.astype(jnp.int8))


def _run(step: Any, mesh: jax.sharding.Mesh, batch: Row) -> Any:
    """The step's result, not waited for."""
    arrays = to_mesh({key: batch[key] for key in ("frames", "bad")}, mesh)
    return step(arrays["frames"], arrays["bad"])


def _records(out: Any, wanted: np.ndarray) -> list[bytes]:
    """The records of those rows of this host that are wanted."""
    finite, parts = jax.tree.map(local_rows, out)
    if not finite[wanted].all():
        raise DataError("the encoder's tokens are not finite; mend its weights, or its dtype")
    return [b"".join(part[i].tobytes() for part in parts) for i in np.flatnonzero(wanted)]


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each when the next has been asked for: the devices never wait for the disk."""
    before = list(itertools.islice(items, 1))
    for item in items:
        yield before.pop()
        before.append(item)
    yield from before
