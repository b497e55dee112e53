"""GPT-2.

Source: configuration_gpt2.py and modeling_gpt2.py of transformers.
"""

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
    only,
    require_heads,
)
from vadapter.weights.name_mapping import Table, fused

# They are saved with or without the prefix "transformer."; the head never has it.
_TABLES = tuple(
    Table(
        layers=f"{root}h.{{}}.",
        modules={
            "embedding": f"{root}wte", "position_embedding": f"{root}wpe",
            "norm": f"{root}ln_f", "head": "lm_head",
            "norm_attn": "ln_1", **fused("attn/{}", "attn.c_attn"), "attn/o": "attn.c_proj",
            "norm_mlp": "ln_2", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj",
        },
        transposed=False,
        ignored=(r"\.attn\.(masked_)?bias$",),
    )
    for root in ("transformer.", "")
)  # fmt: skip
_KEYS: Keys = {
    **LANGUAGE_MODEL,
    "vocab_size": Key(50_257, COUNT), "n_positions": Key(1024, COUNT), "n_embd": Key(768, COUNT),
    "n_layer": Key(12, COUNT), "n_head": Key(12, COUNT), "n_inner": Key(None, COUNT.or_null()),
    "activation_function": Key("gelu_new", ACTIVATION), "layer_norm_epsilon": Key(1e-5, POSITIVE),
    "scale_attn_weights": Key(True, FLAG),
    "scale_attn_by_inverse_layer_idx": Key(False, only(False)),
    "add_cross_attention": Key(False, only(False)), "tie_word_embeddings": Key(True, FLAG),
}  # fmt: skip
_ALIASES = {"hidden_size": "n_embd", "max_position_embeddings": "n_positions",
            "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}  # fmt: skip


def _gpt2(c: Config) -> Spec:
    require_heads(c, "n_embd", "n_head")
    scale = {} if c["scale_attn_weights"] else {"attn_scale": 1.0}
    return scale | {
        "kind": "lm", "vocab_size": c["vocab_size"], "width": c["n_embd"], "depth": c["n_layer"],
        "heads": c["n_head"], "kv_heads": c["n_head"],
        "mlp_dim": c["n_inner"] or 4 * c["n_embd"], "mlp": ACTIVATIONS[c["activation_function"]],
        "norm": "layer", "norm_eps": c["layer_norm_epsilon"], "bias": True,
        "parallel": False, "positions": "learned", "max_len": c["n_positions"],
        "tied": c["tie_word_embeddings"], "embed_scale": False,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {"gpt2": Family(_gpt2, _TABLES, _KEYS, _ALIASES)}
