"""GPT-NeoX: Pythia.

Source: configuration_gpt_neox.py and modeling_gpt_neox.py of transformers.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    ACTIVATION,
    ACTIVATIONS,
    COUNT,
    FLAG,
    LANGUAGE_MODEL,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    require,
    require_heads,
)
from vadapter.weights.name_mapping import Table, fused

_TABLE = Table(
    layers="gpt_neox.layers.{}.",
    modules={
        "embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
        "norm_attn": "input_layernorm",
        **fused("attn/{}", "attention.query_key_value", by_head=True),
        "attn/o": "attention.dense",
        "norm_mlp": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h",
    },
    ignored=(r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$"),
)  # fmt: skip
_ROTARY = rotary.keys(2048)
_KEYS: Keys = {
    **LANGUAGE_MODEL, **llama.sizes(50_432, 6144, 24_576, 44, 64),
    # The names of the two keys beside the group are its own; the usual ones are ignored.
    **{k: v for k, v in _ROTARY.items() if k not in ("rope_theta", "partial_rotary_factor")},
    "rotary_emb_base": Key(10_000.0, POSITIVE), "rotary_pct": Key(0.25, rotary.SHARE),
    "hidden_act": Key("gelu", ACTIVATION), "layer_norm_eps": Key(1e-5, POSITIVE),
    "attention_bias": Key(True, FLAG), "use_parallel_residual": Key(True, FLAG),
    "tie_word_embeddings": Key(False, FLAG), "head_dim": Key(None, COUNT.or_null()),
}  # fmt: skip


def _neox(c: Config) -> Spec:
    require_heads(c)
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    require(c, "head_dim", c["head_dim"] in (None, head_dim), f"it is {head_dim} by the sizes")
    beside = {"rope_theta": c["rotary_emb_base"], "partial_rotary_factor": c["rotary_pct"]}
    return {
        "kind": "lm", "vocab_size": c["vocab_size"], "width": c["hidden_size"],
        "depth": c["num_hidden_layers"], "heads": c["num_attention_heads"],
        "kv_heads": c["num_attention_heads"], "mlp_dim": c["intermediate_size"],
        "mlp": ACTIVATIONS[c["hidden_act"]], "norm": "layer", "norm_eps": c["layer_norm_eps"],
        "bias": c["attention_bias"], "mlp_bias": True,
        "parallel": c["use_parallel_residual"], "shared_norm": False,
        "rope": rotary.rotary({**c, **beside}, head_dim, partial=True),
        "max_len": c["max_position_embeddings"],
        "tied": c["tie_word_embeddings"], "embed_scale": False,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "gpt_neox": Family(_neox, (_TABLE, _TABLE.without("gpt_neox.")), _KEYS)
}
