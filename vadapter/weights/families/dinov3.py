"""DINOv3's ViTs: rotary positions of the grid, registers, layer scale, plain or gated feed-forward.

The tokens are those of transformers' `last_hidden_state`, behind the norm after the last layer,
without class token and registers.

Source: configuration_dinov3_vit.py and modeling_dinov3_vit.py of transformers.
"""

import dataclasses

from vadapter.weights.families.clip import size_keys, vit_sizes
from vadapter.weights.families.family import (
    ACTIVATIONS,
    COUNT,
    FLAG,
    GATED,
    NOT_NEGATIVE,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    one_of,
    require,
)
from vadapter.weights.name_mapping import Patches, Table, Tokens
from vadapter.weights.preprocessor import IMAGENET_MEAN, IMAGENET_STD

_TABLE = Table(
    layers="layer.{}.",
    modules={
        "patches": Patches("embeddings.patch_embeddings"),
        "class_token": Tokens("embeddings.cls_token"),
        "registers": Tokens("embeddings.register_tokens"),
        "norm": "norm",
        "norm_attn": "norm1",
        **{f"attn/{x}": f"attention.{x}_proj" for x in "qkvo"},
        "scale_attn_out": "layer_scale1.lambda1",
        "norm_mlp": "norm2", **{f"mlp/{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
        "scale_mlp_out": "layer_scale2.lambda1",
    },
    ignored=(r"mask_token$",),
    optional={"registers": r"register_tokens$"},  # of none
)  # fmt: skip
_SAVED = dataclasses.replace(_TABLE, layers="model.layer.{}.")  # in newer releases

_KEYS: Keys = size_keys(224, 16, width=384, heads=6) | {
    "intermediate_size": Key(1536, COUNT), "hidden_act": Key("gelu", one_of(ACTIVATIONS | GATED)),
    "layer_norm_eps": Key(1e-5, NOT_NEGATIVE), "rope_theta": Key(100.0, POSITIVE),
    "num_register_tokens": Key(0, Values(lambda v: v == 0 or COUNT.test(v), "a whole number")),
    "query_bias": Key(True, FLAG), "key_bias": Key(False, FLAG), "value_bias": Key(True, FLAG),
    "proj_bias": Key(True, FLAG), "mlp_bias": Key(True, FLAG), "use_gated_mlp": Key(False, FLAG),
}  # fmt: skip


def _dino(c: Config) -> Spec:
    bias, names = c["query_bias"], GATED if c["use_gated_mlp"] else ACTIVATIONS
    kinds = "with a gate" if c["use_gated_mlp"] else "without a gate"
    require(c, "hidden_act", c["hidden_act"] in names, f"{kinds} only {', '.join(names)} are read")
    require(c, "value_bias", c["value_bias"] == bias, f"only query_bias={bias} beside it is read")
    require(c, "key_bias", bias or not c["key_bias"], "it needs query_bias and value_bias")
    return vit_sizes(c) | {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "fit": "stretch", "interpolation": "bilinear",
        "class_token": True, "registers": c["num_register_tokens"], "layer_scale": True,
        "positions": "none", "rope": {"theta": c["rope_theta"], "coordinates": "center"},
        "qkv_bias": bias, "key_bias": c["key_bias"], "bias": c["proj_bias"],
        "mlp": names[c["hidden_act"]], "mlp_dim": c["intermediate_size"],
        "mlp_bias": c["mlp_bias"], "norm_eps": c["layer_norm_eps"],
    }  # fmt: skip


FAMILIES: dict[str, Family] = {"dinov3_vit": Family(_dino, (_TABLE, _SAVED), _KEYS)}
