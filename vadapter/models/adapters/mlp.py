"""Linear layers token by token, alone or with pooling over the encoder's grid: LLaVA and its heirs.

Which settings are whose: README.md in this folder; named ones are in `registry.SIZES`.

Legend: B batch, F frames, G frames after averaging over time, N visual tokens a frame, h rows and w
columns with h · w = N, r side of a window, Q output tokens, D encoder width, E output width.
"""

import dataclasses
from typing import ClassVar, Literal

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange, reduce
from jaxtyping import Array, Float

from vadapter.errors import ConfigError
from vadapter.models.adapters.grid import mean_windows, on_grid, shuffle
from vadapter.models.layers import Dtype, Norm, default_init, linear


@dataclasses.dataclass(frozen=True)
class MlpAdapterConfig:
    """Layers, and how the tokens of a frame become fewer.

    Attributes:
      hidden_dim: width between the layers; 0: `width`.
      width: E; 0 takes the width of the language model that follows in the chain.
      frames: clips are averaged over time down to this many frames.
      layers: linear layers with a GELU between them; 1 is LLaVA's linear layer, 2 LLaVA 1.5's MLP.
      bias: of the layers.
      pool: what becomes of each window of factor × factor tokens. none: nothing, Q = G · N.
        shuffle: they become one token of factor² · D numbers (`grid.shuffle`). mean: they are
        averaged in front of the layers (DeCo). mean_after: behind them (Perception-LM).
      factor: r, side of the windows of a pool.
      norm: a LayerNorm in front of the layers, after a shuffle (InternVL).
      kernel_std: standard deviation of the kernels at initialization; 0: by the number of inputs.
      grid: (h, w), for a pool; () takes the encoder's.
    """

    hidden_dim: int = 0
    width: int = 0
    frames: int = 1
    layers: int = 2
    bias: bool = True
    pool: Literal["none", "shuffle", "mean", "mean_after"] = "none"
    factor: int = 2
    norm: bool = False
    kernel_std: float = 0.0
    grid: tuple[int, ...] = ()

    DERIVED: ClassVar = ("width", "grid")

    def __post_init__(self) -> None:
        for key in ("frames", "layers", "factor"):
            if getattr(self, key) < 1:
                raise ConfigError(f"{key}={getattr(self, key)}: at least 1")

    @property
    def needs_grid(self) -> bool:
        """Whether the visual tokens must be in rows and columns."""
        return self.pool != "none"


class MlpAdapter(nn.Module):
    """Every frame by itself; one output token per visual token, or per window of them."""

    config: MlpAdapterConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, visual: Float[Array, "B F N D"]) -> Float[Array, "B Q E"]:
        c = self.config
        frames = min(c.frames, visual.shape[1])
        x = reduce(visual, "b (g f) n d -> b g n d", "mean", g=frames).astype(self.dtype)
        if c.pool == "shuffle":
            x = _flat(shuffle(on_grid(x, c.grid), c.factor))
        elif c.pool == "mean":
            x = _flat(mean_windows(on_grid(x, c.grid), c.factor))
        if c.norm:
            x = Norm("layer", 1e-5, self.dtype, name="norm")(x)
        if c.pool != "mean_after":
            return self._layers(rearrange(x, "b g n d -> b (g n) d"))
        x = _flat(mean_windows(on_grid(self._layers(x), c.grid), c.factor))
        return rearrange(x, "b g n d -> b (g n) d")

    def _layers(self, x: Float[Array, "*n D"]) -> Float[Array, "*n E"]:
        c, last = self.config, self.config.layers - 1
        init = nn.initializers.normal(c.kernel_std) if c.kernel_std else default_init
        for i in range(c.layers):
            name = {0: "up", last: "down"}.get(i, f"middle_{i}") if last else "out"
            features = c.width if i == last else c.hidden_dim or c.width
            x = nn.gelu(x) if i else x
            x = linear(features, _axes(i, last), c.bias, self.dtype, init, name=name)(x)
        return x


def _axes(i: int, last: int) -> tuple[str | None, str | None]:
    """Return the axes of a kernel: every other hidden state is sharded, the output never."""
    if i % 2:
        return "mlp", "embed"
    return (None, "embed") if i == last else ("embed", "mlp")


def _flat(x: Float[Array, "*n h w D"]) -> Float[Array, "*n _ D"]:
    """Return a grid as tokens, row by row."""
    return rearrange(x, "... h w d -> ... (h w) d")
