"""Granite 3, and Granite 4 of attention alone: multipliers of embeddings, scores, outputs, logits.

Source: configuration_*.py and modeling_*.py of transformers' granite and granitemoehybrid.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    only,
    require,
)
from vadapter.weights.name_mapping import Part

_FACTOR = Key(1.0, POSITIVE)
_KEYS: Keys = {
    **llama.BASE, **llama.sizes(32_000, 4096, 11_008, 32, 32), **rotary.keys(2048),
    "num_key_value_heads": llama.OPTIONAL, "attention_bias": llama.SWITCH,
    "mlp_bias": llama.SWITCH, "embedding_multiplier": _FACTOR, "logits_scaling": _FACTOR,
    "residual_multiplier": _FACTOR, "attention_multiplier": _FACTOR,
}  # fmt: skip
_KINDS = ("full_attention", "attention")
_ATTENTION = Values(
    lambda v: isinstance(v, list) and all(kind in _KINDS for kind in v),
    f"a list of {' and '.join(_KINDS)}",
)
_KEYS4: Keys = {
    **_KEYS, "num_local_experts": Key(8, only(0)), "layer_types": Key(None, _ATTENTION),
    "shared_intermediate_size": Key(1024, COUNT),
    "position_embedding_type": Key(None, only(None, "rope")),
}  # fmt: skip
_TABLES4 = llama.tables(
    llama.TABLE
    | {f"mlp/{x}": Part("shared_mlp.input_linear", i, 2) for i, x in enumerate(("gate", "up"))}
    | {"mlp/down": "shared_mlp.output_linear"}
)


def _granite(c: Config) -> Spec:
    return llama.decoder(c) | {
        "bias": c["attention_bias"], "mlp_bias": c["mlp_bias"],
        "embed_factor": float(c["embedding_multiplier"]),
        "attn_scale": float(c["attention_multiplier"]),
        "residual_scale": float(c["residual_multiplier"]),
        "logit_factor": 1 / c["logits_scaling"],
    }  # fmt: skip


def _granite4(c: Config) -> Spec:
    depth = c["num_hidden_layers"]
    require(c, "layer_types", len(c["layer_types"]) == depth, f"it needs {depth} entries")
    spec = _granite({**c, "intermediate_size": c["shared_intermediate_size"], "mlp_bias": False})
    return spec | {"rotated": () if c["position_embedding_type"] else (0,)}


FAMILIES: dict[str, Family] = {
    "granite": Family(_granite, llama.TABLES, _KEYS),
    "granitemoehybrid": Family(_granite4, _TABLES4, _KEYS4, {"layers_block_type": "layer_types"}),
}
