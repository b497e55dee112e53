"""Granite 3: multipliers of embeddings, scores, outputs and logits.

Source: configuration_granite.py and modeling_granite.py of transformers.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import POSITIVE, Config, Family, Key, Keys, Spec

_FACTOR = Key(1.0, POSITIVE)
_KEYS: Keys = {
    **llama.BASE, **llama.sizes(32_000, 4096, 11_008, 32, 32), **rotary.keys(2048),
    "num_key_value_heads": llama.OPTIONAL, "attention_bias": llama.SWITCH,
    "mlp_bias": llama.SWITCH, "embedding_multiplier": _FACTOR, "logits_scaling": _FACTOR,
    "residual_multiplier": _FACTOR, "attention_multiplier": _FACTOR,
}  # fmt: skip


def _granite(c: Config) -> Spec:
    return llama.decoder(c) | {
        "bias": c["attention_bias"], "mlp_bias": c["mlp_bias"],
        "embed_factor": float(c["embedding_multiplier"]),
        "attn_scale": float(c["attention_multiplier"]),
        "residual_scale": float(c["residual_multiplier"]),
        "logit_factor": 1 / c["logits_scaling"],
    }  # fmt: skip


FAMILIES: dict[str, Family] = {"granite": Family(_granite, llama.TABLES, _KEYS)}
