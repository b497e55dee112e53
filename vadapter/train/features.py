"""The frozen encoder's tokens of a data set, computed once and read back as examples.

Legend: n examples, F frames, N visual tokens a frame, D encoder width, S pixels a side.
"""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from vadapter.config import digest as digest_of
from vadapter.data.batch import Row
from vadapter.data.images import BadMedia, load_media, resize
from vadapter.data.pipeline import eval_batches
from vadapter.data.sources import Example
from vadapter.evals.runner import to_mesh
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
        self._array: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_array": None}  # a worker maps the file again

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        if self._array is None:
            self._array = np.load(self.path, mmap_mode="r")
        example = self.source[index]
        media = np.asarray(self._array[index])
        return dataclasses.replace(example, media=media if self.flip else media[0])

    def fingerprint(self) -> str:
        """That of the pictures: the tokens follow from them and the encoder."""
        return self.source.fingerprint()


def cached(
    source: Any,
    folder: Path,
    *,
    encode: nn.Module,
    params: Any,
    digest: str,
    size: int,
    frames: int,
    fit: str,
    flip: bool,
    mesh: jax.sharding.Mesh,
    batch: int = 32,
) -> FeatureSource:
    """The source with its pictures encoded; computed into `folder` unless it is there already.

    Args:
      encode, params, digest: the frozen encoder and what identifies it.
      size, frames, fit: of the pictures, see `transforms.caption_sample`.
      flip: also of the mirrored picture.
      batch: pictures at a time.
    """
    key = {"source": source.fingerprint(), "encoder": digest, "size": size, "frames": frames,
           "fit": fit, "flip": flip}  # fmt: skip
    path = folder / f"{digest_of(key)[:16]}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        _compute(source, path, encode, params, size, frames, fit, flip, mesh, batch)
        write_json(path.with_suffix(".json"), key)
    return FeatureSource(source, path, flip)


def _compute(source, path, encode, params, size, frames, fit, flip, mesh, batch) -> None:
    shape = jax.eval_shape(
        encode.apply, {"params": params}, np.zeros((1, frames, size, size, 3), np.uint8)
    ).shape[1:]
    part = path.with_suffix(".part")
    out = np.lib.format.open_memmap(
        part, mode="w+", dtype=np.float16, shape=(len(source), 1 + flip, *shape)
    )
    step = jax.jit(lambda p, x: encode.apply({"params": p}, x).astype(np.float16))
    batch = -(-batch // mesh.size) * mesh.size
    for mirror in range(1 + flip):
        row = functools.partial(_pixels, size=size, frames=frames, fit=fit, flip=bool(mirror))
        done = 0
        for rows in eval_batches(source, row, batch):
            tokens = np.array(step(params, to_mesh({"frames": rows["frames"]}, mesh)["frames"]))
            tokens[rows["bad"]] = np.nan
            real = rows["id"] >= 0
            out[rows["id"][real], mirror] = tokens[real]
            done += int(real.sum())
            if done % (batch * 32) < batch:
                print(f"features: {done}/{len(source)}{' mirrored' * mirror}", flush=True)
    out.flush()
    del out
    part.replace(path)
    sys.stdout.flush()


def _pixels(
    example: Example, rng: Any = None, *, size: int, frames: int, fit: str, flip: bool
) -> Row:
    weights = np.ones(1, np.float32)
    try:
        if example.media is None:
            raise BadMedia("there is none")
        pixels = resize(load_media(example.media, frames=frames), size, fit=fit, flip=flip)
        return {"frames": pixels, "weights": weights, "bad": np.array(False)}
    except (BadMedia, OSError):
        pixels = np.zeros((frames, size, size, 3), np.uint8)
        return {"frames": pixels, "weights": weights, "bad": np.array(True)}
