"""The frozen encoder's tokens of a data set, computed once and read back as examples.

Legend: n examples, F frames, N visual tokens a frame, D encoder width, S pixels a side.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vadapter.config import digest as digest_of
from vadapter.config import plain
from vadapter.data.batch import Row
from vadapter.data.example import Example, words_of
from vadapter.data.images import BadMedia, View, resize
from vadapter.data.media import load_media
from vadapter.data.pipeline import eval_batches
from vadapter.errors import ConfigError, DataError
from vadapter.parallel.compile import jit
from vadapter.parallel.mesh import to_mesh
from vadapter.train.lock import waiting_lock
from vadapter.train.recipe import DataConfig
from vadapter.train.writer import write_json


@dataclasses.dataclass
class FeatureSource:
    """A source whose media are encoder tokens, f16[F,N,D], or [2,F,N,D] with the mirrored picture.

    The tokens of a picture that could not be read are NaN: it becomes a bad row.
    """

    source: Any
    path: Path
    flip: bool

    def __post_init__(self):
        self.kind = self.source.kind
        # Not when the first thread asks: several at once trip over each other in the header's
        # parser (CPython 3.11, "AST constructor recursion depth mismatch").
        self._array = np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ = state | {"_array": np.load(state["path"], mmap_mode="r")}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = words_of(self.source, index)
        media = np.asarray(self._array[index])
        return dataclasses.replace(example, media=media if self.flip else media[0])

    def words(self, index: int) -> Example:
        """The example without its tokens."""
        return words_of(self.source, index)

    def fingerprint(self) -> str:
        """That of the pictures: the tokens follow from them and the encoder."""
        return self.source.fingerprint()


def encoded(
    source: Any,
    config: DataConfig,
    workdir: Path,
    *,
    encoder: Any,
    params: Any,
    digest: str,
    mesh: jax.sharding.Mesh,
    watch: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> FeatureSource:
    """A data set's source as a stage's frozen encoder sees it, cached in the run directory.

    Args:
      config: of the data set.
      workdir: the run directory.
      encoder, params, digest: the frozen encoder's module and what identifies it.
      watch, and the errors: see `cached`.
    """
    return cached(
        source,
        workdir / "features",
        encode=encoder,
        params=params,
        digest=digest,
        view=config.view(encoder.view),
        frames=config.frames if source.kind == "clip" else 1,
        flip=config.flip,
        mesh=mesh,
        watch=watch,
    )


def cached(
    source: Any,
    folder: Path,
    *,
    encode: nn.Module,
    params: Any,
    digest: str,
    view: View,
    frames: int,
    flip: bool,
    mesh: jax.sharding.Mesh,
    batch: int = 32,
    watch: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> FeatureSource:
    """The source with its pictures encoded; computed into `folder` unless it is there already.

    Args:
      encode, params, digest: the frozen encoder and what identifies it.
      view, frames: of the pictures, see `transforms.caption_sample`.
      flip: also of the mirrored picture.
      batch: pictures at a time.
      watch: passes the batches on, or raises to stop; the next call then starts again.

    Raises:
      ConfigError: no space for them.
      DataError: tokens that a float16 cannot hold.
    """
    key = {"source": source.fingerprint(), "encoder": digest, "model": plain(encode.config),
           "dtype": jnp.dtype(encode.dtype).name, "view": plain(view), "frames": frames,
           "flip": flip}  # fmt: skip
    path = folder / f"{digest_of(key)[:16]}.npy"
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / ".lock"):  # an evaluation may want the same tokens meanwhile
        if not path.exists():
            _compute(source, path, encode, params, view, frames, flip, mesh, batch, watch)
            write_json(path.with_suffix(".json"), key)
    return FeatureSource(source, path, flip)


def _compute(source, path, encode, params, view, frames, flip, mesh, batch, watch) -> None:
    shape = jax.eval_shape(
        encode.apply, {"params": params}, np.zeros((1, frames, view.size, view.size, 3), np.uint8)
    ).shape[1:]
    part = path.with_suffix(".part")  # what a kill leaves of it is written over
    out = _reserve(part, (len(source), 1 + flip, *shape))
    step = jit(lambda p, x: encode.apply({"params": p}, x).astype(np.float16))
    batch = -(-batch // mesh.size) * mesh.size
    for mirror in range(1 + flip):
        row = functools.partial(_pixels, view=view, frames=frames, flip=bool(mirror))
        done = 0
        for rows in watch(eval_batches(source, row, batch)):
            tokens = np.array(step(params, to_mesh({"frames": rows["frames"]}, mesh)["frames"]))
            if not np.isfinite(tokens).all():
                raise DataError("the encoder's tokens do not fit into float16; set cache=False")
            tokens[rows["bad"]] = np.nan
            real = rows["id"] >= 0
            out[rows["id"][real], mirror] = tokens[real]
            done += int(real.sum())
            if done % (batch * 32) < batch:
                print(f"features: {done}/{len(source)}{' mirrored' * mirror}", flush=True)
    out.flush()  # type: ignore[attr-defined]
    del out
    part.replace(path)
    sys.stdout.flush()


def _reserve(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file, f16[shape], mapped for writing; its space is taken at once.

    Without that, a disk that fills up kills a process that writes through a map (SIGBUS).
    """
    size = int(np.prod(shape)) * 2
    try:
        out = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=shape)
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(
            f"{path}: {error.strerror}; the cached tokens need {size / 2**20:,.0f} MiB. "
            "Free space, or set cache=False."
        ) from error
    return out


def _pixels(item: Example, rng: Any = None, *, view: View, frames: int, flip: bool) -> Row:
    weights = np.ones(1, np.float32)
    try:
        if item.media is None:
            raise BadMedia("there is none")
        pixels = resize(load_media(item.media, frames=frames), view, flip=flip)
        return {"frames": pixels, "weights": weights, "bad": np.array(False)}
    except (BadMedia, OSError):
        pixels = np.zeros((frames, view.size, view.size, 3), np.uint8)
        return {"frames": pixels, "weights": weights, "bad": np.array(True)}
