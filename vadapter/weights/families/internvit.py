"""InternViT: a ViT with layer scale, LayerNorms (300M) or RMS norms (6B), and no norm at its end.

The tokens are those of `last_hidden_state`, without the class token.

Source: configuration_internvl.py and modeling_internvl.py of transformers for "internvl_vision";
for "intern_vit_6b", the model_type of all sizes, the code that is published with
OpenGVLab/InternViT-300M-448px.
"""

from vadapter.weights.families.clip import vit, vit_keys
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    SIDE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    one_of,
    only,
    require,
    side,
)
from vadapter.weights.name_mapping import Patches, Table, Tokens, fused
from vadapter.weights.preprocessor import IMAGENET_MEAN, IMAGENET_STD

_TABLE = Table(
    layers="encoder.layer.{}.",
    prefixes=("", "vision_tower.", "model.vision_tower."),
    modules={
        "patches": Patches("embeddings.patch_embeddings.projection"),
        "class_token": Tokens("embeddings.cls_token"),
        "positions": Tokens("embeddings.position_embeddings", grid=1),
        "norm": "layernorm",
        "norm_attn": "layernorm_before",
        **{f"attn/{x}": f"attention.{x}_proj" for x in "qkv"},
        "attn/o": "attention.projection_layer",
        "attn/norm_q": "attention.q_norm", "attn/norm_k": "attention.k_norm",
        "scale_attn_out": "lambda_1",
        "norm_mlp": "layernorm_after", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
        "scale_mlp_out": "lambda_2",
    },
    ignored=(r"mask_token$",),
)  # fmt: skip
_PUBLISHED = Table(
    layers="encoder.layers.{}.",
    prefixes=("", "vision_model."),
    modules={
        "patches": Patches("embeddings.patch_embedding"),
        "class_token": Tokens("embeddings.class_embedding"),
        "positions": Tokens("embeddings.position_embedding", grid=1),
        "norm_attn": "norm1", **fused("attn/{}", "attn.qkv"), "attn/o": "attn.proj",
        "attn/norm_q": "attn.q_norm", "attn/norm_k": "attn.k_norm", "scale_attn_out": "ls1",
        "norm_mlp": "norm2", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2", "scale_mlp_out": "ls2",
    },
)  # fmt: skip
_NORMS = {"layer_norm": "layer", "rms_norm": "rms"}

_KEYS: Keys = vit_keys(448, 14, "gelu", 1e-6) | {
    "hidden_size": Key(1024, COUNT), "intermediate_size": Key(4096, COUNT),
    "num_hidden_layers": Key(24, COUNT), "num_attention_heads": Key(16, COUNT),
    "image_size": Key((448, 448), SIDE), "patch_size": Key((14, 14), SIDE),
    "attention_bias": Key(False, FLAG), "use_qk_norm": Key(False, FLAG),
    "norm_type": Key("layer_norm", one_of(_NORMS)), "use_mean_pooling": Key(True, FLAG),
    "use_absolute_position_embeddings": Key(True, only(True)),
}  # fmt: skip
_PUBLISHED_KEYS: Keys = vit_keys(224, 14, "gelu", 1e-6) | {
    "hidden_size": Key(3200, COUNT), "intermediate_size": Key(12_800, COUNT),
    "num_hidden_layers": Key(48, COUNT), "num_attention_heads": Key(25, COUNT),
    "qkv_bias": Key(False, FLAG), "qk_normalization": Key(True, FLAG),
    "norm_type": Key("rms_norm", one_of(_NORMS)),
}  # fmt: skip


def _intern(c: Config) -> Spec:
    norm = _NORMS[c["norm_type"]]
    # Queries and keys have RMS norms always; here all norms are of one kind and epsilon.
    one_kind = norm == "rms" and c["layer_norm_eps"] == 1e-6
    only_so = "it is read with norm_type='rms_norm' and layer_norm_eps=1e-6 alone"
    require(c, "use_qk_norm", one_kind or not c["use_qk_norm"], only_so)
    require(c, "use_mean_pooling", c["use_mean_pooling"] or norm == "layer",
            "it is read with norm_type='layer_norm' alone")  # fmt: skip
    sides = {key: side(c[key]) for key in ("image_size", "patch_size")}
    return _spec({**c, **sides}, norm, c["attention_bias"], c["use_qk_norm"]) | {
        "final_norm": not c["use_mean_pooling"],
    }  # fmt: skip


def _published(c: Config) -> Spec:
    norm = _NORMS[c["norm_type"]]
    require(c, "qk_normalization", norm == "rms" or not c["qk_normalization"],
            "it is read with norm_type='rms_norm' alone")  # fmt: skip
    return _spec(c, norm, c["qkv_bias"], c["qk_normalization"]) | {"final_norm": False}


def _spec(c: Config, norm: str, qkv_bias: bool, qk_norm: bool) -> Spec:
    return vit(c) | {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "mlp_dim": c["intermediate_size"],
        "class_token": True, "layer_scale": True, "norm": norm, "qkv_bias": qkv_bias,
        "qk_norm": qk_norm, "qk_norm_over": "heads",
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "internvl_vision": Family(_intern, (_TABLE,), _KEYS),
    "intern_vit_6b": Family(_published, (_PUBLISHED,), _PUBLISHED_KEYS),
}
