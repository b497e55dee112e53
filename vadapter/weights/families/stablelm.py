"""StableLM and StableLM 2: LayerNorms, and positions that rotate a part of each head.

Source: configuration_stablelm.py and modeling_stablelm.py of transformers.
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
    only,
    refuse,
    require,
)

_KEYS: Keys = {
    **llama.BASE, **llama.sizes(50_304, 2560, 6912, 32, 32), **rotary.keys(4096, partial=True),
    "num_key_value_heads": Key(32, COUNT), "layer_norm_eps": Key(1e-5, POSITIVE),
    "partial_rotary_factor": Key(0.25, rotary.SHARE), "use_qkv_bias": llama.SWITCH,
    "use_parallel_residual": llama.SWITCH, "qk_layernorm": Key(False, only(False)),
}  # fmt: skip


def _stablelm(c: Config) -> Spec:
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    require(c, "head_dim", c["head_dim"] in (None, head_dim), f"it is {head_dim} by the sizes")
    spec = llama.decoder({**c, "rms_norm_eps": c["layer_norm_eps"]}, partial=True)
    if int(head_dim * spec["rope"]["part"]) % 2:
        refuse("partial_rotary_factor", spec["rope"]["part"], "it rotates an odd part of each head")
    return spec | {
        "norm": "layer", "qkv_bias": c["use_qkv_bias"],
        "parallel": c["use_parallel_residual"], "shared_norm": True,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {"stablelm": Family(_stablelm, llama.TABLES, _KEYS)}
