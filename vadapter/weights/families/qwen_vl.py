"""The vision encoders of Qwen2.5-VL, Qwen3-VL and Qwen3.5, and the first two's language models.

The tokens of an encoder are those that its merger reads, row by row. It takes images of any shape;
here they are squares of 32 patches a side, or of `image_size`. Every frame of a clip is an image,
which the original repeats to fill the two frames of a patch.

The three axes of rotary positions of the language models are one in text, which is all that is read
here.

Source: configuration_*.py and modeling_*.py of transformers' qwen2_5_vl, qwen3_vl and
qwen3_5.
"""

from typing import Any

from vadapter.weights.families import llama, rotary
from vadapter.weights.families.family import (
    ACTIVATION,
    ACTIVATIONS,
    COUNT,
    GROUP,
    POSITIVE,
    WHOLE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    only,
    refuse,
    require,
    require_heads,
)
from vadapter.weights.name_mapping import Patches, Table, Tokens, fused
from vadapter.weights.preprocessor import OPENAI_MEAN, OPENAI_STD

_SIDE = 32  # patches
_FRAMES = 2  # of a patch

# -- vision ------------------------------------------------------------------------------------

_VISION2 = Table(
    layers="blocks.{}.",
    modules={
        "patches": Patches("patch_embed.proj", frames=_FRAMES),
        "norm_attn": "norm1", **fused("attn/{}", "attn.qkv"), "attn/o": "attn.proj",
        "norm_mlp": "norm2",
        "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj", "mlp/down": "mlp.down_proj",
    },
    ignored=(r"^(merger|deepstack_merger_list)\.",),
)  # fmt: skip
_VISION3 = _VISION2 | {
    "positions": Tokens("pos_embed.weight", grid=0, kernel="corners"),
    "mlp/up": "mlp.linear_fc1",
    "mlp/down": "mlp.linear_fc2",
}
_INDICES = Values(
    lambda v: isinstance(v, list | tuple) and all(type(i) is int for i in v),
    "a list of whole numbers",
)
_VISION: Keys = {
    "num_heads": Key(16, COUNT), "in_channels": Key(3, only(3)),
    "spatial_merge_size": Key(2, COUNT), "temporal_patch_size": Key(_FRAMES, only(_FRAMES)),
    "rope_parameters": Key(None, GROUP.or_null()), "rope_scaling": Key(None, GROUP.or_null()),
    "rope_theta": Key(10_000.0, POSITIVE), "head_dim": Key(None, only(None)),
    "per_layer_config": Key(None, only(None)),
}  # fmt: skip
_VISION2_KEYS: Keys = {
    **_VISION, "depth": Key(32, COUNT), "hidden_size": Key(3584, COUNT),
    "hidden_act": Key("silu", only("silu")), "intermediate_size": Key(3420, COUNT),
    "patch_size": Key(14, COUNT), "window_size": Key(112, COUNT),
    "fullatt_block_indexes": Key((7, 15, 23, 31), _INDICES),
}  # fmt: skip
_VISION3_KEYS: Keys = {
    **_VISION, "depth": Key(27, COUNT), "hidden_size": Key(1152, COUNT),
    "hidden_act": Key("gelu_pytorch_tanh", ACTIVATION), "intermediate_size": Key(4304, COUNT),
    "patch_size": Key(16, COUNT), "num_position_embeddings": Key(2304, COUNT),
}  # fmt: skip
_ALIASES = {"num_attention_heads": "num_heads", "num_hidden_layers": "depth"}


def _vision(c: Config) -> Spec:
    require_heads(c, heads="num_heads")
    head_dim = c["hidden_size"] // c["num_heads"]
    require(c, "num_heads", head_dim % 4 == 0, "rows and columns turn halves of a head's pairs")
    group = c["rope_scaling"] or c["rope_parameters"] or {}
    theta = group.get("rope_theta", c["rope_theta"])
    kind = group.get("rope_type", group.get("type", "axial"))
    if kind not in ("axial", "default") or not POSITIVE.test(theta):
        refuse("rope_parameters", group, "only axial ones with a rope_theta above 0 are read")
    return {
        "kind": "vit", "image_size": _SIDE * c["patch_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["depth"], "heads": c["num_heads"],
        "mlp_dim": c["intermediate_size"], "rope": {"theta": float(theta)}, "norm_eps": 1e-6,
        "final_norm": False, "fit": "stretch", "floor": True,
    }  # fmt: skip


def _vision2(c: Config) -> Spec:
    merged = c["window_size"] // c["spatial_merge_size"] // c["patch_size"]
    require(c, "window_size", merged > 0, "it has no tokens")
    return _vision(c) | {
        "positions": "none", "norm": "rms", "mlp": "swiglu", "patch_bias": False,
        "window": merged * c["spatial_merge_size"], "whole": tuple(c["fullatt_block_indexes"]),
        "mean": OPENAI_MEAN, "std": OPENAI_STD,
    }  # fmt: skip


def _vision3(c: Config) -> Spec:
    require(c, "num_position_embeddings", c["num_position_embeddings"] > 3, "no grid of positions")
    return _vision(c) | {"mlp": ACTIVATIONS[c["hidden_act"]]}


# -- text --------------------------------------------------------------------------------------

_TEXT2_KEYS: Keys = {
    **(llama.FAMILIES["qwen2"].keys or {}), **llama.sizes(152_064, 8192, 29_568, 80, 64),
    **rotary.keys(32_768, 1e6), "num_key_value_heads": Key(8, COUNT.or_null()),
    "rms_norm_eps": Key(1e-5, POSITIVE), "max_window_layers": Key(80, WHOLE),
    "head_dim": Key(None, only(None)),
}  # fmt: skip
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
_TEXT3_KEYS: Keys = {
    **{k: v for k, v in (llama.FAMILIES["qwen3"].keys or {}).items() if k not in _WINDOWS},
    **llama.sizes(151_936, 4096, 22_016, 32, 32), **rotary.keys(128_000, 5e5),
}  # fmt: skip


def one_axis(c: Config) -> Config:
    """Return the config of a text with rotary positions of one axis in place of several."""

    def one(group: Any) -> Any:
        if not group:
            return group
        group = {k: v for k, v in group.items() if k not in ("mrope_section", "mrope_interleaved")}
        kind = group.get("rope_type", group.get("type"))
        return {**group, "rope_type": "default"} if kind == "mrope" else group

    return {**c, **{key: one(c[key]) for key in ("rope_scaling", "rope_parameters")}}


def _text2(c: Config) -> Spec:
    return llama.FAMILIES["qwen2"].reader(one_axis(c))


def _text3(c: Config) -> Spec:
    return llama.decoder(one_axis(c)) | {"bias": c["attention_bias"], "qk_norm": True}


VISION: dict[str, Family] = {
    "qwen2_5_vl_vision": Family(_vision2, (_VISION2,), _VISION2_KEYS, _ALIASES),
    "qwen3_vl_vision": Family(_vision3, (_VISION3,), _VISION3_KEYS, _ALIASES),
    "qwen3_5_vision": Family(_vision3, (_VISION3,), _VISION3_KEYS, _ALIASES),
}
TEXT: dict[str, Family] = {
    "qwen2_5_vl_text": Family(_text2, (llama.TABLE,), _TEXT2_KEYS),
    "qwen3_vl_text": Family(_text3, (llama.TABLE,), _TEXT3_KEYS),
}
FAMILIES = VISION | TEXT
