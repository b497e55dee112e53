"""Rotary position embeddings (RoFormer, arXiv 2104.09864) and their scaling to longer contexts.

Legend: B batch, T tokens, U positions, H heads, K head dim, R rotated dims of a head, P = R / 2
pairs.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vadapter.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Wavelengths of the rotation, and how they are scaled beyond the training length.

    Attributes:
      theta: base of the geometric progression of wavelengths.
      part: share of the head dim that is rotated: the first R = part · K; proportional (Gemma 4):
        the first part of all K / 2 pairs, whose wavelengths are those of a whole head.
      factor: how many times longer the context becomes.
      original_len: training length in tokens; llama3 and yarn.
      low_freq_factor, high_freq_factor: llama3: wavelengths above original_len / low are stretched
        by `factor`, those below original_len / high are kept, those between are blended.
      beta_fast, beta_slow: yarn (arXiv 2309.00071): rotations within original_len between which
        frequencies are blended.
      attention_factor: yarn and longrope: scale of sine and cosine; 0: 0.1 · ln(factor) + 1 for
        yarn, sqrt(1 + ln(factor) / ln(original_len)) for longrope.
      truncate: yarn: the bounds of the blend are rounded to dimensions.
      short_factor, long_factor: longrope (arXiv 2402.13753): the wavelength of each pair is
        stretched by these, in texts up to original_len and in longer ones.
      query_beta: queries at position p are multiplied by 1 + beta · ln(1 + ⌊p / original_len⌋)
        (Llama 4).
    """

    theta: float = 10_000.0
    part: float = 1.0
    scaling: Literal["none", "linear", "llama3", "yarn", "longrope", "proportional"] = "none"
    factor: float = 1.0
    original_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0


def frequencies(
    config: RopeConfig, head_dim: int, *, long: bool = False
) -> Float[np.ndarray, " P"]:
    """Return the radians per position of each rotated pair; longrope's for `long` texts or short.

    Computed in float32 throughout, operation for operation as when the models were trained: at
    position 8192 a difference in the last bit is 5e-4 radians.

    Raises:
      ConfigError: the scaling is unknown, or lacks its `original_len` or factors.
    """
    proportional = config.scaling == "proportional"
    rotated = head_dim if proportional else int(head_dim * config.part)
    exponents = np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated)
    freq = np.float32(1) / np.float32(config.theta) ** exponents
    if config.scaling == "none":
        return freq
    if config.scaling == "linear":
        return freq / np.float32(config.factor)
    if proportional:
        turning = np.arange(len(freq)) < int(config.part * head_dim // 2)
        return np.where(turning, freq / np.float32(config.factor), 0).astype(np.float32)
    if config.scaling not in ("llama3", "yarn", "longrope"):
        raise ConfigError(
            f"rope.scaling={config.scaling!r}: must be none, linear, llama3, yarn, "
            "longrope or proportional"
        )
    if config.original_len < 1:
        message = f"rope.scaling={config.scaling!r} needs original_len, the training length"
        raise ConfigError(message)
    if config.scaling == "longrope":
        stretch = config.long_factor if long else config.short_factor
        if len(stretch) != len(exponents):
            raise ConfigError(
                f"rope.{'long' if long else 'short'}_factor has {len(stretch)} numbers; needs "
                f"{len(exponents)}, one for each rotated pair"
            )
        stretched = np.asarray(stretch, np.float32) * np.float32(config.theta) ** exponents
        return np.float32(1) / stretched
    kept = _llama3(config, freq) if config.scaling == "llama3" else _yarn(config, freq, rotated)
    return (kept * freq + (1 - kept) * (freq / np.float32(config.factor))).astype(np.float32)


def _llama3(config: RopeConfig, freq: np.ndarray) -> np.ndarray:
    """Return the share of each frequency that is kept (Llama 3.1's inference code)."""
    turns = np.float32(config.original_len) * freq / np.float32(2 * math.pi)
    low, high = config.low_freq_factor, config.high_freq_factor
    return np.clip((turns - low) / np.float32(high - low), 0, 1)


def _yarn(config: RopeConfig, freq: np.ndarray, rotated: int) -> np.ndarray:
    """Return the share of each frequency that is kept (arXiv 2309.00071, section 3.2)."""
    length = config.original_len / (2 * math.pi)

    def dimension(turns: float) -> float:
        return rotated * math.log(length / turns) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = (np.arange(len(freq), dtype=np.float32) - low) / (high - low or 0.001)
    return 1 - np.clip(ramp, 0, 1)


def amplitude(config: RopeConfig) -> float:
    """Return the scale of sine and cosine, which is 1 except for yarn and longrope."""
    if config.scaling not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor:
        return config.attention_factor
    if config.factor <= 1:
        return 1.0
    if config.scaling == "yarn":
        return 0.1 * math.log(config.factor) + 1.0
    return math.sqrt(1 + math.log(config.factor) / math.log(config.original_len))


# Sine and cosine of every angle, [B, U, P], or of each of the two dims of a pair, [B, U, 2, P]. B
# may be 1. Where queries are scaled, also their factors, see `query_scale`.
Angles = tuple[Float[Array, "#B U *two P"], Float[Array, "#B U *two P"]]
Rotary = Angles | tuple[Float[Array, "B U P"], Float[Array, "B U P"], Float[Array, "B U"]]


def query_scale(config: RopeConfig, positions: Int[Array, "B U"]) -> Float[Array, "B U"]:
    """Return the factors of queries at these positions, see `RopeConfig.query_beta`."""
    periods = (positions // config.original_len).astype(jnp.float32)
    return 1 + config.query_beta * jnp.log(1 + periods)


def factors(positions: Int[Array, "B U"], freq: Float[Array, " P"], scale: Any = 1.0) -> Angles:
    """Return sine and cosine of the angles; `freq` and `scale` as in `rotate`."""
    angle = positions.astype(jnp.float32)[:, :, None] * freq[None, None, :]
    return jnp.sin(angle) * scale, jnp.cos(angle) * scale


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    freq: Float[Array, " P"],
    scale: float = 1.0,
) -> Float[Array, "B T H K"]:
    """Rotate pairs (i, R/2 + i) of the first R dims of every head; the rest is unchanged.

    `freq` is from `frequencies`, `scale` from `amplitude`.
    """
    return rotate_by(x, factors(positions, freq, scale))


def rotate_by(x: Float[Array, "B T H K"], rotary: Rotary) -> Float[Array, "B T H K"]:
    """Return the same as `rotate`, given the factors of the positions, or of more before them."""
    sin, cos = (f[:, -x.shape[1] :, None] for f in rotary[:2])
    half = sin.shape[-1]
    a, b, rest = jnp.split(x.astype(jnp.float32), (half, 2 * half), axis=-1)
    of = lambda f, i: f if f.ndim == 4 else f[..., i, :]  # noqa: E731
    turned = [a * of(cos, 0) - b * of(sin, 0), b * of(cos, 1) + a * of(sin, 1), rest]
    return jnp.concatenate(turned, -1).astype(x.dtype)
