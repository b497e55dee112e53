"""Visual tokens in the rows and columns of the encoder's patches, for connectors that need them.

Legend: N visual tokens, h rows and w columns with h · w = N, r side of a window of r × r tokens,
p rows and q columns of windows, D width.
"""

import math

import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float

from vadapter.errors import ConfigError


def on_grid(tokens: Float[Array, "*n N D"], grid: tuple[int, ...]) -> Float[Array, "*n h w D"]:
    """Return the tokens in their rows and columns; `grid` is (h, w), the tokens row by row.

    Raises:
      ConfigError: there is no grid, or it has another number of tokens.
    """
    N = tokens.shape[-2]
    if len(grid) != 2 or math.prod(grid) != N:
        raise ConfigError(
            f"grid={tuple(grid)} does not arrange the {N} visual tokens of a frame: rows times "
            f"columns must be {N}. Leave grid out to take the encoder's; one whose tokens are "
            "pooled queries or include a class token or registers has none: set its tap to last "
            "or penultimate and patches_only=True"
        )
    return tokens.reshape(*tokens.shape[:-2], *grid, tokens.shape[-1])


def _padded(x: Float[Array, "*n h w D"], r: int) -> Float[Array, "*n _ _ D"]:
    """Return the grid with zeros below and to the right, so that r divides both sides."""
    below, right = (-side % r for side in x.shape[-3:-1])
    return jnp.pad(x, (*((0, 0),) * (x.ndim - 3), (0, below), (0, right), (0, 0)))


def shuffle(x: Float[Array, "*n h w D"], r: int) -> Float[Array, "*n p q _"]:
    """Return each window of r × r tokens as one token of r² · D numbers.

    Windows are in rows and columns as the tokens were, and so are the tokens within a window: its
    first D numbers are those of its upper left token, the next D those of the token to the right.
    Where r does not divide a side, the windows at the lower and right border are filled with zeros.
    """
    return rearrange(_padded(x, r), "... (p r) (q s) d -> ... p q (r s d)", r=r, s=r)


def mean_windows(x: Float[Array, "*n h w D"], r: int) -> Float[Array, "*n p q D"]:
    """Return the mean of each window of r × r tokens; at the border, of the tokens that it has."""
    sums = reduce(_padded(x, r), "... (p r) (q s) d -> ... p q d", "sum", r=r, s=r)
    rows, columns = (
        np.minimum(r, side - r * np.arange(math.ceil(side / r))) for side in x.shape[-3:-1]
    )
    counts = jnp.asarray(np.outer(rows, columns), sums.dtype)
    return sums / counts.reshape(*(1,) * (x.ndim - 3), *counts.shape, 1)


def adaptive_mean(x: Float[Array, "*n h w D"], side: int) -> Float[Array, "*n p p D"]:
    """Return the tokens averaged to `side` × `side`, whatever the grid, as PyTorch's layer does.

    Output i of a side of length h is the mean of ⌊i · h / side⌋ … ⌈(i + 1) · h / side⌉ - 1: windows
    overlap where the lengths do not divide. Two small matrix products.
    """
    rows, columns = (jnp.asarray(_averages(length, side), x.dtype) for length in x.shape[-3:-1])
    return jnp.einsum("ph,...hwd,qw->...pqd", rows, x, columns)


def _averages(length: int, side: int) -> np.ndarray:
    """Return f32[side, length], whose rows are the means over the windows of one dimension."""
    i, at = np.arange(side)[:, None], np.arange(length)
    start, end = i * length // side, -(-(i + 1) * length // side)
    inside = (start <= at) & (at < end)
    return (inside / inside.sum(1, keepdims=True)).astype(np.float32)
