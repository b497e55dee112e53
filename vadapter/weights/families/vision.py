"""Public vision encoders: from config.json to the spec of a component, and their tensor names.

The tokens are those of transformers' `last_hidden_state`, without class token and registers; that
of CLIP has no norm after its last layer, those of SigLIP and DINOv2 have one.
"""

import dataclasses

from vadapter.errors import CheckpointError
from vadapter.weights.families.language import Config, Family, Spec, activation
from vadapter.weights.name_mapping import Part, Patches, Table, Tokens
from vadapter.weights.preprocessor import OPENAI_MEAN, OPENAI_STD

_CLIP = Table(
    layers="encoder.layers.{}.",
    prefixes=("vision_model.", ""),
    modules={
        "patches": Patches("embeddings.patch_embedding"),
        "class_token": Tokens("embeddings.class_embedding"),
        "positions": Tokens("embeddings.position_embedding.weight", grid=1),
        "pre_norm": "pre_layrnorm", "norm": "post_layernorm",
        "norm_attn": "layer_norm1",
        **{f"attn/{x}": f"self_attn.{x}_proj" for x in "qkv"}, "attn/o": "self_attn.out_proj",
        "norm_mlp": "layer_norm2", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
    },
    ignored=(r"^text_model\.", r"^logit_(scale|bias)$", r"^(visual|text)_projection\.",
             r"position_ids$"),
)  # fmt: skip
_SIGLIP = dataclasses.replace(
    _CLIP | {"positions": Tokens("embeddings.position_embedding.weight", grid=0)},
    ignored=(*_CLIP.ignored, r"^(vision_model\.)?head\."),  # which pools
)
_DINO = Table(
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
_DINO_NEW = _DINO | {f"attn/{x}": f"attention.{x}_proj" for x in "qkvo"}
_GATED = {"mlp/up": Part("mlp.weights_in", 1, 2), "mlp/down": "mlp.weights_out"}

_CLIP_PIXELS = {"mean": OPENAI_MEAN, "std": OPENAI_STD}
_IMAGENET_PIXELS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
         "num_attention_heads": 12, "image_size": 224}  # fmt: skip


def _vit(c: Config) -> Spec:
    if c.get("num_channels", 3) != 3:
        raise CheckpointError(f"config.json: num_channels={c['num_channels']}: only 3 are read")
    return {
        "kind": "vit", "image_size": c["image_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp": activation(c["hidden_act"]),
        "norm_eps": c["layer_norm_eps"], "patches_only": True, "floor": True,
    }  # fmt: skip


def _clip(c: Config) -> Spec:
    c = {**_BASE, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **c}
    return _vit(c) | _CLIP_PIXELS | {
        "mlp_dim": c["intermediate_size"], "class_token": True, "patch_bias": False,
        "pre_norm": True, "final_norm": False,
    }  # fmt: skip


def _siglip(c: Config) -> Spec:
    if "num_patches" in c:
        _naflex(c)
    c = {**_BASE, "patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, **c}
    return _vit(c) | {"mlp_dim": c["intermediate_size"], "fit": "stretch"}


def _naflex(c: Config) -> Spec:
    raise CheckpointError(
        "config.json: a SigLIP 2 of images of any shape (NaFlex), which are not read; take a "
        "variant of fixed resolution, as google/siglip2-base-patch16-224 or -384: their model_type "
        "is 'siglip'"
    )


def _dino(c: Config) -> Spec:
    c = {**_BASE, "patch_size": 14, "image_size": 518, "hidden_act": "gelu", "mlp_ratio": 4,
         "layer_norm_eps": 1e-6, **c}  # fmt: skip
    mlp_dim = int(c["hidden_size"] * c["mlp_ratio"])
    spec = _vit(c) | _IMAGENET_PIXELS
    spec |= {"class_token": True, "layer_scale": True, "mlp_dim": mlp_dim}
    if c.get("use_swiglu_ffn"):
        spec |= {"mlp": "swiglu", "mlp_dim": (int(mlp_dim * 2 / 3) + 7) // 8 * 8}
    return spec


def _dino_registers(c: Config) -> Spec:
    return _dino(c) | {"registers": c.get("num_register_tokens", 4)}


_REGISTERS = {"positions": Tokens("embeddings.position_embeddings", grid=1, antialias=True)}
_DINOS = (_DINO, _DINO_NEW, _DINO | _GATED, _DINO_NEW | _GATED)
FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(_clip, (_CLIP,)),
    "metaclip_2_vision_model": Family(_clip, (_CLIP,)),
    "siglip_vision_model": Family(_siglip, (_SIGLIP,)),
    "siglip2_vision_model": Family(_naflex, ()),
    "dinov2": Family(_dino, _DINOS),
    "dinov2_with_registers": Family(_dino_registers, tuple(t | _REGISTERS for t in _DINOS)),
}
