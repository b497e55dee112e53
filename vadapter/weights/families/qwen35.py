"""Qwen3.5 (text): gated delta networks, and attention with gated outputs in every few layers.

The three axes of rotary positions are one in text, which is all that is read here. The layers that
predict several tokens ahead (`mtp.`) are not used.

Source: configuration_qwen3_5.py and modeling_qwen3_5.py of transformers.
"""

import dataclasses

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    only,
    require,
)
from vadapter.weights.families.qwen_vl import one_axis
from vadapter.weights.name_mapping import Part, Table

_KINDS = ("linear_attention", "full_attention")
_LAYER_TYPES = Values(
    lambda v: v is None or (isinstance(v, list) and all(kind in _KINDS for kind in v)),
    f"a list of {' and '.join(_KINDS)}, or null",
)
_KEYS: Keys = {
    **llama.BASE, **llama.sizes(248_320, 4096, 12_288, 32, 16),
    **rotary.keys(32_768, partial=True), "partial_rotary_factor": Key(0.25, rotary.SHARE),
    "num_key_value_heads": Key(4, COUNT), "head_dim": Key(256, COUNT),
    "attention_bias": llama.SWITCH, "hidden_act": Key("silu", only("silu", "swish")),
    "linear_conv_kernel_dim": Key(4, COUNT), "linear_key_head_dim": Key(128, COUNT),
    "linear_value_head_dim": Key(128, COUNT), "linear_num_key_heads": Key(16, COUNT),
    "linear_num_value_heads": Key(32, COUNT), "layer_types": Key(None, _LAYER_TYPES),
    "full_attention_interval": Key(4, COUNT),
}  # fmt: skip


def _qwen35(c: Config) -> Spec:
    depth, kinds = c["num_hidden_layers"], c["layer_types"]
    if kinds is None:
        kinds = [_KINDS[(i + 1) % c["full_attention_interval"] == 0] for i in range(depth)]
    require(c, "layer_types", len(kinds) == depth, f"it needs one entry for each of {depth} layers")
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    require(c, "linear_num_value_heads", value_heads % key_heads == 0,
            f"it is no multiple of linear_num_key_heads={key_heads}")  # fmt: skip
    delta = {
        "key_heads": key_heads, "value_heads": value_heads, "conv": c["linear_conv_kernel_dim"],
        "key_dim": c["linear_key_head_dim"], "value_dim": c["linear_value_head_dim"],
    }  # fmt: skip
    return llama.decoder(one_axis(c), partial=True) | {
        "bias": c["attention_bias"], "qk_norm": True, "norm_offset": 1.0, "attn_gate": True,
        "delta": delta if _KINDS[0] in kinds else None,
        "recurrent": llama.repeated([int(kind == _KINDS[0]) for kind in kinds]),
    }  # fmt: skip


def _tables(spec: Spec) -> tuple[Table, ...]:
    names = {
        "attn/q": Part("self_attn.q_proj", 0, 2, by_head=True),
        "attn/gate": Part("self_attn.q_proj", 1, 2, by_head=True),
        "delta/z": "linear_attn.in_proj_z", "delta/a": "linear_attn.in_proj_a",
        "delta/b": "linear_attn.in_proj_b", "delta/o": "linear_attn.out_proj",
        "delta/norm": "linear_attn.norm", "delta/a_log": "linear_attn.A_log",
        "delta/dt_bias": "linear_attn.dt_bias",
    }  # fmt: skip
    if delta := spec.get("delta"):
        keys, values = (delta[f"{x}_heads"] * delta[f"{x}_dim"] for x in ("key", "value"))
        for i, x in enumerate("qkv"):
            sizes = (keys, keys, values)
            names[f"delta/{x}"] = Part("linear_attn.in_proj_qkv", i, 3, sizes=sizes)
            names[f"delta/conv_{x}"] = Part("linear_attn.conv1d", i, 3, sizes=sizes)
    table = llama.TABLE | names
    table = dataclasses.replace(table, ignored=(*table.ignored, r"^mtp\."))
    return llama.tables(table.periodic(len(spec["recurrent"]) if delta else 1))


FAMILIES: dict[str, Family] = {"qwen3_5_text": Family(_qwen35, _tables, _KEYS)}
