"""Llama 1 to 3, SmolLM, TinyLlama, Mistral, Qwen 2 to 3, and what llama2.c trains.

Source: configuration_*.py and modeling_*.py of transformers' llama, mistral, qwen2 and qwen3.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from vadapter.weights import llama2c
from vadapter.weights.families import rotary
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GATED,
    GATED_ACTIVATION,
    LANGUAGE_MODEL,
    POSITIVE,
    WHOLE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    only,
    refuse,
    require_heads,
)
from vadapter.weights.name_mapping import Table

TABLE = Table(
    layers="model.layers.{}.",
    modules={
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "norm_attn": "input_layernorm",
        **{f"attn/{x}": f"self_attn.{x}_proj" for x in "qkvo"},
        "attn/norm_q": "self_attn.q_norm", "attn/norm_k": "self_attn.k_norm",
        "norm_mlp": "post_attention_layernorm",
        **{f"mlp/{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
    ignored=(r"rotary_emb\.inv_freq$",),
)  # fmt: skip


def tables(table: Table) -> tuple[Table, ...]:
    """Return a table and that of a base model alone, which is saved without "model."."""
    return table, table.without("model.")


TABLES = tables(TABLE)


def sizes(vocab: int, width: int, mlp: int, depth: int, heads: int) -> Keys:
    """Return the keys of sizes, whose defaults these are."""
    return {
        "vocab_size": Key(vocab, COUNT), "hidden_size": Key(width, COUNT),
        "intermediate_size": Key(mlp, COUNT), "num_hidden_layers": Key(depth, COUNT),
        "num_attention_heads": Key(heads, COUNT),
    }  # fmt: skip


OPTIONAL, SWITCH = Key(None, COUNT.or_null()), Key(False, FLAG)
KINDS = ("full_attention", "sliding_attention")
LAYER_TYPES = Key(
    None,
    Values(
        lambda v: v is None or (isinstance(v, list) and all(kind in KINDS for kind in v)),
        f"a list of {' and '.join(KINDS)}, or null",
    ),
)
BASE: Keys = {
    **LANGUAGE_MODEL,
    "hidden_act": Key("silu", GATED_ACTIVATION), "rms_norm_eps": Key(1e-6, POSITIVE),
    "tie_word_embeddings": SWITCH, "head_dim": OPTIONAL,
}  # fmt: skip
_LLAMA: Keys = {
    **BASE, **sizes(32_000, 4096, 11_008, 32, 32), **rotary.keys(2048),
    "num_key_value_heads": OPTIONAL, "attention_bias": SWITCH, "mlp_bias": SWITCH,
}  # fmt: skip
_MISTRAL: Keys = {
    **BASE, **sizes(32_000, 4096, 14_336, 32, 32), **rotary.keys(131_072),
    "num_key_value_heads": Key(8, COUNT), "sliding_window": Key(4096, COUNT.or_null()),
    "layer_types": Key(None, only(None)),
}  # fmt: skip
_QWEN2: Keys = {
    **BASE, **sizes(151_936, 4096, 22_016, 32, 32), **rotary.keys(32_768),
    "num_key_value_heads": Key(32, COUNT.or_null()),
    "use_sliding_window": SWITCH, "sliding_window": Key(4096, COUNT.or_null()),
    "max_window_layers": Key(28, WHOLE), "layer_types": LAYER_TYPES,
}  # fmt: skip
_QWEN3: Keys = {**_QWEN2, "head_dim": Key(128, COUNT), "attention_bias": SWITCH}


def decoder(c: Config, *, partial: bool = False) -> Spec:
    """Return what models that resemble Llama share; `c` has at least `BASE`, sizes and positions.

    `partial` is that of the family's `rotary.keys`.
    """
    heads = c["num_attention_heads"]
    require_heads(c, kv_heads="num_key_value_heads", head_dim="head_dim")
    return {
        "kind": "lm", "vocab_size": c["vocab_size"], "width": c["hidden_size"],
        "depth": c["num_hidden_layers"], "heads": heads,
        "kv_heads": c["num_key_value_heads"] or heads,
        "head_dim": (head_dim := c["head_dim"] or c["hidden_size"] // heads),
        "mlp_dim": c["intermediate_size"], "mlp": GATED[c["hidden_act"]],
        "norm": "rms", "norm_eps": c["rms_norm_eps"], "bias": False, "mlp_bias": False,
        "parallel": False, "rope": rotary.rotary(c, head_dim, partial=partial), "windows": (),
        "max_len": c["max_position_embeddings"],
        "tied": c["tie_word_embeddings"], "embed_scale": False,
    }  # fmt: skip


def windows(c: Config, window: int | None, kinds: Sequence[str] | None, rest: Any) -> Spec:
    """Return the window of each layer, 0 for none.

    The kinds of the layers are listed, or each is sliding where `rest` of its index is true.
    """
    layers = range(c["num_hidden_layers"])
    if kinds is None:
        slides = [bool(rest(i)) for i in layers]
    elif len(kinds) != len(layers):
        refuse("layer_types", list(kinds), f"it needs one entry for each of {len(layers)} layers")
    else:
        slides = [kind == "sliding_attention" for kind in kinds]
    if any(slides) and not window:
        refuse("sliding_window", window, "layers with a window need one")
    return {"windows": tuple((window or 0) * slide for slide in slides) if any(slides) else ()}


def repeated(kinds: Sequence[Any]) -> tuple[Any, ...]:
    """Return the shortest pattern that, repeated, gives the kinds of all layers."""
    depth = len(kinds)
    periods = (n for n in range(1, depth + 1) if depth % n == 0)
    return next(tuple(kinds[:n]) for n in periods if list(kinds[:n]) * (depth // n) == list(kinds))


def groups(c: Config) -> tuple[Config, Config]:
    """Return `c` with the rotary positions of layers without a window, and of those with one.

    `rope_parameters` has a group of each kind; `rope_scaling` changes that of layers without a
    window. What is beside the groups completes neither, except for `rope_theta`.
    """
    of_kind = c["rope_parameters"] or {}
    for key, value in of_kind.items():
        if key not in KINDS or not (value is None or isinstance(value, Mapping)):
            refuse(f"rope_parameters.{key}", value, f"it has groups {' and '.join(KINDS)}")
    far, near = (dict(of_kind.get(kind) or {}) for kind in KINDS)
    both = {**far, **(c["rope_scaling"] or {})}, near
    beside = {"rope_parameters": None, "original_max_position_embeddings": None}
    # A key `truncate` is read beside the groups, where it may not be.
    return tuple({**c, **beside, "rope_scaling": {**g, "truncate": True}} for g in both)  # type: ignore[return-value]


def _llama(c: Config) -> Spec:
    return decoder(c) | {"bias": c["attention_bias"], "mlp_bias": c["mlp_bias"]}


def _mistral(c: Config) -> Spec:
    window = c["sliding_window"]
    return decoder(c) | windows(c, window, None, lambda i: window)


def _qwen(c: Config) -> Spec:
    window, first = c["use_sliding_window"] and c["sliding_window"], c["max_window_layers"]
    return decoder(c) | windows(
        c, window or None, c["layer_types"], lambda i: window and i >= first
    )


def _qwen2(c: Config) -> Spec:
    return _qwen(c) | {"qkv_bias": True}


def _qwen3(c: Config) -> Spec:
    return _qwen(c) | {"bias": c["attention_bias"], "qk_norm": True}


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, TABLES, _LLAMA),
    "mistral": Family(_mistral, TABLES, _MISTRAL),
    "qwen2": Family(_qwen2, TABLES, _QWEN2),
    "qwen3": Family(_qwen3, TABLES, _QWEN3),
    "llama2c": Family(
        _llama, (llama2c.TABLE,), _LLAMA, files=lambda folder, config: llama2c.open_files(folder)
    ),
}
