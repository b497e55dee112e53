"""Public encoders of whole clips: from config.json to the spec of a component, and their names.

The tokens are those of the encoder's last layer: of V-JEPA 2 transformers' `last_hidden_state`,
behind a norm, without its predictor; of VideoMAE `last_hidden_state`, behind a norm if the
checkpoint has one. V-JEPA 2 takes any even number of frames, and repeats an image to one tubelet;
VideoMAE takes `num_frames`, and has no rule for images: they become clips of equal frames.
"""

from vadapter.weights.families.language import Config, Family, Spec, activation
from vadapter.weights.name_mapping import Pairs, Patches, Table, Zeros

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
        "attn/k/bias": Zeros(),
        "attn/v": "attention.attention.value", "attn/o": "attention.output.dense",
        "norm_mlp": "layernorm_after",
        "mlp/up": "intermediate.dense", "mlp/down": "output.dense",
    },
    # behind the tokens, and the decoder of the pretraining
    ignored=(r"^(decoder|encoder_to_decoder|fc_norm|classifier)\.", r"^mask_token$",
             r"position_embeddings$"),
)  # fmt: skip
_VIDEOMAE_OLD = _VIDEOMAE | {
    "attn/q/bias": "attention.attention.q_bias", "attn/v/bias": "attention.attention.v_bias"
}  # fmt: skip


def _video(c: Config) -> Spec:
    return {
        "kind": "video_vit", "tubelet": c["tubelet_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp": activation(c["hidden_act"]),
        "norm_eps": c["layer_norm_eps"], "floor": True, "interpolation": "bilinear",
    }  # fmt: skip


def _vjepa2(c: Config) -> Spec:
    c = {"patch_size": 16, "crop_size": 256, "tubelet_size": 2, "hidden_size": 1024,
         "num_attention_heads": 16, "num_hidden_layers": 24, "mlp_ratio": 4.0,
         "layer_norm_eps": 1e-6, "qkv_bias": True, "hidden_act": "gelu", **c}  # fmt: skip
    return _video(c) | {
        "image_size": c["crop_size"], "mlp_dim": int(c["hidden_size"] * c["mlp_ratio"]),
        "positions": "rope", "bias": c["qkv_bias"], "crop_pct": 224 / 256,
        "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
    }  # fmt: skip


def _videomae(c: Config) -> Spec:
    c = {"image_size": 224, "patch_size": 16, "num_frames": 16, "tubelet_size": 2,
         "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
         "intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-12,
         "qv_bias": True, "use_mean_pooling": True, **c}  # fmt: skip
    c["qv_bias"] = c.get("qkv_bias", c["qv_bias"])
    frames = c["num_frames"] // c["tubelet_size"] * c["tubelet_size"]
    return _video(c) | {
        "image_size": c["image_size"], "mlp_dim": c["intermediate_size"],
        "positions": "sinusoids", "frames": frames, "still": frames,
        "bias": c["qv_bias"], "final_norm": not c["use_mean_pooling"],
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "vjepa2": Family(_vjepa2, (_VJEPA2,)),
    "videomae": Family(_videomae, (_VIDEOMAE, _VIDEOMAE_OLD)),
}
