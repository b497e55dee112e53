"""SmolLM3: every few layers have no positions.

Source: configuration_smollm3.py and modeling_smollm3.py of transformers.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    require,
)

_ROTATED = Values(
    lambda v: v is None or (isinstance(v, list) and all(type(i) is int and i in (0, 1) for i in v)),
    "a list of 0 and 1, or null",
)
_KEYS: Keys = {
    **llama.BASE, **llama.sizes(128_256, 2048, 11_008, 36, 16), **rotary.keys(32_768, 2e6),
    "num_key_value_heads": Key(4, COUNT.or_null()), "attention_bias": llama.SWITCH,
    "mlp_bias": llama.SWITCH, "tie_word_embeddings": Key(True, FLAG),
    "no_rope_layers": Key(None, _ROTATED), "no_rope_layer_interval": Key(4, COUNT),
    "use_sliding_window": llama.SWITCH, "sliding_window": llama.OPTIONAL,
    "layer_types": llama.LAYER_TYPES,
}  # fmt: skip


def _smollm3(c: Config) -> Spec:
    depth, every = c["num_hidden_layers"], c["no_rope_layer_interval"]
    rotated = c["no_rope_layers"]  # 1 is with positions, in spite of the name
    if rotated is None:
        rotated = [int((i + 1) % every != 0) for i in range(depth)]
    require(c, "no_rope_layers", len(rotated) >= depth, f"it needs one entry for each of {depth}")
    window = c["use_sliding_window"] and c["sliding_window"]
    return llama.decoder(c) | {
        "bias": c["attention_bias"], "mlp_bias": c["mlp_bias"], "rotated": tuple(rotated[:depth]),
        **llama.windows(
            c, window or None, c["layer_types"], lambda i: window and not rotated[i]
        ),
    }  # fmt: skip


FAMILIES: dict[str, Family] = {"smollm3": Family(_smollm3, llama.TABLES, _KEYS)}
