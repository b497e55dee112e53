"""How images become the square that an encoder takes: part of recipes, so without an image library.

`vadapter.data.media.images` carries it out.
"""

import dataclasses
from typing import Any, Literal, get_args

from vadapter.config import require_one_of
from vadapter.errors import ConfigError

Fit = Literal["crop", "stretch", "pad"]
Interpolation = Literal["bicubic", "bilinear", "lanczos"]
Decode = Literal["exact", "fast"]


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """The transform of an image on the host, into a square of pixels.

    Attributes:
      size: S, pixels a side.
      fit: "crop" (resize the short side, cut out the center), "stretch" (ignore the aspect ratio)
        or "pad" (fit all of it, centered on gray).
      interpolation: "bicubic", "bilinear" or "lanczos".
      crop_pct: fraction of the short side that "crop" keeps, in 0..1, as in timm.
      floor: "crop" rounds half of an odd margin down, like `transformers`, instead of to even, like
        torchvision; they differ by one pixel in every fourth image.
      decode: "exact", as the public encoders do, or "fast": a JPEG at least twice as large as it
        is resized to is decoded at a half, a quarter or an eighth of its size, never below that.
        Levels of 0..255 differ by about one on average; all other images are the same bits.

    Raises:
      ConfigError: an unknown `fit`, `interpolation` or `decode`, or a number out of range.
    """

    size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False
    decode: Decode = "exact"

    def __post_init__(self) -> None:
        for key, of in (("fit", Fit), ("interpolation", Interpolation), ("decode", Decode)):
            require_one_of(f"{key}={getattr(self, key)!r}", getattr(self, key), get_args(of))
        if self.size < 1 or not 0 < self.crop_pct <= 1:
            raise ConfigError(
                f"image_size={self.size}, crop_pct={self.crop_pct}: image_size must be at least 1, "
                "crop_pct above 0 and at most 1"
            )

    @property
    def short(self) -> int:
        """The length to which "crop" resizes the short side; S or more."""
        return int(self.size / self.crop_pct + 1e-6)

    def reduction(self, width: int, height: int) -> int:
        """Return by how much a JPEG of these sides may be decoded smaller: 1, 2, 4 or 8."""
        if self.decode == "exact":
            return 1
        side = max(width, height) if self.fit == "pad" else min(width, height)
        least = self.short if self.fit == "crop" else self.size
        fits = (n for n in (8, 4, 2) if side >= n * least and min(width, height) >= n)
        return next(fits, 1)

    @property
    def fields(self) -> dict[str, Any]:
        """The fields as JSON values, without `decode` where it is exact.

        Digests of these are in the names of feature caches that earlier versions wrote.
        """
        values = dataclasses.asdict(self)
        if self.decode == "exact":
            del values["decode"]
        return values
