"""The decoder language model, tiny and large alike.

Legend: B batch, T tokens, S keys (T, or cache slots), E width, V vocabulary, L layers, N KV heads,
K head dim.
"""

import dataclasses
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.cross_attention import Gated
from vadapter.models.layers import Dtype, MlpKind, Norm, NormKind, partitioned
from vadapter.models.rope import RopeConfig, amplitude, factors, frequencies
from vadapter.models.transformer import BlockConfig, Cache, PerLayer, Remat, Stack, unpadded_rows

EVERYTHING = 2**30  # the window of layers without one, in a model whose other layers have one


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder LM. The defaults are PaLM's block: parallel, SwiGLU, rotary, multi-query, no bias.

    Attributes:
      vocab_size: V; 0 takes the size of the run's tokenizer.
      width, depth, heads, kv_heads, head_dim, mlp_dim, mlp, norm, norm_eps, norm_offset, bias,
        qkv_bias, mlp_bias, qk_norm, attn_scale, attn_softcap, parallel, shared_norm, post_norms,
        fused_attention, dropout, remat, int8: see `transformer.BlockConfig`; int8 includes an
        untied head.
      rope: wavelengths of rotary positions.
      rope_local: those of layers with a window; None takes `rope`.
      windows: a layer attends to keys fewer than this many positions back, 0: to all; the pattern
        is repeated over the layers (Mistral: (4096,), Gemma 2: (4096, 0)).
      max_len: longest sequence; the number of learned positions, which no row may exceed.
      tied: the output head is the transposed embedding.
      embed_scale: embeddings are multiplied by sqrt(width).
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
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    parallel: bool = True
    shared_norm: bool = True
    post_norms: bool = False
    positions: Literal["rope", "learned"] = "rope"
    rope: RopeConfig = dataclasses.field(default_factory=RopeConfig)
    rope_local: RopeConfig | None = None
    windows: tuple[int, ...] = ()
    max_len: int = 2048
    tied: bool = True
    embed_scale: bool = True
    final_softcap: float = 0.0
    fused_attention: bool = True
    remat: Remat = "none"
    dropout: float = 0.0
    int8: bool = False

    DERIVED: ClassVar = ("vocab_size",)

    def block(self) -> BlockConfig:
        """Return the configuration of a block: the fields of the same names."""
        names = [f.name for f in dataclasses.fields(BlockConfig) if hasattr(self, f.name)]
        mine: dict[str, Any] = {name: getattr(self, name) for name in names}
        scale = amplitude(self.rope)
        if self.rope_local is not None and amplitude(self.rope_local) != scale:
            raise ConfigError("rope and rope_local: scale both or neither by yarn")
        return BlockConfig(**mine, rope_scale=scale)

    def per_layer(self) -> PerLayer:
        """Return the rotary frequencies and windows of every layer."""
        pattern, freq, window = self.windows or (0,), None, None
        windows = [pattern[i % len(pattern)] for i in range(self.depth)]
        if self.positions == "rope":
            size = self.head_dim or self.width // self.heads
            near = frequencies(self.rope_local or self.rope, size)
            far = frequencies(self.rope, size)
            freq = jnp.asarray([near if w else far for w in windows])
        if any(windows):
            window = jnp.asarray([w or EVERYTHING for w in windows], jnp.int32)
        return PerLayer(freq, window)


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
        self.stack = Stack(c.block(), c.depth, self.dtype)
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
        return jnp.asarray(self.config.width**0.5 if self.config.embed_scale else 1.0, self.dtype)

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
        layers, distance = self.config.per_layer(), None
        if layers.window is not None:
            keys = positions if key_positions is None else key_positions
            distance = positions[:, :, None] - keys[:, None, :]
        rotary: Any = positions
        if layers.window is None and layers.freq is not None:
            # One rotation for all layers, which compilers would otherwise compute in each of them.
            rotary = factors(positions, layers.freq[0], amplitude(self.config.rope))
            layers, rotary = PerLayer(), jax.lax.optimization_barrier(rotary)
        x, cache = self.stack(
            x, mask=mask, positions=rotary, layers=layers, distance=distance, cache=cache,
            index=index, last=last, gated=gated, seen=seen,
        )  # fmt: skip
        return self.norm(x), cache

    def logits(self, hidden: Float[Array, "*n E"]) -> Float[Array, "*n V"]:
        """Return the scores of the next token, in `dtype`, or in float32 if they are capped."""
        out = self.embedding.attend(hidden) if self.config.tied else self.head(hidden)
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

    Those of all layers are `stacked`, or each layer has its own, see `Stack`.
    """
    kv_heads = config.kv_heads or config.heads
    head_dim = config.head_dim or config.width // config.heads
    shapes = (batch * kv_heads, head_dim, slots), (batch * kv_heads, slots, head_dim)
    if stacked:
        return tuple(jnp.zeros((config.depth, *shape), dtype) for shape in shapes)  # type: ignore[return-value]
    return tuple(
        (jnp.zeros(shapes[0], dtype), jnp.zeros(shapes[1], dtype)) for _ in range(config.depth)
    )
