"""The vision towers of CLIP, MetaCLIP 2 and SigLIP.

The tokens are those of transformers' `last_hidden_state`, without the class token; that of CLIP has
no norm after its last layer, that of SigLIP has one.

A NaFlex SigLIP 2 takes images of any shape; here it takes squares, at the grid of its positions.

Source: configuration_*.py and modeling_*.py of transformers' clip, metaclip_2, siglip and siglip2.
"""

import dataclasses
import math

from vadapter.weights.families.family import (
    ACTIVATION,
    ACTIVATIONS,
    COUNT,
    NOT_NEGATIVE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    only,
    require,
    require_heads,
)
from vadapter.weights.name_mapping import Patches, Table, Tokens
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
# Patches are linear layers, and positions are resampled in another way.
_NAFLEX = _SIGLIP | {
    "patches": "embeddings.patch_embedding",
    "positions": Tokens("embeddings.position_embedding.weight", grid=0, kernel="linear"),
}


def size_keys(image: int, patch: int, width: int = 768, depth: int = 12, heads: int = 12) -> Keys:
    """Return the keys of the sizes of any ViT, with these defaults."""
    return {
        "hidden_size": Key(width, COUNT), "num_hidden_layers": Key(depth, COUNT),
        "num_attention_heads": Key(heads, COUNT), "num_channels": Key(3, only(3)),
        "image_size": Key(image, COUNT), "patch_size": Key(patch, COUNT),
        "per_layer_config": Key(None, only(None)),
    }  # fmt: skip


def vit_keys(image: int, patch: int, act: str, eps: float) -> Keys:
    """Return the keys of any ViT, with the sizes of a ViT-B and these defaults."""
    own = {"hidden_act": Key(act, ACTIVATION), "layer_norm_eps": Key(eps, NOT_NEGATIVE)}
    return size_keys(image, patch) | own


_MLP: Keys = {"intermediate_size": Key(3072, COUNT)}
_CLIP_KEYS = vit_keys(224, 32, "quick_gelu", 1e-5) | _MLP
_SIGLIP_KEYS = vit_keys(224, 16, "gelu_pytorch_tanh", 1e-6) | _MLP
_NAFLEX_KEYS: Keys = {**_SIGLIP_KEYS, "num_patches": Key(256, COUNT)}


def vit_sizes(c: Config) -> Spec:
    """Return the sizes of a ViT of transformers, which all of them name alike."""
    require_heads(c)
    return {
        "kind": "vit", "image_size": c["image_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "patches_only": True, "floor": True,
    }  # fmt: skip


def vit(c: Config) -> Spec:
    """Return these sizes, the activation and what is added to variances."""
    return vit_sizes(c) | {"mlp": ACTIVATIONS[c["hidden_act"]], "norm_eps": c["layer_norm_eps"]}


def _clip(c: Config) -> Spec:
    return vit(c) | {
        "mean": OPENAI_MEAN, "std": OPENAI_STD, "mlp_dim": c["intermediate_size"],
        "class_token": True, "patch_bias": False, "pre_norm": True, "final_norm": False,
    }  # fmt: skip


def _siglip(c: Config) -> Spec:
    return vit(c) | {"mlp_dim": c["intermediate_size"], "fit": "stretch"}


def _naflex(c: Config) -> Spec:
    """Return a SigLIP 2 for images of any shape (NaFlex) at the grid of its positions, a square."""
    side = math.isqrt(c["num_patches"])
    require(c, "num_patches", side**2 == c["num_patches"], "it is not the square of a number")
    spec = vit({**c, "image_size": side * c["patch_size"]})
    return spec | {
        "mlp_dim": c["intermediate_size"], "fit": "stretch", "interpolation": "bilinear",
    }  # fmt: skip


def _siglip_or_naflex(config: Config) -> str:
    """Return the model_type of a config.json: some NaFlex SigLIP 2 name that of a SigLIP."""
    naflex = config.get("num_patches") is not None
    return "siglip2_vision_model" if naflex else "siglip_vision_model"


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(_clip, (_CLIP,), _CLIP_KEYS),
    "metaclip_2_vision_model": Family(_clip, (_CLIP,), _CLIP_KEYS),
    "siglip_vision_model": Family(_siglip, (_SIGLIP,), _SIGLIP_KEYS, variant=_siglip_or_naflex),
    "siglip2_vision_model": Family(_naflex, (_NAFLEX,), _NAFLEX_KEYS),
}
