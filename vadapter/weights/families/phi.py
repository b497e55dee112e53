"""Phi-3, Phi-3.5 and Phi-4-mini: the projections of queries, keys and values are one tensor.

Source: configuration_phi3.py and modeling_phi3.py of transformers.
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
    refuse,
)
from vadapter.weights.name_mapping import Part, Table

_KEYS: Keys = {
    **llama.BASE, **llama.sizes(32_064, 3072, 8192, 32, 32), **rotary.keys(4096, partial=True),
    "rms_norm_eps": Key(1e-5, POSITIVE), "num_key_value_heads": llama.OPTIONAL,
    "sliding_window": llama.OPTIONAL, "original_max_position_embeddings": Key(4096, COUNT),
}  # fmt: skip


def _tables(spec: Spec) -> tuple[Table, ...]:
    heads, kv_heads = (spec[key] * spec["head_dim"] for key in ("heads", "kv_heads"))
    sizes = (heads, kv_heads, kv_heads)
    qkv = {f"attn/{x}": Part("self_attn.qkv_proj", i, 3, sizes=sizes) for i, x in enumerate("qkv")}
    gate_up = {f"mlp/{x}": Part("mlp.gate_up_proj", i, 2) for i, x in enumerate(("gate", "up"))}
    return llama.tables(llama.TABLE | qkv | gate_up)


def _phi3(c: Config) -> Spec:
    group = dict(c["rope_scaling"] or c["rope_parameters"] or {})
    kind = group.pop("type", "default")
    if (kind := group.get("rope_type", kind)) in ("su", "yarn"):  # as first releases wrote it
        kind = "longrope"
    if kind not in ("default", "longrope"):
        refuse("rope_type", kind, "only default and longrope are read")
    c = {**c, "rope_scaling": {**group, "rope_type": kind}}
    window = c["sliding_window"]
    return llama.decoder(c, partial=True) | llama.windows(c, window, None, lambda i: window)


FAMILIES: dict[str, Family] = {"phi3": Family(_phi3, _tables, _KEYS)}
