"""What every vision encoder says about the pictures that it takes."""

import dataclasses

from vadapter.data.media.images import Fit, Interpolation, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How a picture becomes frames; a public encoder's preprocessor file says it.

    Attributes:
      image_size: S, pixels a side; at another S the same share of a picture is cut off.
      fit, interpolation, crop_pct, floor: see `images.View`.

    Raises:
      ConfigError: what is no `images.View`.
    """

    image_size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False

    def __post_init__(self) -> None:
        _ = self.view

    @property
    def view(self) -> View:
        """What becomes of a picture on the host."""
        return View(self.image_size, self.fit, self.interpolation, self.crop_pct, self.floor)
