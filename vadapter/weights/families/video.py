"""V-JEPA 2 and VideoMAE, encoders of whole clips.

The tokens are those of the encoder's last layer: of V-JEPA 2 transformers' `last_hidden_state`,
behind a norm, without its predictor; of VideoMAE `last_hidden_state`, behind a norm if the
checkpoint has one. V-JEPA 2 takes any even number of frames, and repeats an image to one tubelet;
VideoMAE takes `num_frames`, and has no rule for images: they become clips of equal frames.

Source: configuration_*.py and modeling_*.py of transformers' vjepa2 and videomae.
"""

from vadapter.weights.families.family import (
    ACTIVATION,
    ACTIVATIONS,
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    only,
    require,
    require_heads,
)
from vadapter.weights.name_mapping import Pairs, Patches, Table
from vadapter.weights.preprocessor import IMAGENET_MEAN, IMAGENET_STD

_VJEPA2 = Table(
    layers="encoder.layer.{}.",
    prefixes=("", "vjepa2."),
    modules={
        "patches": Patches("encoder.embeddings.patch_embeddings.proj"),
        "norm": "encoder.layernorm",
        "norm_attn": "norm1",
        "attn/q": Pairs("attention.query", axes=3), "attn/k": Pairs("attention.key", axes=3),
        "attn/v": "attention.value", "attn/o": "attention.proj",
        "norm_mlp": "norm2", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
    },
    ignored=(r"^(vjepa2\.)?predictor\.", r"^(pooler|classifier)\."),
)  # fmt: skip
_VIDEOMAE = Table(
    layers="encoder.layer.{}.",
    prefixes=("", "videomae."),
    modules={
        "patches": Patches("embeddings.patch_embeddings.projection"),
        "norm": "layernorm",
        "norm_attn": "layernorm_before",
        "attn/q": "attention.attention.query", "attn/k": "attention.attention.key",
        "attn/v": "attention.attention.value", "attn/o": "attention.output.dense",
        "norm_mlp": "layernorm_after",
        "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
    },
    # behind the tokens, and the decoder of the pretraining
    ignored=(r"^(decoder|encoder_to_decoder|fc_norm|classifier)\.", r"^mask_token$"),
)  # fmt: skip
_VIDEOMAE_OLD = _VIDEOMAE | {
    "attn/q/bias": "attention.attention.q_bias", "attn/v/bias": "attention.attention.v_bias"
}  # fmt: skip


_KEYS: Keys = {
    "tubelet_size": Key(2, COUNT), "patch_size": Key(16, COUNT),
    "hidden_act": Key("gelu", ACTIVATION), "per_layer_config": Key(None, only(None)),
}  # fmt: skip
_VJEPA2_KEYS: Keys = {
    **_KEYS, "crop_size": Key(256, COUNT), "in_chans": Key(3, only(3)),
    "hidden_size": Key(1024, COUNT), "num_hidden_layers": Key(24, COUNT),
    "num_attention_heads": Key(16, COUNT), "mlp_ratio": Key(4.0, POSITIVE),
    "layer_norm_eps": Key(1e-6, NOT_NEGATIVE), "qkv_bias": Key(True, FLAG),
}  # fmt: skip
_VIDEOMAE_KEYS: Keys = {
    **_KEYS, "image_size": Key(224, COUNT), "num_channels": Key(3, only(3)),
    "num_frames": Key(16, COUNT), "hidden_size": Key(768, COUNT),
    "num_hidden_layers": Key(12, COUNT), "num_attention_heads": Key(12, COUNT),
    "intermediate_size": Key(3072, COUNT), "layer_norm_eps": Key(1e-12, NOT_NEGATIVE),
    "qv_bias": Key(True, FLAG), "use_mean_pooling": Key(True, FLAG),
}  # fmt: skip


def _video(c: Config) -> Spec:
    require_heads(c)
    return {
        "kind": "video_vit", "tubelet": c["tubelet_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"], "floor": True, "interpolation": "bilinear",
    }  # fmt: skip


def _vjepa2(c: Config) -> Spec:
    head_dim = c["hidden_size"] // c["num_attention_heads"]
    require(c, "num_attention_heads", head_dim >= 6, "three axes need a pair of a head's dims each")
    return _video(c) | {
        "image_size": c["crop_size"], "mlp_dim": int(c["hidden_size"] * c["mlp_ratio"]),
        "positions": "rope", "bias": c["qkv_bias"], "crop_pct": 224 / 256,
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
    }  # fmt: skip


def _videomae(c: Config) -> Spec:
    frames = c["num_frames"] // c["tubelet_size"] * c["tubelet_size"]
    require(c, "num_frames", frames > 0, f"less than tubelet_size={c['tubelet_size']}")
    return _video(c) | {
        "image_size": c["image_size"], "mlp_dim": c["intermediate_size"],
        "positions": "sinusoids", "frames": frames, "still": frames,
        "bias": c["qv_bias"], "key_bias": False, "final_norm": not c["use_mean_pooling"],
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "vjepa2": Family(_vjepa2, (_VJEPA2,), _VJEPA2_KEYS),
    "videomae": Family(
        _videomae, (_VIDEOMAE, _VIDEOMAE_OLD), _VIDEOMAE_KEYS, {"qkv_bias": "qv_bias"}
    ),
}
