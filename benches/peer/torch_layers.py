"""Layers of the torch models, made from parameters of one layer of ours.

Written as a PyTorch user would: `nn.Linear`, `nn.LayerNorm`, `nn.RMSNorm` and
`scaled_dot_product_attention`.

Legend: B batch, T queries, S keys, H query heads, N KV heads, K head dim.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Rotary = tuple[torch.Tensor, torch.Tensor]  # cosines and sines, [B,1,T,K]


def tensor(array: Any) -> torch.Tensor:
    """Return an array as a tensor: floats in float32, integers in int64."""
    array = np.asarray(array)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    out = torch.tensor(array)
    return out.long() if out.dtype == torch.int32 else out


def parameter(array: Any) -> nn.Parameter:
    """Return an array as a trainable parameter in float32."""
    return nn.Parameter(tensor(array).float().contiguous())


def linear(params: Any) -> nn.Linear:
    """Return `nn.Linear` of a kernel and, if there is one, a bias."""
    module = nn.Linear(*np.shape(params["kernel"]), bias="bias" in params, device="meta")
    module.weight = parameter(np.asarray(params["kernel"]).T)
    if "bias" in params:
        module.bias = parameter(params["bias"])
    return module


def norm(params: Any, eps: float = 1e-6) -> nn.Module:
    """Return `nn.LayerNorm` of a scale and a bias, or `nn.RMSNorm` of a scale alone."""
    module: Any = (nn.LayerNorm if "bias" in params else nn.RMSNorm)(len(params["scale"]), eps)
    module.weight = parameter(params["scale"])
    if "bias" in params:
        module.bias = parameter(params["bias"])
    return module


def rotary(positions: torch.Tensor, frequencies: torch.Tensor) -> Rotary:
    """Return cosines and sines of positions [B,T]."""
    angles = positions.float()[:, :, None] * frequencies
    angles = torch.cat([angles, angles], -1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Rotate pairs (i, K/2 + i) of heads [B,H,T,K]."""
    cos, sin = rotary
    first, second = x.chunk(2, -1)
    return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Self- or cross-attention with multi-query or grouped keys."""

    def __init__(self, params: Any, heads: int, kv_heads: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(params[name]) for name in "qkvo")
        self.heads, self.kv_heads = heads, kv_heads

    def forward(
        self, x: torch.Tensor, keys: torch.Tensor | None = None, mask: torch.Tensor | None = None,
        turned: Rotary | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attend from `x` [B,T,·] to `keys` [B,S,·], or to itself; `mask` is [B,1,T,S]."""
        keys = x if keys is None else keys
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            part(keys).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for part in (self.k, self.v)
        )
        if turned is not None:
            q, k = rotate(q, turned), rotate(k, turned)
        group = self.heads // self.kv_heads
        if self.kv_heads == 1:
            k, v = (part.expand(-1, group, -1, -1) for part in (k, v))
        elif group > 1:
            k, v = (part.repeat_interleave(group, 1) for part in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(y.transpose(1, 2).flatten(2))


class SwiGlu(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, params: Any):
        super().__init__()
        self.gate, self.up, self.down = (linear(params[name]) for name in ("gate", "up", "down"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.silu(self.gate(x)) * self.up(x))


class Gelu(nn.Module):
    """down(gelu(up(x))), by the approximation with tanh."""

    def __init__(self, params: Any):
        super().__init__()
        self.up, self.down = (linear(params[name]) for name in ("up", "down"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(functional.gelu(self.up(x), approximate="tanh"))
