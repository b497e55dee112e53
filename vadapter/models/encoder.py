"""What all vision encoders have in common: how an image becomes pixels, and pixels numbers.

Legend: n batch and frames, H and W pixels.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from vadapter.data.image_transform import Fit, ImageTransform, Interpolation
from vadapter.errors import ConfigError

HALF = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How an image becomes frames, as a public encoder's preprocessor file says.

    Attributes:
      image_size: S, pixels a side; at another S the same share of an image is cropped.
      fit, interpolation, crop_pct, floor: see `ImageTransform`, which checks them.
    """

    image_size: int
    fit: Fit = "crop"
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 1.0
    floor: bool = False

    def __post_init__(self) -> None:
        _ = self.view  # validates

    @property
    def view(self) -> ImageTransform:
        """The transform of an image on the host, before it becomes a frame."""
        fields = (self.image_size, self.fit, self.interpolation, self.crop_pct, self.floor)
        return ImageTransform(*fields)


def normalize_pixels(
    frames: Num[Array, "*n H W 3"], mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF
) -> Float[Array, "*n H W 3"]:
    """Return (frames / 255 - mean) / std in float32; by default pixels in -1..1.

    On the device, so that hosts send bytes: a quarter of the transfer. `frames` are in 0..255, mean
    and std those of the channels for pixels in 0..1.
    """
    shape = (*(1,) * (frames.ndim - 1), 3)
    shift, scale = (jnp.asarray(v, jnp.float32).reshape(shape) for v in (mean, std))
    return (frames.astype(jnp.float32) / 255 - shift) / scale


def patches_a_side(image_size: int, patch: int) -> int:
    """Return the number of whole patches along a side; raise ConfigError if there is none."""
    if image_size < patch:
        raise ConfigError(f"image_size={image_size} is less than one patch={patch}")
    return image_size // patch


def without_border(
    frames: Float[Array, "*n H W 3"], image_size: int, patch: int
) -> Float[Array, "*n h w 3"]:
    """Return the pixels that whole patches cover, as a convolution of that stride reads them.

    Raises:
      ValueError: the frames are not of `image_size` pixels a side, what the encoder was built for.
    """
    height, width = frames.shape[-3:-1]
    if (height, width) != (image_size, image_size):
        raise ValueError(
            f"frames of {height} x {width} pixels, but the encoder's image_size is {image_size}; "
            "leave out the data's `size`, or set the encoder's image_size to it"
        )
    used = patches_a_side(image_size, patch) * patch
    return frames[..., :used, :used, :]
