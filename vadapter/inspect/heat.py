"""Attention over images for a page: every image once, and heat over it in color.

Legend: F frames, S pixels a side, h rows and w columns of a map.
"""

import numpy as np
from PIL import Image

from vadapter.html_page import data_uri

FULL = 8.0  # times the uniform attention at which the color is full
_SIDE = 128  # pixels of an image on the page
# Colors from uniform attention to `FULL` times as much: dark violet, red, orange, pale yellow.
_RAMP = np.array([(72, 20, 110), (187, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)


class Backgrounds:
    """The images of a page as CSS backgrounds, each kept once however often it is shown."""

    def __init__(self):
        self._names: dict[bytes, str] = {}
        self._rules: list[str] = []

    def add(self, frame: np.ndarray) -> str:
        """Return the CSS class whose background is a frame u8[S,S,3]."""
        key = frame.tobytes()
        if key not in self._names:
            self._names[key] = f"i{len(self._names)}"
            image, small = Image.fromarray(frame), max(frame.shape) <= 96
            image.thumbnail((_SIDE, _SIDE))
            kind, options = ("png", {"optimize": True}) if small else ("jpeg", {"quality": 82})
            uri = data_uri(image, kind, **options)
            pixelated = "; image-rendering: pixelated" if small else ""
            rule = f".{self._names[key]} {{ background-image: url({uri}){pixelated} }}"
            self._rules.append(rule)
        return self._names[key]

    def style(self) -> str:
        """Return the CSS rules."""
        return "\n".join(self._rules)


def heat(shares: np.ndarray, uniform: float) -> str:
    """Return a map f32[h,w] as the data URI of a PNG of h × w pixels, to be scaled by CSS.

    `uniform` is the share of a token if all had the same. Less attention than that is transparent;
    from there to `FULL` times as much the color rises with the logarithm.
    """
    level = np.log(np.maximum(shares / uniform, 1e-6)) / np.log(FULL)
    level = np.clip(level, 0, 1)
    stops = np.linspace(0, 1, len(_RAMP))
    color = np.stack([np.interp(level, stops, channel) for channel in _RAMP.T], axis=-1)
    alpha = 255 * np.minimum(0.85, 2 * level)
    pixels = np.concatenate([color, alpha[..., None]], axis=-1).round().astype(np.uint8)
    return data_uri(Image.fromarray(pixels, "RGBA"), "png", optimize=True)


def ramp() -> str:
    """Return the colors as a CSS gradient, for a legend."""
    colors = ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in _RAMP)
    return f"linear-gradient(90deg, transparent, {colors})"
