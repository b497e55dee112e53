"""Ministral (2024), whose layers may differ in their window, and Ministral 3, which scales queries.

Source: configuration_*.py and modeling_*.py of transformers' ministral and ministral3.
"""

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    REQUIRED,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    read,
)

_MINISTRAL: Keys = {
    **llama.BASE, **llama.sizes(32_000, 4096, 14_336, 32, 32), **rotary.keys(131_072),
    "num_key_value_heads": Key(8, COUNT.or_null()),
    "sliding_window": Key(4096, COUNT.or_null()), "layer_types": llama.LAYER_TYPES,
}  # fmt: skip
_MINISTRAL3: Keys = {
    **llama.BASE, **llama.sizes(131_072, 4096, 14_336, 34, 32), **rotary.keys(262_144),
    "num_key_value_heads": Key(8, COUNT.or_null()), "head_dim": Key(128, COUNT.or_null()),
    "rms_norm_eps": Key(1e-5, POSITIVE), "sliding_window": llama.OPTIONAL,
}  # fmt: skip
_ROPE3 = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0,
    "original_max_position_embeddings": 16_384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip
_BETA: Keys = {"llama_4_scaling_beta": Key(REQUIRED, NOT_NEGATIVE)}
_LENGTH: Keys = {"original_max_position_embeddings": Key(REQUIRED, COUNT)}


def _ministral(c: Config) -> Spec:
    window = c["sliding_window"]
    return llama.decoder(c) | llama.windows(c, window, c["layer_types"], lambda i: window)


def _ministral3(c: Config) -> Spec:
    group = c["rope_scaling"] or (_ROPE3 if (g := c["rope_parameters"]) is None else g)
    window = c["sliding_window"]
    spec = llama.decoder({**c, "rope_scaling": group}) | llama.windows(
        c, window, None, lambda i: window
    )
    rope = spec["rope"] | {"query_beta": float(read(group, _BETA)["llama_4_scaling_beta"])}
    if "original_len" not in rope:  # which some types of positions do without
        rope["original_len"] = read(group, _LENGTH)["original_max_position_embeddings"]
    return spec | {"rope": rope}


FAMILIES: dict[str, Family] = {
    "ministral": Family(_ministral, llama.TABLES, _MINISTRAL),
    "ministral3": Family(_ministral3, llama.TABLES, _MINISTRAL3),
}
