"""Gemma 4 (text), dense: heads of layers without a window are others than those with one.

Models with embeddings for every layer (E2B, E4B), keys of other layers or experts are refused.

Source: configuration_*.py and modeling_*.py of transformers' gemma4 and gemma4_unified.
"""

from typing import Any

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GATED_ACTIVATION,
    GROUP,
    LANGUAGE_MODEL,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    only,
    read,
    refuse,
    require,
)
from vadapter.weights.name_mapping import Table

_FAR = "full_attention"
_DEFAULT_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    _FAR: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
_PROPORTIONAL: Keys = {
    "rope_theta": Key(1e4, POSITIVE), "partial_rotary_factor": Key(1.0, rotary.SHARE),
    "factor": Key(1.0, POSITIVE),
}  # fmt: skip
# Positions are in the groups alone.
_BESIDE = {"rope_parameters": None, "rope_scaling": None, "rope_theta": 1e4,
           "partial_rotary_factor": None, "original_max_position_embeddings": None}  # fmt: skip
_NO_EMBEDDINGS = Values(lambda v: v == 0 and type(v) is int, "0 (no embeddings for every layer)")
_UNIFIED: Keys = {
    **LANGUAGE_MODEL, **llama.sizes(262_144, 2304, 9216, 30, 8),
    "num_key_value_heads": Key(4, COUNT), "head_dim": Key(256, COUNT),
    "hidden_activation": Key("gelu_pytorch_tanh", GATED_ACTIVATION),
    "rms_norm_eps": Key(1e-6, POSITIVE), "tie_word_embeddings": Key(True, FLAG),
    "attention_bias": Key(False, FLAG), "max_position_embeddings": Key(262_144, COUNT),
    "rope_parameters": Key(None, GROUP.or_null()),
    "sliding_window": Key(1024, COUNT), "layer_types": llama.LAYER_TYPES,
    "final_logit_softcapping": Key(None, POSITIVE.or_null()),
    # Of images alone, if at all: a text is causal.
    "use_bidirectional_attention": Key(None, only(None, "vision")),
    "attention_k_eq_v": Key(False, FLAG), "num_kv_shared_layers": Key(0, only(0)),
    "global_head_dim": Key(512, COUNT),
    "num_global_key_value_heads": Key(None, COUNT.or_null()),
    "per_layer_config": Key(None, GROUP.or_null()),
}  # fmt: skip
_KEYS: Keys = {
    **_UNIFIED, "max_position_embeddings": Key(131_072, COUNT), "sliding_window": Key(512, COUNT),
    "hidden_size_per_layer_input": Key(256, _NO_EMBEDDINGS),
    "enable_moe_block": Key(False, only(False)),
}  # fmt: skip


def _gemma4(c: Config) -> Spec:
    depth, heads = c["num_hidden_layers"], c["num_attention_heads"]
    kinds = c["layer_types"]
    if kinds is None:
        kinds = [_FAR if (i + 1) % 6 == 0 else "sliding_attention" for i in range(depth)]
    require(c, "layer_types", len(kinds) == depth, f"it needs one entry for each of {depth} layers")
    kinds = [*kinds[:-1], _FAR]  # as the original does
    shape = {"head_dim": c["head_dim"], "kv_heads": c["num_key_value_heads"]}
    far = _far(c, kinds, shape)
    for count in (shape["kv_heads"], far["kv_heads"]):
        require(c, "num_attention_heads", heads % count == 0, f"{count} heads of keys")
    groups = c["rope_parameters"] or _DEFAULT_ROPE
    ropes = [_rope(c, groups, kind, size["head_dim"])
             for kind, size in ((_FAR, far), ("sliding_attention", shape))]  # fmt: skip
    window = c["sliding_window"]
    windows = llama.repeated([0 if kind == _FAR else window for kind in kinds])
    plain = llama.decoder({**c, **_BESIDE, "hidden_act": c["hidden_activation"]})
    return plain | {
        "rope": ropes[0], "rope_local": ropes[1], "windows": windows, "embed_scale": True,
        "bias": c["attention_bias"], "qk_norm": True, "value_norm": True, "post_norms": True,
        "attn_scale": 1.0, "block_scale": True,
        "final_softcap": c["final_logit_softcapping"] or 0.0,
        "far": far | {"shared_values": c["attention_k_eq_v"]},
    }  # fmt: skip


def _far(c: Config, kinds: list[str], shape: dict[str, int]) -> dict[str, int]:
    """Return head dim and KV heads of layers without a window.

    They are in two keys, or in a group for every layer, which wins.
    """
    if (groups := c["per_layer_config"]) is None:
        kv_heads = c["num_global_key_value_heads"] if c["attention_k_eq_v"] else None
        return {"head_dim": c["global_head_dim"], "kv_heads": kv_heads or shape["kv_heads"]}
    names = {"head_dim": "head_dim", "num_key_value_heads": "kv_heads"}
    of_kind: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        group = groups.get(str(i), {})
        known = isinstance(group, dict) and all(
            k in names and COUNT.test(v) for k, v in group.items()
        )
        if not known:
            refuse(f"per_layer_config.{i}", group, f"only {' and '.join(names)} are read")
        own = shape | {names[k]: v for k, v in group.items()}
        expected = shape if kind != _FAR else of_kind.setdefault(kind, own)
        if own != expected:
            refuse(f"per_layer_config.{i}", group, f"it differs from other layers of {kind}")
    if unknown := [key for key in groups if key not in map(str, range(len(kinds)))]:
        refuse(f"per_layer_config.{unknown[0]}", groups[unknown[0]], "there is no such layer")
    return of_kind[_FAR]


def _rope(c: Config, groups: Config, kind: str, head_dim: int) -> Spec:
    group: Any = groups.get(kind)
    if not GROUP.test(group):
        refuse(f"rope_parameters.{kind}", group, "it has a group for each kind of layer")
    if group.get("rope_type") == "proportional":
        g = read(group, _PROPORTIONAL)
        require(c, "head_dim", head_dim % 2 == 0, "rotary positions need an even one")
        return {
            "scaling": "proportional", "theta": float(g["rope_theta"]),
            "part": float(g["partial_rotary_factor"]), "factor": float(g["factor"]),
        }  # fmt: skip
    return rotary.group_spec({**c, **_BESIDE}, group, head_dim)


_TABLE = llama.TABLE | {
    "norm_attn_out": "post_attention_layernorm", "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm", "block_scale": "layer_scalar",
}  # fmt: skip


def _tables(spec: Spec) -> tuple[Table, ...]:
    return llama.tables(_TABLE.periodic(len(spec["windows"])))


FAMILIES: dict[str, Family] = {
    "gemma4_text": Family(_gemma4, _tables, _KEYS),
    "gemma4_unified_text": Family(_gemma4, _tables, _UNIFIED),
}
