"""AIMv2: a ViT without biases, with RMS norms, one of them on patches, and a gated feed-forward.

The tokens are those of transformers' `last_hidden_state`, behind the norm after the last layer.

Source: configuration_aimv2.py and modeling_aimv2.py of transformers; for "aimv2" without a
`vision_config`, of the code that is published with apple/aimv2-large-patch14-224.
"""

from vadapter.weights.families.clip import size_keys, vit_sizes
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GATED,
    GATED_ACTIVATION,
    NOT_NEGATIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
)
from vadapter.weights.name_mapping import Patches, Table, Tokens, fused
from vadapter.weights.preprocessor import OPENAI_MEAN, OPENAI_STD

_TABLE = Table(
    layers="encoder.layers.{}.",
    prefixes=("", "vision_model."),
    modules={
        "patches": Patches("embeddings.patch_embed"), "patch_norm": "embeddings.rms_norm",
        "positions": Tokens("embeddings.position_embedding.weight", grid=0, antialias=True),
        "norm": "rms_norm",
        "norm_attn": "rms_norm1",
        **{f"attn/{x}": f"attention.{x}_proj" for x in "qkv"}, "attn/o": "attention.out_proj",
        "norm_mlp": "rms_norm2", **{f"mlp/{x}": f"ffn.{x}_proj" for x in ("gate", "up", "down")},
    },
    ignored=(r"^(vision_model\.)?head\.", r"^text_model\.", r"^(visual|text)_projection\.",
             r"^logit_(scale|bias)$", r"position_ids$"),
)  # fmt: skip
_APPLE = Table(
    layers="trunk.blocks.{}.",
    modules={
        "patches": Patches("preprocessor.patchifier.proj"),
        "patch_norm": "preprocessor.patchifier.norm",
        "positions": Tokens("preprocessor.pos_embed", grid=0, antialias=True),
        "norm": "trunk.post_trunk_norm",
        "norm_attn": "norm_1", **fused("attn/{}", "attn.qkv"), "attn/o": "attn.proj",
        "norm_mlp": "norm_2", "mlp/gate": "mlp.fc1", "mlp/up": "mlp.fc3", "mlp/down": "mlp.fc2",
    },
)  # fmt: skip

_COMMON: Keys = size_keys(224, 14, width=1024, depth=24, heads=8) | {
    "intermediate_size": Key(2816, COUNT), "rms_norm_eps": Key(1e-5, NOT_NEGATIVE),
    "qkv_bias": Key(False, FLAG),
}  # fmt: skip
_KEYS: Keys = _COMMON | {
    "hidden_act": Key("silu", GATED_ACTIVATION), "mlp_bias": Key(False, FLAG),
    "is_native": Key(False, FLAG),
}  # fmt: skip
_APPLE_KEYS: Keys = _COMMON | {"use_bias": Key(False, FLAG)}


def _aim(c: Config) -> Spec:
    return vit_sizes(c) | {
        "mean": OPENAI_MEAN, "std": OPENAI_STD, "norm": "rms", "norm_eps": c["rms_norm_eps"],
        "patch_norm": True, "positions": "waves" if c["is_native"] else "trained",
        "bias": c["qkv_bias"], "mlp_bias": c["mlp_bias"],
        "mlp": GATED[c["hidden_act"]], "mlp_dim": c["intermediate_size"],
    }  # fmt: skip


def _apple(c: Config) -> Spec:
    own = {"hidden_act": "silu", "is_native": False, "mlp_bias": c["use_bias"]}
    return _aim({**c, **own}) | {"bias": c["use_bias"], "qkv_bias": c["qkv_bias"]}


FAMILIES: dict[str, Family] = {
    "aimv2_vision_model": Family(_aim, (_TABLE,), _KEYS),
    "aimv2": Family(_apple, (_APPLE,), _APPLE_KEYS),
}
