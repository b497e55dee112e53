"""OLMo 2 and 3: norms on outputs alone, and one over the queries and the keys of all heads.

Source: configuration_*.py and modeling_*.py of transformers' olmo2 and olmo3.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import COUNT, POSITIVE, Config, Family, Key, Keys, Spec

_TABLES = llama.tables(
    llama.TABLE
    | {
        "norm_attn_out": "post_attention_layernorm",
        "norm_mlp_out": "post_feedforward_layernorm",
    }
)
_OLMO2: Keys = {
    **llama.BASE, **llama.sizes(50_304, 4096, 11_008, 32, 32), **rotary.keys(2048),
    "rms_norm_eps": Key(1e-5, POSITIVE), "num_key_value_heads": llama.OPTIONAL,
    "attention_bias": llama.SWITCH,
}  # fmt: skip
_THETA = 5e5
_OLMO3: Keys = {
    **_OLMO2, **rotary.keys(2048, _THETA),
    "sliding_window": Key(4096, COUNT.or_null()), "layer_types": llama.LAYER_TYPES,
}  # fmt: skip


def _olmo2(c: Config) -> Spec:
    return llama.decoder(c) | {
        "bias": c["attention_bias"], "pre_norms": False, "post_norms": True,
        "qk_norm": True, "qk_norm_over": "heads",
    }  # fmt: skip


def _olmo3(c: Config) -> Spec:
    far, near = llama.groups(c)
    windows = llama.windows(c, c["sliding_window"], c["layer_types"], lambda i: (i + 1) % 4)
    spec = _olmo2(far) | windows
    # `rope_theta` beside the groups is that of layers without a window alone.
    local = rotary.rotary({**near, "rope_theta": _THETA}, spec["head_dim"])
    return spec | {"rope_local": local}


FAMILIES: dict[str, Family] = {
    "olmo2": Family(_olmo2, _TABLES, _OLMO2),
    "olmo3": Family(_olmo3, _TABLES, _OLMO3),
}
