"""The configuration of one data set of a recipe."""

import dataclasses
from typing import Any, Literal

from vadapter.data.image_transform import Decode, Fit, ImageTransform

Stored = Literal["bfloat16", "int8"]  # dtype of cached features


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and how its examples become rows of a batch.

    Attributes:
      source: `{kind: scenes|tars|folder|table|parquet|tfds|documents, …}`; the other keys are the
        arguments of the class that `vadapter.data.open.SOURCES` names.
      task: caption | question | document.
      text_len, target_len: T and M of the batch; target_len=0 means text_len.
      texts: captions or questions of one image that share its prefix in a row.
      flip: mirror half of the images in training.
      size: pixels a side; 0: as the encoder requires.
      fit: crop | stretch | pad, see `ImageTransform`; "": as the encoder requires.
      decode: exact | fast: how JPEGs larger than the encoder's images are decoded, see
        `ImageTransform`. Benchmarks, captions and answers always decode exactly.
      frames: number of frames taken from a clip; an image is one frame.
      media: image | clip. "": as the source says; `vadapter plan`, which opens no source, then
        assumes images.
      cache: encode the images once and train on the stored features.
      cache_dir: folder of the stored features, which runs may share; "": RUN/features.
      cache_dtype: bfloat16 | int8 (with one scale for each token).
      last_only: only a document's last piece is a target.
      blank: every image and clip is replaced by uniform mid-gray, as input of a blind control: a
        model of the same shapes that has nothing to see.
    """

    source: dict[str, Any]
    task: str
    text_len: int
    target_len: int = 0
    texts: int = 1
    flip: bool = False
    size: int = 0
    frames: int = 8
    media: Literal["", "image", "clip"] = ""
    fit: Literal["", Fit] = ""
    decode: Decode = "exact"
    cache: bool = False
    cache_dir: str = ""
    cache_dtype: Stored = "bfloat16"
    last_only: bool = False
    blank: bool = False

    def view(self, own: ImageTransform | None) -> ImageTransform:
        """Return the encoder's image transform `own`, changed as this data set requires.

        Raises:
          ConfigError: neither of them specifies the size of images.
        """
        own = own or ImageTransform(self.size)
        size, fit = self.size or own.size, self.fit or own.fit
        return dataclasses.replace(own, size=size, fit=fit, decode=self.decode)
