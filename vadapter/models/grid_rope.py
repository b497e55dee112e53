"""Rotary positions of a grid of patches: half of the pairs turn with the row, half with the column.

Legend: G patches a side, U = G · G patches, T tokens with those before the patches, K head dim, P =
K / 2 pairs.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np

from vadapter.errors import ConfigError
from vadapter.models.rope import Angles


@dataclasses.dataclass(frozen=True)
class GridRopeConfig:
    """The coordinates of patches, and the frequencies by which they turn a head's pairs.

    Attributes:
      theta: base of the geometric progression of frequencies.
      coordinates: of a patch along a side. index: 0, 1, … (EVA-02). center: that of its center,
        from -1 to 1 over the image, times 2π (DINOv3).
      offset: is added to the number of a patch.
      reference: patches a side at which the model was trained: indices of another grid are scaled
        to it; 0: they are not.
      column_first: the first half of the pairs turns with the column, not with the row.
    """

    theta: float = 10_000.0
    coordinates: Literal["index", "center"] = "index"
    offset: float = 0.0
    reference: int = 0
    column_first: bool = False


def grid_rotary(config: GridRopeConfig, side: int, leading: int, head_dim: int) -> Angles:
    """Return sine and cosine of the angles of G · G patches, f32[1,T,P].

    The `leading` tokens before the patches, class token and registers, are not rotated. Computed in
    float32, operation for operation as in transformers' DINOv3 and timm's EVA.

    Raises:
      ConfigError: K is not divisible by 4.
    """
    if head_dim % 4:
        raise ConfigError(
            f"rope: a head has {head_dim} dimensions, which is not divisible by 4: half of its "
            "pairs turn with the row, half with the column; change width or heads"
        )
    bands = head_dim // 4
    exponents = np.arange(bands, dtype=np.float32) / np.float32(bands)
    freq = np.float32(1) / np.float32(config.theta) ** exponents
    along = np.arange(side, dtype=np.float32)
    if config.coordinates == "center":
        along = (along + np.float32(0.5 + config.offset)) / np.float32(side)
        along = (2 * along - 1) * np.float32(2 * math.pi)
    else:
        along = along + np.float32(config.offset)
        if config.reference:
            along = along / np.float32(side) * np.float32(config.reference)
    angles = along[:, None] * freq  # [G, K/4]
    rows, columns = np.repeat(angles, side, 0), np.tile(angles, (side, 1))
    both = (columns, rows) if config.column_first else (rows, columns)
    patches = np.concatenate(both, -1)
    whole = np.concatenate([np.zeros((leading, 2 * bands), np.float32), patches])[None]
    return jnp.sin(whole), jnp.cos(whole)
