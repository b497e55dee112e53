"""DINOv2, with and without registers.

The tokens are those of transformers' `last_hidden_state`, behind the norm after the last layer,
without class token and registers.

Source: configuration_*.py and modeling_*.py of transformers' dinov2 and dinov2_with_registers.
"""

from vadapter.weights.families.clip import vit, vit_keys
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    only,
    require,
)
from vadapter.weights.name_mapping import Part, Patches, Table, Tokens
from vadapter.weights.preprocessor import IMAGENET_MEAN, IMAGENET_STD

_TABLE = Table(
    layers="encoder.layer.{}.",
    prefixes=("", "dinov2.", "dinov2_with_registers."),
    modules={
        "patches": Patches("embeddings.patch_embeddings.projection"),
        "class_token": Tokens("embeddings.cls_token"),
        "registers": Tokens("embeddings.register_tokens"),
        "positions": Tokens("embeddings.position_embeddings", grid=1),
        "norm": "layernorm",
        "norm_attn": "norm1",
        **{f"attn/{name[0]}": f"attention.attention.{name}" for name in ("query", "key", "value")},
        "attn/o": "attention.output.dense", "scale_attn_out": "layer_scale1.lambda1",
        "norm_mlp": "norm2", "mlp/gate": Part("mlp.weights_in", 0, 2),
        "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2", "scale_mlp_out": "layer_scale2.lambda1",
    },
    ignored=(r"mask_token$", r"^classifier\."),
)  # fmt: skip
# The names of newer releases of the library, and of the largest model's gated feed-forward.
_NEW = _TABLE | {f"attn/{x}": f"attention.{x}_proj" for x in "qkvo"}
_GATED = {"mlp/up": Part("mlp.weights_in", 1, 2), "mlp/down": "mlp.weights_out"}
_TABLES = (_TABLE, _NEW, _TABLE | _GATED, _NEW | _GATED)
_REGISTERS = {"positions": Tokens("embeddings.position_embeddings", grid=1, antialias=True)}

_KEYS: Keys = vit_keys(224, 14, "gelu", 1e-6) | {
    "mlp_ratio": Key(4, POSITIVE), "use_swiglu_ffn": Key(False, FLAG),
    "qkv_bias": Key(True, only(True)), "head_dim": Key(None, COUNT.or_null()),
}  # fmt: skip
_REGISTER_KEYS: Keys = {
    **_KEYS, "patch_size": Key(16, COUNT), "num_register_tokens": Key(4, COUNT),
}  # fmt: skip


def _dino(c: Config) -> Spec:
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    require(c, "head_dim", c["head_dim"] in (None, head_dim), f"it is {head_dim} by the sizes")
    mlp_dim = int(c["hidden_size"] * c["mlp_ratio"])
    spec = vit(c) | {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "class_token": True, "layer_scale": True,
        "mlp_dim": mlp_dim,
    }  # fmt: skip
    if c["use_swiglu_ffn"]:
        spec |= {"mlp": "swiglu", "mlp_dim": (int(mlp_dim * 2 / 3) + 7) // 8 * 8}
    return spec


def _dino_registers(c: Config) -> Spec:
    return _dino(c) | {"registers": c["num_register_tokens"]}


FAMILIES: dict[str, Family] = {
    "dinov2": Family(_dino, _TABLES, _KEYS),
    "dinov2_with_registers": Family(
        _dino_registers, tuple(table | _REGISTERS for table in _TABLES), _REGISTER_KEYS
    ),
}
