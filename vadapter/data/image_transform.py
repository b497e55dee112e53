"""How images become the square that an encoder takes: part of recipes, so without an image library.

`vadapter.data.media.images` carries it out.
"""

import dataclasses
from typing import Literal, get_args

from vadapter.config import require_one_of
from vadapter.errors import ConfigError

Fit = Literal["crop", "stretch", "pad"]
Interpolation = Literal["bicubic", "bilinear"]


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """The transform of an image on the host, into a square of pixels.

    Attributes:
      size: S, pixels a side.
      fit: "crop" (resize the short side, cut out the center), "stretch" (ignore the aspect ratio)
        or "pad" (fit all of it, centered on gray).
      interpolation: "bicubic" or "bilinear".
      crop_pct: fraction of the short side that "crop" keeps, in 0..1, as in timm.
      floor: "crop" rounds half of an odd margin down, like `transformers`, instead of to even, like
        torchvision; they differ by one pixel in every fourth image.

    Raises:
      ConfigError: an unknown `fit` or `interpolation`, or a number out of range.
    """

    size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False

    def __post_init__(self) -> None:
        for key, names in (("fit", get_args(Fit)), ("interpolation", get_args(Interpolation))):
            require_one_of(f"{key}={getattr(self, key)!r}", getattr(self, key), names)
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"image_size={self.size}, crop_pct={self.crop_pct}: image_size must be at least 1, "
                "crop_pct above 0 and at most 1"
            )

    @property
    def short(self) -> int:
        """The length to which "crop" resizes the short side; S or more."""
        return int(self.size / self.crop_pct + 1e-6)
