"""What a recipe says about one of its data sets."""

import dataclasses
from typing import Any, Literal

from vadapter.data.features import Stored
from vadapter.data.media.images import Fit, ImageTransform


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """A data set and how its examples become rows of a batch.

    Attributes:
      source: `{kind: scenes|tars|folder|documents, …}`, see `vadapter.data.open`.
      task: caption | question | document.
      text_len, target_len: T and M of the batch; target_len=0 is text_len.
      texts: captions or questions of one image behind one prefix.
      flip: mirror half of the pictures while training.
      size: pixels a side; fit: crop | stretch | pad. 0 and "" leave it to the encoder, see
        `ImageTransform`.
      frames: of a clip; images have one.
      media: image | clip, what its images are; "": the source says, and `vadapter plan`, which
        opens none, takes them for images.
      cache: encode the images once and train on the stored tokens.
      cache_dir: of the stored tokens, which other runs may share; "": RUN/features.
      cache_dtype: bfloat16 | int8 (with a scale a token).
      last_only: only a document's last piece is a target.
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
    cache: bool = False
    cache_dir: str = ""
    cache_dtype: Stored = "bfloat16"
    last_only: bool = False

    def view(self, own: ImageTransform | None) -> ImageTransform:
        """How an encoder's `own` view of images is changed for this data set.

        Raises:
          ConfigError: neither of them says how large images are.
        """
        own = own or ImageTransform(self.size)
        return dataclasses.replace(own, size=self.size or own.size, fit=self.fit or own.fit)
