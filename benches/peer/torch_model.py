"""The torch model of a stage: the same components with the same weights.

transformers has no class for these: its ViT has a class token and biases, its language models no
block with parallel attention and feed-forward on one RMSNorm, and it has no such resampler. Where
it has one, in decoding, the class from there is used (`decode_rows`).

Legend: B batch, F frames, N visual tokens a frame, D encoder width, Q queries, S sequence, E width
of a language model.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import torch
from torch import nn
from torch.nn import functional

from benches.peer import torch_layers as layers
from vadapter.models.adapter_model import AdapterModel
from vadapter.models.adapters.projection import Projection
from vadapter.models.adapters.resampler import Resampler, ResamplerConfig
from vadapter.models.lm import LM, LMConfig
from vadapter.models.rope import frequencies
from vadapter.models.vit import ViT, ViTConfig
from vadapter.recipe.optim import OptimConfig

Tensors = dict[str, torch.Tensor]


def unstacked(params: Any, depth: int) -> Iterator[Any]:
    """Yield the parameters of each layer of a stack."""
    for i in range(depth):
        yield jax.tree.map(lambda x, i=i: x[i], params)


class LanguageBlock(nn.Module):
    """Attention and SwiGLU, side by side (`parallel`) or one after the other."""

    def __init__(self, params: Any, config: LMConfig):
        super().__init__()
        self.parallel = config.parallel
        self.norm_attn = layers.norm(params["norm_attn"], config.norm_eps)
        kv_heads = config.kv_heads or config.heads
        self.attn = layers.Attention(params["attn"], config.heads, kv_heads)
        self.mlp = layers.SwiGlu(params["mlp"])
        if not self.parallel:
            self.norm_mlp = layers.norm(params["norm_mlp"], config.norm_eps)

    def forward(self, x: torch.Tensor, mask: Any, turned: layers.Rotary) -> torch.Tensor:
        h = self.norm_attn(x)
        if self.parallel:
            return x + self.attn(h, None, mask, turned) + self.mlp(h)
        x = x + self.attn(h, None, mask, turned)
        return x + self.mlp(self.norm_mlp(x))


class Language(nn.Module):
    """A language model; without an embedding if it serves as the adapter."""

    def __init__(self, params: Any, config: LMConfig):
        super().__init__()
        head_dim = config.head_dim or config.width // config.heads
        # No buffer: they stay in float32 when the model is converted.
        self.frequencies = layers.tensor(frequencies(config.rope, head_dim))
        stack = unstacked(params["stack"]["blocks"], config.depth)
        self.blocks = nn.ModuleList(LanguageBlock(layer, config) for layer in stack)
        self.norm = layers.norm(params["norm"], config.norm_eps)
        self.scale = config.width**0.5 if config.embed_scale else 1.0
        if "embedding" in params:
            table = layers.parameter(params["embedding"]["embedding"])
            self.embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.embedding(tokens) * self.scale

    def forward(self, x: torch.Tensor, positions: torch.Tensor, mask: Any) -> torch.Tensor:
        turned = layers.rotary(positions, self.frequencies.to(positions.device))
        for block in self.blocks:
            x = block(x, mask, turned)
        return self.norm(x)


class Adapter(Language):
    """A language model over queries: causal, its states are the output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[:2])
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
        return super().forward(x, positions, mask.tril()[None, None])


class EncoderBlock(nn.Module):
    """Pre-norm attention, then a feed-forward with GELU."""

    def __init__(self, params: Any, config: ViTConfig):
        super().__init__()
        self.norm_attn = layers.norm(params["norm_attn"], config.norm_eps)
        self.norm_mlp = layers.norm(params["norm_mlp"], config.norm_eps)
        self.attn = layers.Attention(params["attn"], config.heads, config.heads)
        self.mlp = layers.Gelu(params["mlp"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm_attn(x))
        return x + self.mlp(self.norm_mlp(x))


class Encoder(nn.Module):
    """A ViT without class token: frames u8[B,F,S,S,3] to visual tokens [B,F,N,D]."""

    def __init__(self, params: Any, config: ViTConfig):
        super().__init__()
        self.patch = config.patch
        self.patches = layers.linear(params["patches"])
        self.positions = layers.parameter(params["positions"])
        stack = unstacked(params["stack"]["blocks"], config.depth)
        self.blocks = nn.Sequential(*(EncoderBlock(layer, config) for layer in stack))
        self.norm = layers.norm(params["norm"], config.norm_eps)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        B, F_, S = frames.shape[:3]
        side = S // self.patch
        x = (frames.float() / 255 - 0.5) / 0.5
        x = x.view(B * F_, side, self.patch, side, self.patch, 3).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(B * F_, side**2, -1).to(self.positions.dtype)
        x = self.patches(x) + self.positions
        return self.norm(self.blocks(x)).unflatten(0, (B, F_))


class ResamplerBlock(nn.Module):
    """Attention from queries to visual tokens, then a feed-forward."""

    def __init__(self, params: Any, config: ResamplerConfig):
        super().__init__()
        names = ("norm_queries", "norm_visual", "norm_mlp")
        self.queries, self.visual, self.hidden = (layers.norm(params[name]) for name in names)
        self.attn = layers.Attention(params["attn"], config.heads, config.heads)
        self.mlp = layers.Gelu(params["mlp"])

    def forward(self, queries: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
        queries = queries + self.attn(self.queries(queries), self.visual(visual))
        return queries + self.mlp(self.hidden(queries))


class Perceiver(nn.Module):
    """A perceiver resampler: visual tokens [B,F,N,D] to queries [B,Q,E]."""

    def __init__(self, params: Any, config: ResamplerConfig):
        super().__init__()
        self.frames = config.frames
        self.in_proj, self.norm = layers.linear(params["in_proj"]), layers.norm(params["norm"])
        self.queries = layers.parameter(params["queries"])
        for name in ("space_embed", "time_embed"):
            vectors = layers.parameter(params[name]) if name in params else None
            self.register_parameter(name, vectors)
        stack = unstacked(params["layers"], config.layers)
        self.blocks = nn.ModuleList(ResamplerBlock(layer, config) for layer in stack)

    def forward(self, visual: torch.Tensor) -> torch.Tensor:
        x = self.in_proj(visual)
        if self.space_embed is not None:
            x = x + self.space_embed
        if self.time_embed is not None:
            x = x.repeat_interleave(self.frames // x.shape[1], 1) + self.time_embed
        x, queries = x.flatten(1, 2), self.queries.expand(len(x), -1, -1)
        for block in self.blocks:
            queries = block(queries, x)
        return self.norm(queries)


def component(module: Any, params: Any, *, adapter: bool) -> nn.Module:
    """Return the torch module of a component; `adapter`: it is in the chain.

    Raises:
      NotImplementedError: this kind of component has none here.
    """
    match module:
        case LM():
            return (Adapter if adapter else Language)(params, module.config)
        case Resampler():
            return Perceiver(params, module.config)
        case Projection():
            return layers.linear(params["out"])
        case ViT():
            return Encoder(params, module.config)
    raise NotImplementedError(f"{type(module).__name__} has no torch module in benches.peer")


class Model(nn.Module):
    """Encoder → chain → language model.

    Args:
      params: of the components; without those of an encoder, batches have `features`.
      trained: the components with gradients.
    """

    def __init__(self, model: AdapterModel, params: Mapping[str, Any], trained: Collection[str]):
        super().__init__()
        self.encoder, self.chain, self.lm = model.encoder, model.chain, model.lm
        parts = {
            name: component(module, params[name], adapter=name in model.chain)
            for name, module in model.modules.items()
            if name in params
        }
        self.parts = nn.ModuleDict(parts)
        for name, part in parts.items():
            part.requires_grad_(name in trained)

    def encode(self, batch: Tensors) -> torch.Tensor | None:
        """Return the visual tokens [B,F,N,D]; None for text only."""
        if not self.encoder:
            return None
        if "features" in batch:
            return batch["features"].float()
        with torch.no_grad():
            return self.parts[self.encoder](batch["frames"])

    def prefix(self, visual: torch.Tensor) -> torch.Tensor:
        """Return visual tokens passed through the chain, [B,Q,E]."""
        for name in self.chain:
            visual = self.parts[name](visual)
        return visual

    def forward(self, batch: Tensors, visual: torch.Tensor | None) -> torch.Tensor:
        """Return the mean cross entropy of the targets in nats."""
        lm: Any = self.parts[self.lm]
        prompt, tokens = batch["prompt"], batch["tokens"]
        words = lm.embed(torch.cat([prompt.clamp(min=0), tokens], 1))
        before, after = words.split([prompt.shape[1], tokens.shape[1]], 1)
        shared = torch.where(prompt >= 0, -1, 0)
        if visual is not None:
            prefix = self.prefix(visual)
            before = torch.cat([before, prefix], 1)
            shared = torch.cat([shared, shared.new_full(prefix.shape[:2], -1)], 1)
        segments = torch.cat([shared, batch["segments"]], 1)
        positions = _positions(shared, batch["positions"])
        states = lm(torch.cat([before, after], 1), positions, _mask(segments))
        text = states[:, -tokens.shape[1] :]
        at = batch["target_at"][:, :, None].expand(-1, -1, text.shape[-1])
        logits = text.gather(1, at) @ lm.embedding.weight.T
        targets, weights = batch["targets"].flatten(), batch["weights"].flatten()
        nats = functional.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
        return (nats * weights).sum() / weights.sum().clamp(min=1)


def _positions(shared: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Return positions without padding; every text starts after the prefix."""
    used = (shared != 0).long().cumsum(1)
    start = used[:, -1:] if shared.shape[1] else used.new_zeros(len(text), 1)
    return torch.cat([(used - 1).clamp(min=0), start + text], 1)


def _mask(segments: torch.Tensor) -> torch.Tensor:
    """Return the mask [B,1,S,S]: a token sees earlier ones of the prefix and of its own text."""
    S = segments.shape[1]
    queries, keys = segments[:, :, None], segments[:, None, :]
    earlier = torch.ones(S, S, dtype=torch.bool).tril()[None]
    mask = earlier & (keys != 0) & ((keys == -1) | (keys == queries))
    # The attention of a row that sees nothing would be NaN: padding sees itself.
    return (mask | torch.eye(S, dtype=torch.bool)[None])[:, None]


def optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return AdamW at the first step's learning rate; kernels and embeddings decay."""
    kernels = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for values in model.parameters():
        if values.requires_grad:
            groups[id(values) in kernels].append(values)
    decays = {True: config.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [{"params": group, "weight_decay": decays[key]} for key, group in groups.items()],
        lr=config.lr / (config.warmup + 1), betas=(config.b1, config.b2), eps=config.eps,
        fused=True,
    )  # fmt: skip
