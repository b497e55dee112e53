"""What every vision encoder says about the images that it takes."""

import dataclasses

from vadapter.data.media.images import Fit, ImageTransform, Interpolation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How an image becomes frames; a public encoder's preprocessor file says it.

    Attributes:
      image_size: S, pixels a side; at another S the same share of an image is cut off.
      fit, interpolation, crop_pct, floor: see `ImageTransform`.

    Raises:
      ConfigError: what is no `ImageTransform`.
    """

    image_size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False

    def __post_init__(self) -> None:
        _ = self.view

    @property
    def view(self) -> ImageTransform:
        """What becomes of an image on the host."""
        return ImageTransform(
            self.image_size, self.fit, self.interpolation, self.crop_pct, self.floor
        )
