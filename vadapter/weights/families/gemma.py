"""Gemma 1, 2 and 3 (text).

Source: configuration_*.py and modeling_*.py of transformers' gemma, gemma2 and gemma3.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GATED,
    GATED_ACTIVATION,
    LANGUAGE_MODEL,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    one_of,
    only,
    refuse,
    require_heads,
)

_TABLES2 = llama.tables(
    llama.TABLE
    | {
        "norm_attn_out": "post_attention_layernorm",
        "norm_mlp": "pre_feedforward_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    }
)
_TANH = "gelu_pytorch_tanh"
_CAP = POSITIVE.or_null()
# The first release wrote gelu for its approximation.
_FIRST = one_of({"gelu": "geglu", **GATED})
_BASE: Keys = {
    **LANGUAGE_MODEL,
    "rms_norm_eps": Key(1e-6, POSITIVE), "head_dim": Key(256, COUNT),
    "attention_bias": Key(False, FLAG), "tie_word_embeddings": Key(True, FLAG),
    "use_bidirectional_attention": Key(None, only(None, False)),
}  # fmt: skip
_GEMMA: Keys = {
    **_BASE, **llama.sizes(256_000, 3072, 24_576, 28, 16), **rotary.keys(8192),
    "num_key_value_heads": Key(16, COUNT), "hidden_act": Key(_TANH, _FIRST),
}  # fmt: skip
_GEMMA2: Keys = {
    **_BASE, **llama.sizes(256_000, 2304, 9216, 26, 8), **rotary.keys(8192),
    "num_key_value_heads": Key(4, COUNT), "hidden_activation": Key(_TANH, GATED_ACTIVATION),
    "query_pre_attn_scalar": Key(256, POSITIVE), "attn_logit_softcapping": Key(50.0, _CAP),
    "final_logit_softcapping": Key(30.0, _CAP),
    "sliding_window": Key(4096, COUNT.or_null()), "layer_types": llama.LAYER_TYPES,
}  # fmt: skip
_GEMMA3: Keys = {
    **{k: v for k, v in _GEMMA2.items() if k != "attn_logit_softcapping"},  # which it ignores
    **rotary.keys(131_072, 1e6),
    "vocab_size": Key(262_208, COUNT), "final_logit_softcapping": Key(None, _CAP),
    "sliding_window_pattern": Key(6, COUNT), "rope_local_base_freq": Key(1e4, POSITIVE),
}  # fmt: skip


def _gemma(c: Config) -> Spec:
    c = {**c, "hidden_act": _TANH if c["hidden_act"] == "gelu" else c["hidden_act"]}
    spec = llama.decoder(c)
    return spec | {"norm_offset": 1.0, "embed_scale": True, "bias": c["attention_bias"]}


def _second(c: Config, every: int) -> Spec:
    """Return what Gemma 2 and 3 share: all but every so many layers have a window."""
    require_heads(c)
    return _gemma({**c, "hidden_act": c["hidden_activation"]}) | {
        "post_norms": True,
        "attn_scale": c["query_pre_attn_scalar"] ** -0.5,
        "final_softcap": c["final_logit_softcapping"] or 0.0,
        **llama.windows(c, c["sliding_window"], c["layer_types"], lambda i: (i + 1) % every),
    }


def _gemma2(c: Config) -> Spec:
    if not c["sliding_window"]:
        refuse("sliding_window", c["sliding_window"], "Gemma 2 needs a window")
    return _second(c, 2) | {"attn_softcap": c["attn_logit_softcapping"] or 0.0}


def _gemma3(c: Config) -> Spec:
    far, near = llama.groups(c)
    spec = _second(far, c["sliding_window_pattern"])
    local = {**near, "rope_theta": c["rope_local_base_freq"]}
    return spec | {"qk_norm": True, "rope_local": rotary.rotary(local, c["head_dim"])}


FAMILIES: dict[str, Family] = {
    "gemma": Family(_gemma, llama.TABLES, _GEMMA),
    "gemma2": Family(_gemma2, _TABLES2, _GEMMA2),
    "gemma3_text": Family(_gemma3, _TABLES2, _GEMMA3),
}
