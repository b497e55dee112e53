"""The decoder language model, tiny and large alike.

Legend: B batch, T tokens, S keys (T, or cache slots), E width, V vocabulary, L layers, N KV heads,
K head dim.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.cross_attention import Gated
from vadapter.models.delta import DeltaConfig, empty
from vadapter.models.layers import Dtype, MlpKind, Norm, NormKind, NormOver, partitioned
from vadapter.models.rope import RopeConfig, amplitude, factors, frequencies, query_scale
from vadapter.models.transformer import (
    BlockConfig,
    Cache,
    Layers,
    PerLayer,
    Remat,
    Stack,
    unpadded_rows,
)

EVERYTHING = 2**30  # the window of layers without one, in a model whose other layers have one


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Heads of some layers; see `transformer.BlockConfig`."""

    head_dim: int
    kv_heads: int
    shared_values: bool = False


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder LM. The defaults are PaLM's block: parallel, SwiGLU, rotary, multi-query, no bias.

    Attributes:
      vocab_size: V; 0 takes the size of the run's tokenizer.
      width, depth, heads, kv_heads, head_dim, mlp_dim, mlp, norm, norm_eps, norm_offset, bias,
        qkv_bias, mlp_bias, qk_norm, qk_norm_over, attn_scale, attn_softcap, attn_gate, value_norm,
        parallel, shared_norm, pre_norms, post_norms, residual_scale, block_scale, fused_attention,
        dropout, remat, int8, int4, scale_group: see `transformer.BlockConfig`; int8 and int4
        include an untied head.
      far: heads of the layers without a window, where they differ; None: as those of the others.
      delta: gated delta networks in the place of attention, in the layers that `recurrent` marks.
      recurrent: whether a layer has a gated delta network; the pattern is repeated over the layers,
        whose number it divides (Qwen3.5: (1, 1, 1, 0)).
      rope: wavelengths of rotary positions.
      rope_local: those of layers with a window; None takes `rope`.
      rotated: whether a layer has rotary positions; the pattern is repeated over the layers
        (SmolLM3: (1, 1, 1, 0)); (): all have them.
      windows: a layer attends to keys fewer than this many positions back, 0: to all; the pattern
        is repeated over the layers (Mistral: (4096,), Gemma 2: (4096, 0)).
      max_len: longest sequence; the number of learned positions, which no row may exceed.
      tied: the output head is the transposed embedding.
      embed_scale: embeddings are multiplied by sqrt(width).
      embed_factor, logit_factor: embeddings and logits are multiplied by these (Granite).
      final_softcap: logits are cap · tanh(logits / cap) (Gemma 2); 0: no cap.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    mlp_dim: int
    kv_heads: int = 1
    head_dim: int = 0
    mlp: MlpKind = "swiglu"
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    bias: bool = False
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_over: NormOver = "head"
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    attn_gate: bool = False
    value_norm: bool = False
    far: HeadsConfig | None = None
    delta: DeltaConfig | None = None
    recurrent: tuple[int, ...] = ()
    parallel: bool = True
    shared_norm: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    residual_scale: float = 1.0
    block_scale: bool = False
    positions: Literal["rope", "learned"] = "rope"
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    rope_local: RopeConfig | None = None
    rotated: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    max_len: int = 2048
    tied: bool = True
    embed_scale: bool = True
    embed_factor: float = 1.0
    logit_factor: float = 1.0
    final_softcap: float = 0.0
    fused_attention: bool = True
    remat: Remat = "none"
    dropout: float = 0.0
    int8: bool = False
    int4: bool = False
    scale_group: int = 0

    DERIVED: ClassVar = ("vocab_size",)

    def block(self) -> BlockConfig:
        """Return the configuration of a block: the fields of the same names."""
        names = [f.name for f in dataclasses.fields(BlockConfig) if hasattr(self, f.name)]
        mine: dict[str, Any] = {name: getattr(self, name) for name in names}
        return BlockConfig(**mine, rope_scale=amplitude(self.rope))

    @property
    def period(self) -> int:
        """The number of layers after which kinds of layers repeat; 1: all layers are alike."""
        patterns = [self.recurrent] if self.delta else []
        patterns += [self.windows] if self.far else []
        return math.lcm(*(len(pattern) or 1 for pattern in patterns))

    def blocks(self) -> tuple[BlockConfig, ...]:
        """Return the configurations of the blocks of a period.

        Raises:
          ConfigError: `depth` is no multiple of the period.
        """
        if self.depth % self.period:
            raise ConfigError(
                f"depth={self.depth}: kinds of layers repeat every {self.period} layers; the depth "
                "must be a multiple of it"
            )
        recurrent = _repeated(self.recurrent or (1,), self.period)
        windows = _repeated(self.windows or (0,), self.period)
        return tuple(self._kind(*kind) for kind in zip(recurrent, windows, strict=True))

    def _kind(self, recurrent: int, window: int) -> BlockConfig:
        """Return the block of a layer that is recurrent, or has a window."""
        block = self.block()
        if self.far is not None and not window:
            block = dataclasses.replace(block, **dataclasses.asdict(self.far))
        return block if recurrent else dataclasses.replace(block, delta=None)

    def per_kind(self) -> tuple[PerLayer, ...]:
        """Return what `per_layer` does, for the layers of each place in a period."""
        return tuple(
            PerLayer() if block.delta else self.per_layer(i, self.period, head_dim=block.head_dim)
            for i, block in enumerate(self.blocks())
        )

    def per_layer(
        self, start: int = 0, step: int = 1, *, head_dim: int = 0, long: bool = False
    ) -> PerLayer:
        """Return the rotary frequencies and windows of layers; longrope's for `long` texts.

        Args:
          start, step: the first of the layers, and how many each is behind the one before.
          head_dim: of these layers; 0: that of the model.
        """
        windows = _repeated(self.windows or (0,), self.depth)[start::step]
        freq, scale, window = None, None, None
        if self.positions == "rope":
            size = head_dim or self.head_dim or self.width // self.heads
            turns = _repeated(self.rotated or (1,), self.depth)[start::step]
            ropes = [(w and self.rope_local) or self.rope for w in windows]
            pairs = list(zip(ropes, turns, strict=True))
            # An angle of 0 leaves queries and keys as they are.
            freq = jnp.asarray([frequencies(r, size, long=long) * bool(t) for r, t in pairs])
            scales = [amplitude(r) if t else 1.0 for r, t in pairs]
            if set(scales) != {amplitude(self.rope)}:
                scale = jnp.asarray(scales, jnp.float32)
        if any(windows):
            window = jnp.asarray([w or EVERYTHING for w in windows], jnp.int32)
        return PerLayer(freq, window, scale)


def _repeated(pattern: tuple[int, ...], depth: int) -> list[int]:
    return [pattern[i % len(pattern)] for i in range(depth)]


class LM(nn.Module):
    """Decoder LM over embeddings, so that visual tokens can take the place of words.

    `embed` → `hidden` → `logits`. A component that is used only through `hidden` (the tiny LM as
    adapter) has neither embedding nor head among its parameters.
    """

    config: LMConfig
    dtype: Dtype = jnp.float32

    def setup(self):
        c = self.config
        # Unit variance after scaling, like that of visual prefixes, so that both are read alike.
        init = nn.initializers.normal(c.width**-0.5 if c.embed_scale else 0.02)
        init = partitioned(init, "vocab", "embed")
        self.embedding = nn.Embed(c.vocab_size, c.width, self.dtype, embedding_init=init)
        if c.positions == "learned":
            init = partitioned(nn.initializers.normal(0.02), None, "embed")
            self.position_embedding = nn.Embed(c.max_len, c.width, self.dtype, embedding_init=init)
        blocks = c.blocks()
        self.stack = Stack(blocks[0] if c.period == 1 else blocks, c.depth, self.dtype)
        self.norm = Norm(c.norm, c.norm_eps, self.dtype, c.norm_offset)
        if not c.tied:
            self.head = c.block().linear(c.vocab_size, ("embed", "vocab"), dtype=self.dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Return the embeddings of ids in 0..V-1, which the host checks, see `check_batch`."""
        return constrain(self.embedding(tokens), "batch") * self._embed_scale()

    def mix(self, weights: Float[Array, "*n V"]) -> Float[Array, "*n E"]:
        """Return sums of embeddings with a weight for every word; one-hot rows equal `embed`."""
        table = self.embedding.embedding.astype(self.dtype)
        return weights.astype(self.dtype) @ table * self._embed_scale()

    def word_scale(self, words: int) -> Float[Array, ""]:
        """Return the root mean square of the elements of `embed`, over the first so many ids."""
        table = self.embedding.embedding[:words].astype(jnp.float32)
        return jnp.sqrt(jnp.square(table).mean()) * self._embed_scale().astype(jnp.float32)

    def _embed_scale(self) -> Float[Array, ""]:
        scale = self.config.width**0.5 if self.config.embed_scale else 1.0
        return jnp.asarray(scale * self.config.embed_factor, self.dtype)

    def hidden(
        self, x: Float[Array, "B T E"], *,
        positions: Int[Array, "B T"], mask: Bool[Array, "B T S"] | None = None,
        key_positions: Int[Array, "B S"] | None = None,
        cache: Cache | None = None, index: Int[Array, ""] | int = 0, last: int = 0,
        gated: Gated | None = None, seen: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B _ E"], Cache | None]:  # fmt: skip
        """Return the hidden states of embeddings after the final norm, and the updated cache.

        Args:
          x: embeddings of words, or anything of their width.
          mask: True where a token attends; None: everywhere.
          key_positions: of the cache's slots; None: `positions`.
          cache: from `empty_cache`, or None; `index` is the first slot of `x` in it.
          last: return the states of this many last tokens only, for frozen parameters, see `Stack`;
            0: of all.
          gated, seen: gated cross-attention between the layers, see `Stack`.
        """
        x = x.astype(self.dtype)
        if self.config.positions == "learned":
            if x.shape[1] > self.config.max_len:
                raise ConfigError(
                    f"a row has {x.shape[1]} tokens (prompt, visual tokens, texts), but the model "
                    f"has {self.config.max_len} learned positions; lower text_len or max_new"
                )
            x = x + self.position_embedding(positions)
        layers, rotary, distance = *self._rotation(positions, cache, key_positions, index), None
        kinds = layers if isinstance(layers, tuple) else (layers,)
        if any(layer.window is not None for layer in kinds):
            keys = positions if key_positions is None else key_positions
            distance = positions[:, :, None] - keys[:, None, :]
        x, cache = self.stack(
            x, mask=mask, positions=rotary, layers=layers, distance=distance, cache=cache,
            index=index, last=last, gated=gated, seen=seen,
        )  # fmt: skip
        return self.norm(x), cache

    def _rotation(
        self, positions: Int[Array, "B T"], cache: Cache | None,
        key_positions: Int[Array, "B S"] | None, index: Int[Array, ""] | int,
    ) -> tuple[Layers, Any]:  # fmt: skip
        """Return what differs between layers, and the positions or their rotation in all of them.

        Raises:
          ConfigError: queries are scaled by their positions, but layers rotate differently; or
            positions are longrope's, and kinds of layers differ.
        """
        c = self.config
        if c.period > 1:
            if c.rope.query_beta or c.rope.scaling == "longrope":
                raise ConfigError(f"rope.scaling={c.rope.scaling!r}: not where layers differ")
            return c.per_kind(), positions
        layers = c.per_layer()
        if (freq := layers.freq) is None:
            return layers, positions
        if c.rope.scaling == "longrope":
            # The keys of a text keep the wavelengths of the longest that it can become.
            slots = 0 if key_positions is None else key_positions.shape[1]
            free = 0 if cache is None else slots - index - positions.shape[1]
            longer = positions.max() + 1 + free > c.rope.original_len
            freq = jnp.where(longer, jnp.asarray(c.per_layer(long=True).freq), freq)
        same = all(c.rotated) and (c.rope_local is None or layers.window is None)
        if c.rope.query_beta and not same:
            raise ConfigError("rope.query_beta is not supported where layers rotate differently")
        if not same or (layers.window is not None and not c.rope.query_beta):
            return PerLayer(freq, layers.window, layers.amplitude), positions
        # One rotation for all layers, which compilers would otherwise compute in each of them.
        rotary: Any = factors(positions, freq[0], amplitude(c.rope))
        if c.rope.query_beta:
            rotary = *rotary, query_scale(c.rope, positions)
        return PerLayer(window=layers.window), jax.lax.optimization_barrier(rotary)

    def logits(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """Return the scores of the next token, in `dtype`, or in float32 if they are capped."""
        out = self.embedding.attend(hidden) if self.config.tied else self.head(hidden)
        out = out if self.config.logit_factor == 1 else out * self.config.logit_factor
        out = constrain(out, "batch", *(None,) * (out.ndim - 2), "vocab")
        cap = self.config.final_softcap
        return cap * jnp.tanh(out.astype(jnp.float32) / cap) if cap else out

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """Return the logits of plain text; creates every parameter."""
        positions, mask = unpadded_rows(*tokens.shape)
        x, _ = self.hidden(self.embed(tokens), positions=positions, mask=mask)
        return self.logits(x)


def empty_cache(
    config: LMConfig, batch: int, slots: int, dtype: Dtype = jnp.float32, stacked: bool = True
) -> Cache:
    """Return keys and values for `slots` tokens, none of which is written yet.

    Those of all layers are `stacked`, or each layer has its own, see `Stack`; where layers differ,
    those of a period are a tuple.
    """
    blocks, count = config.blocks(), config.depth // config.period
    caches = tuple(_of_layer(block, batch, slots, dtype) for block in blocks)
    one: Any = caches[0] if config.period == 1 else caches
    if stacked:
        return jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), one)
    return tuple(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), one) for _ in range(count))


def _of_layer(config: BlockConfig, batch: int, slots: int, dtype: Dtype) -> Any:
    """Return the shapes of a `LayerCache`."""
    if (delta := config.delta) is not None:
        return jax.eval_shape(lambda: empty(delta, batch, dtype))
    kv_heads = config.kv_heads or config.heads
    head_dim = config.head_dim or config.width // config.heads
    shapes = (batch * kv_heads, head_dim, slots), (batch * kv_heads, slots, head_dim)
    return tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
