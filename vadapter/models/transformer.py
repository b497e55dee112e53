"""One transformer block and one stack for every model: ViT, tiny LM, LLM, resampler, CoCa text.

Legend: B batch, T tokens, S keys, C tokens that are cross-attended, E width, L layers, N KV heads,
K head dim, P rotated pairs of a head.
"""

import contextvars
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from vadapter.distributed.compile import unrolls
from vadapter.distributed.mesh import constrain
from vadapter.errors import ConfigError
from vadapter.models.adapters.cross_attention import Gated
from vadapter.models.delta import DeltaCache, DeltaConfig, DeltaNet
from vadapter.models.layers import (
    ATTENTION,
    Attention,
    Dtype,
    Mlp,
    MlpKind,
    Norm,
    NormKind,
    NormOver,
    linear,
)
from vadapter.models.quantize import STORED, quantized
from vadapter.models.quantized_linear import QuantizedLinear
from vadapter.models.rope import Rotary, factors

# What `remat="names"` keeps for the backward pass. A frozen stack has no weight gradients, so the
# inputs of its matrix products are never needed; from these outputs the rest is recomputed with one
# norm and one activation each.
Remat = Literal["none", "full", "names", "dots"]
InnerNorms = Literal["none", "mlp", "both"]
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "names": jax.checkpoint_policies.save_only_these_names("q", "k", "v", "mid", "u"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """One transformer block.

    Attributes:
      width: E.
      kv_heads: 1 is multi-query; 0: as many as heads.
      head_dim: 0: width // heads.
      mlp_dim: hidden width of the feed-forward.
      norm_offset: is added to the scales of norms.
      bias, qkv_bias, key_bias, qk_norm, qk_norm_over, attn_scale, attn_softcap, attn_gate: see
        `layers.Attention`.
      value_norm, shared_values: see `layers.Attention`.
      delta: a gated delta network in the place of attention, or None.
      mlp_bias: bias of the feed-forward; None takes `bias`.
      parallel: attention and feed-forward run side by side and are summed (PaLM), instead of one
        after the other; from one norm, or from two with `shared_norm=False` (GPT-NeoX).
      pre_norms: a norm in front of attention and of feed-forward (OLMo 2: none).
      post_norms: also a norm on the output of attention and of feed-forward (Gemma 2).
      inner_norms: also a norm in front of the last projection of the feed-forward, or of both
        attention and feed-forward (EVA-02).
      layer_scale: outputs are multiplied by a trainable vector (DINOv2).
      residual_scale: outputs are multiplied by it (Granite).
      block_scale: states behind the block are multiplied by a trainable number (Gemma 4).
      cross: a cross-attention between self-attention and feed-forward.
      rope_scale: see `rope.rotate`.
      fused_attention: attention by one kernel on TPUs where it is faster, see `fused_attention`.
      dropout: on both residual branches, active only where a `dropout` rng is given.
      remat: what the backward pass recomputes, see `REMAT`.
      int8, int4: kernels are integers and cannot be trained, see `quantize`.
      scale_group: inputs of such a kernel that share a scale; 0: all.
    """

    width: int
    heads: int
    mlp_dim: int
    kv_heads: int = 0
    head_dim: int = 0
    mlp: MlpKind = "gelu"
    norm: NormKind = "layer"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    bias: bool = True
    qkv_bias: bool | None = None
    key_bias: bool = True
    mlp_bias: bool | None = None
    qk_norm: bool = False
    qk_norm_over: NormOver = "head"
    attn_scale: float = 0.0
    attn_softcap: float = 0.0
    attn_gate: bool = False
    value_norm: bool = False
    shared_values: bool = False
    delta: DeltaConfig | None = None
    parallel: bool = False
    shared_norm: bool = True
    pre_norms: bool = True
    post_norms: bool = False
    inner_norms: InnerNorms = "none"
    layer_scale: bool = False
    residual_scale: float = 1.0
    block_scale: bool = False
    cross: bool = False
    rope_scale: float = 1.0
    fused_attention: bool = True
    dropout: float = 0.0
    remat: Remat = "none"
    int8: bool = False
    int4: bool = False
    scale_group: int = 0

    @property
    def linear(self) -> Callable[..., nn.Module]:
        """The constructor of linear layers."""
        if not (integers := quantized(vars(self))):
            return linear
        return functools.partial(QuantizedLinear, stored=STORED[integers], group=self.scale_group)

    def mixer(self, dtype: Dtype) -> Attention | DeltaNet:
        """Return the layer of the block in which tokens read from each other."""
        if self.delta is None:
            return self.attention(dtype, "attn")
        return DeltaNet(self.delta, self.norm_eps, dtype, self.linear, name="delta")

    def attention(self, dtype: Dtype, name: str) -> Attention:
        """Return an attention layer of the block."""
        make_norm = functools.partial(self.make_norm, dtype)
        return Attention(
            self.heads, self.kv_heads or self.heads, self.head_dim or self.width // self.heads,
            bias=self.bias, qkv_bias=self.qkv_bias, key_bias=self.key_bias,
            qk_norm=make_norm if self.qk_norm else None,
            qk_norm_over=self.qk_norm_over, shared_values=self.shared_values,
            value_eps=self.norm_eps if self.value_norm else 0.0,
            inner_norm=make_norm if self.inner_norms == "both" else None,
            gate=self.attn_gate, scale=self.attn_scale, softcap=self.attn_softcap,
            rope_scale=self.rope_scale, fused=self.fused_attention, dtype=dtype,
            linear=self.linear, name=name,
        )  # fmt: skip

    def make_norm(self, dtype: Dtype, name: str) -> Norm:
        """Return a norm of the block."""
        return Norm(self.norm, self.norm_eps, dtype, self.norm_offset, name=name)


# Keys and values of a layer, or what its delta network hands on; and of all layers: stacked, or one
# for each. Where layers differ, the same with a tuple for every period of them.
LayerCache = tuple[Float[Array, "BN K S"], Float[Array, "BN S K"]] | DeltaCache
Cache = tuple[Any, ...]
Inputs = tuple[Float[Array, "B _ _"], ...]


@flax.struct.dataclass
class PerLayer:
    """What differs between the layers of one stack, scanned with their parameters."""

    freq: Float[Array, "..."] | None = None  # rotary frequencies, [L, P]; None: no rotary positions
    window: Int[Array, "..."] | None = None  # [L]: keys this many positions back are out of reach
    amplitude: Float[Array, "..."] | None = None  # [L], of sine and cosine; None: `rope_scale`


Layers = PerLayer | tuple[PerLayer, ...]  # one for each place in a period where layers differ


class Block(nn.Module):
    """Pre-norm transformer block; arguments and results as `Stack`, for one layer."""

    config: BlockConfig
    dtype: Dtype = jnp.float32
    last: int = 0  # compute the states of this many last tokens only, which attend to all; 0: all

    @nn.compact
    def __call__(self, x, cache, layer, mask, positions, distance, kv, kv_mask, index):
        c = self.config
        norm = functools.partial(c.make_norm, self.dtype)
        drop = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
        bias = c.bias if c.mlp_bias is None else c.mlp_bias
        inner = None if c.inner_norms == "none" else norm
        mlp = Mlp(c.mlp_dim, c.mlp, bias, self.dtype, c.linear, inner, name="mlp")

        def pre(name: str, x: jax.Array) -> jax.Array:
            return norm(name)(x) if c.pre_norms else x

        def post(name: str, y: jax.Array) -> jax.Array:
            y = norm(name)(y) if c.post_norms else y
            if c.layer_scale:
                init: Any = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
                scale = self.param(name.replace("norm", "scale"), init, (y.shape[-1],))
                y = y * scale.astype(y.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
            return drop(y if c.residual_scale == 1 else y * c.residual_scale)

        if layer.window is not None:
            near = distance < layer.window
            mask = near if mask is None else mask & near
        freq = layer.freq
        if layer.amplitude is not None:
            positions, freq = factors(positions, freq, layer.amplitude), None
        h = keys = pre("norm_attn", x)
        if self.last:
            x, h = x[:, -self.last :], h[:, -self.last :]
            mask = mask if mask is None or c.delta else mask[:, -self.last :]
        y, cache = c.mixer(self.dtype)(
            h, keys, mask=mask, positions=positions, freq=freq, cache=cache, index=index
        )
        y = post("norm_attn_out", y)
        if c.parallel:
            h = h if c.shared_norm else pre("norm_mlp", x)
            return constrain(x + y + post("norm_mlp_out", mlp(h)), "batch"), cache
        x = checkpoint_name(x + y, "mid")
        if c.cross:
            y, _ = c.attention(self.dtype, "cross")(norm("norm_cross")(x), kv, mask=kv_mask)
            x = x + drop(y)
        x = x + post("norm_mlp_out", mlp(pre("norm_mlp", x)))
        if c.block_scale:
            init: Any = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
            x = x * self.param("block_scale", init, (1,)).astype(x.dtype).reshape(1, 1, 1)
        return constrain(x, "batch"), cache


class Period(nn.Module):
    """Blocks that differ, one after the other; as `Block`, caches and layers being tuples."""

    config: tuple[BlockConfig, ...]
    dtype: Dtype = jnp.float32
    last: int = 0  # of the last block

    @nn.compact
    def __call__(self, x, cache, layers, *args):
        new = []
        for j, config in enumerate(self.config):
            # Each is recomputed on its own: one block's arrays are in memory, not a period's.
            block = rematerialized(Block, config.remat, prevent_cse=True)
            last = self.last if j == len(self.config) - 1 else 0
            x, own = block(config, self.dtype, last, name=f"block_{j}")(
                x, cache and cache[j], layers[j], *args
            )
            new.append(own)
        return x, cache and tuple(new)


class Stack(nn.Module):
    """`depth` equal blocks, scanned: compile time does not grow with depth.

    Parameters are stacked on a leading `layers` axis. Given a tuple with the parameters of each
    block instead, see `layered`, it runs them one after the other; their cache is a tuple, too.

    Blocks that differ are a tuple, a period that repeats until there are `depth` of them. What is
    said of a block and its arguments is then that of a `Period`: caches and `layers` are tuples.
    """

    config: BlockConfig | tuple[BlockConfig, ...]
    depth: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], *,
        mask: Bool[Array, "B T S"] | None = None,
        positions: Int[Array, "B T"] | Rotary | None = None,
        layers: Layers | None = None,
        distance: Int[Array, "B T S"] | None = None,
        kv: Float[Array, "B C D"] | None = None, kv_mask: Bool[Array, "B T C"] | None = None,
        cache: Cache | None = None, index: Int[Array, ""] | int = 0, last: int = 0,
        gated: Gated | None = None, seen: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B _ E"], Cache | None]:  # fmt: skip
        """Run the blocks.

        Args:
          mask, positions, cache, index: of self-attention, see `Attention`.
          distance: positions from key to query, for windows.
          kv: inputs of the keys and values of cross-attention, with their mask.
          last: the last block computes only this many last tokens, the text, as nothing reads the
            states of the others; 0: all. Only for frozen parameters, without cache and `kv`.
          gated: layers of gated cross-attention to run between the blocks, whose parameters must be
            frozen; `seen` are the tokens that attend to the image. None: without.

        Returns:
          States of all T tokens, or of the `last`; and the updated cache (None without one).
        """
        layers = layers or PerLayer()
        if isinstance(self._params, tuple):
            assert kv is None
            assert not last
            masks = (mask, positions, distance)
            return self._unrolled(x, layers, masks, cache, index, gated, seen)
        if gated is not None:
            assert kv is None
            if isinstance(self.config, tuple):
                raise ConfigError(
                    "gated cross-attention between layers is not possible with a language model "
                    "whose layers differ; use a connector that makes a prefix"
                )
            masks = (mask, positions, distance)
            x, cache = self._between(x, layers, masks, cache, index, gated, seen)
            return x[:, -last:] if last else x, cache
        if last:
            assert cache is None
            assert kv is None
            return self._last(x, layers, (mask, positions, distance), last), None
        axes = (0, 0, *(nn.broadcast,) * 6)
        blocks = scan_layers(self._block_type, self._count, self._remat, axes, (x,))
        return blocks(self.config, self.dtype, name="blocks")(
            constrain(x, "batch"), cache, layers, mask, positions, distance, kv, kv_mask, index
        )

    def _last(
        self, x: Float[Array, "B T E"], layers: Layers, masks: tuple[Any, ...], last: int
    ) -> Float[Array, "B _ E"]:
        """Run the blocks, the last one for the last tokens alone.

        Each block slices its parameters out of the whole stack: a scan over all blocks but one
        would first copy them. That is for frozen parameters only: the gradient of a slice is as
        large as the stack, in every block.
        """

        def run(x: jax.Array, i: jax.Array | int, last: int) -> jax.Array:
            return self._block(i, layers, last)(x, None, masks, 0)[0]

        if self._remat != "none" and self._block_type is Block:
            policy = REMAT[self._remat]
            run = jax.checkpoint(run, prevent_cse=False, policy=policy, static_argnums=2)
        body = lambda x, i: (run(x, i, 0), None)  # noqa: E731
        x, _ = jax.lax.scan(
            body, constrain(x, "batch"), jnp.arange(self._count - 1),
            unroll=max(1, _unroll(self._count, self._remat, (x,)) - 1),
        )  # fmt: skip
        return run(x, self._count - 1, last)

    @property
    def _block_type(self) -> type[nn.Module]:
        return Period if isinstance(self.config, tuple) else Block

    @property
    def _count(self) -> int:
        """The number of blocks, or of periods."""
        return self.depth // (len(self.config) if isinstance(self.config, tuple) else 1)

    @property
    def _remat(self) -> Remat:
        return (self.config[0] if isinstance(self.config, tuple) else self.config).remat

    @property
    def _params(self) -> Any:
        """The parameters of the blocks; None while they are created."""
        return self.variables.get("params", {}).get("blocks")

    def _unrolled(
        self, x: Float[Array, "B T E"], layers: Layers, masks: tuple[Any, ...],
        cache: Cache | None, index: Any, gated: Gated | None, seen: Any,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:  # fmt: skip
        """Run the blocks one after the other, each with its own parameters and cache."""
        every = 0 if gated is None else gated.config.every
        x, new = constrain(x, "batch"), []
        for i in range(self._count):
            if gated is not None and (i + 1) % every == 0:
                layer = jax.tree.map(lambda leaf, i=i: leaf[i // every], gated)
                x = layer(x, seen)
            x, own = self._block(i, layers)(x, cache and cache[i], masks, index)
            new.append(own)
        return x, cache and tuple(new)

    def _block(self, i: jax.Array | int, layers: Layers, last: int = 0) -> Callable[..., Any]:
        """Return block `i` as a function (x, its cache, masks, index) -> (states, cache).

        Its parameters are sliced out of the whole stack, unless they are separate.
        """
        slice_of = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        params, layer = self._params, jax.tree.map(slice_of, layers)
        params = params[i] if isinstance(params, tuple) else jax.tree.map(slice_of, params)
        block: Any = self._block_type(self.config, self.dtype, last, parent=None)  # type: ignore[call-arg]
        return lambda x, cache, masks, index: block.apply(
            {"params": params}, x, cache, layer, *masks, None, None, index
        )

    def _between(
        self, x: Float[Array, "B T E"], layers: Layers, masks: tuple[Any, ...],
        cache: Cache | None, index: Any, gated: Gated, seen: Any,
    ) -> tuple[Float[Array, "B T E"], Cache | None]:  # fmt: skip
        """Run groups of `every` blocks, each with a gated layer before its last block.

        The blocks that remain follow. Caches are grouped alike: [groups, every, B, …].
        """
        every, groups = gated.config.every, gated.config.layers
        split = lambda x: x[: groups * every].reshape(groups, every, *x.shape[1:])  # noqa: E731

        def group(x: jax.Array, scanned: tuple[Any, ...]) -> tuple[jax.Array, Any]:
            g, layer, caches = scanned
            new = []
            for j in range(every):
                # Compiled as if alone: closed gates leave the states as they are, bit for bit.
                x = jax.lax.optimization_barrier(layer(x, seen) if j == every - 1 else x)
                own = jax.tree.map(lambda c, j=j: c[j], caches)
                x, own = self._block(g * every + j, layers)(x, own, masks, index)
                new.append(own)
            return constrain(x, "batch"), jax.tree.map(lambda *c: jnp.stack(c), *new)

        if self._remat != "none":
            policy = REMAT[self._remat]
            group = jax.checkpoint(group, prevent_cse=False, policy=policy)
        scanned = (jnp.arange(groups), gated, jax.tree.map(split, cache))
        x, caches = jax.lax.scan(group, constrain(x, "batch"), scanned)
        caches = jax.tree.map(lambda c: c.reshape(-1, *c.shape[2:]), caches)
        for i in range(groups * every, self.depth):
            x = jax.lax.optimization_barrier(x)
            own = jax.tree.map(lambda c, i=i: c[i], cache)
            x, own = self._block(i, layers)(x, own, masks, index)
            caches = jax.tree.map(lambda c, o: jnp.concatenate([c, o[None]]), caches, own)
        return x, caches


def scan_layers(
    layer: type[nn.Module], depth: int, remat: Remat, in_axes: Any, inputs: Inputs
) -> Any:
    """Return a module class that runs `depth` layers by a scan, their parameters stacked.

    Within `with_runs` the loop is unrolled where that pays.

    Args:
      layer: a module class whose call takes and returns the carry first.
      remat: what the backward pass recomputes, see `BlockConfig`.
      in_axes: of the call's other arguments: 0 where layers differ, `nn.broadcast` elsewhere.
      inputs: the arrays that enter a layer.
    """
    if layer is not Period:  # whose blocks are, one by one
        # The compiler unrolls a loop of one layer. There it would recognize the recomputation as a
        # common subexpression, and keep the arrays after all, unless it is prevented from that.
        layer = rematerialized(layer, remat, prevent_cse=depth == 1)
    return nn.scan(
        layer,
        variable_axes={"params": 0, ATTENTION: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=depth,
        unroll=_unroll(depth, remat, inputs),
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def rematerialized(layer: type[nn.Module], remat: Remat, *, prevent_cse: bool) -> Any:
    """Return a module class whose backward pass recomputes what `remat` says."""
    if remat == "none":
        return layer
    return nn.remat(layer, prevent_cse=prevent_cse, policy=REMAT[remat])


_RUNS = contextvars.ContextVar("runs", default=0.0)  # of `with_runs`


def with_runs(times: float, fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn`, traced for a CPU that will run it so many times.

    Loops that keep everything for the backward pass are unrolled where that pays, see
    `distributed.compile.unrolls`. 0: none.
    """

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        token = _RUNS.set(times)
        try:
            return fn(*args, **kwargs)
        finally:
            _RUNS.reset(token)

    return traced


def _unroll(depth: int, remat: Remat, inputs: Inputs) -> int:
    """Return how many layers one pass of a loop over `depth` layers consists of."""
    size = sum(x.size * x.dtype.itemsize for x in inputs)
    return depth if remat == "none" and unrolls("train", depth, size, _RUNS.get()) else 1


def unpadded_rows(batch: int, length: int) -> tuple[Int[Array, "B T"], Bool[Array, "B T T"]]:
    """Return the positions 0, 1, … and the causal mask of rows without padding."""
    positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
    causal = jnp.tril(jnp.ones((length, length), bool))
    return positions, jnp.broadcast_to(causal, (batch, length, length))


def text_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """Return the mask of rows [prompt and prefix][independent texts].

    Segment 0 is padding, -1 the shared prefix, 1..k independent texts. Every token attends to
    earlier tokens of its own segment and of the prefix; none attends to padding. So the captions
    of one image share its prefix in one row, and do not see each other.

    Example, for segments [-1, -1, 1, 1, 2, 0]::

        [[1 0 0 0 0 0]
         [1 1 0 0 0 0]
         [1 1 1 0 0 0]
         [1 1 1 1 0 0]
         [1 1 0 0 1 0]
         [1 1 0 0 0 0]]
    """
    T = segments.shape[1]
    q, k = segments[:, :, None], segments[:, None, :]
    order = jnp.tril(jnp.ones((T, T), bool))
    return order[None] & (k != 0) & ((k == -1) | (k == q))
