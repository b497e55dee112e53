"""The vision towers of CLIP, MetaCLIP 2 and SigLIP.

The tokens are those of transformers' `last_hidden_state`, without the class token; that of CLIP has
no norm after its last layer, that of SigLIP has one.

Source: configuration_*.py and modeling_*.py of transformers' clip, metaclip_2 and siglip.
"""

import dataclasses

from vadapter.errors import CheckpointError
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


def vit_keys(image: int, patch: int, act: str, eps: float) -> Keys:
    """Return the keys of any ViT, with the width and depth of a ViT-B and these defaults."""
    return {
        "hidden_size": Key(768, COUNT), "num_hidden_layers": Key(12, COUNT),
        "num_attention_heads": Key(12, COUNT), "num_channels": Key(3, only(3)),
        "image_size": Key(image, COUNT), "patch_size": Key(patch, COUNT),
        "hidden_act": Key(act, ACTIVATION), "layer_norm_eps": Key(eps, NOT_NEGATIVE),
        "per_layer_config": Key(None, only(None)),
    }  # fmt: skip


_MLP: Keys = {"intermediate_size": Key(3072, COUNT)}
_CLIP_KEYS = vit_keys(224, 32, "quick_gelu", 1e-5) | _MLP
_SIGLIP_KEYS = (
    vit_keys(224, 16, "gelu_pytorch_tanh", 1e-6)
    | _MLP
    | {
        "num_patches": Key(None, COUNT.or_null()),  # see `_naflex`
    }
)


def vit(c: Config) -> Spec:
    """Return what the ViTs of transformers share."""
    require_heads(c)
    return {
        "kind": "vit", "image_size": c["image_size"], "patch": c["patch_size"],
        "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"], "patches_only": True, "floor": True,
    }  # fmt: skip


def _clip(c: Config) -> Spec:
    return vit(c) | {
        "mean": OPENAI_MEAN, "std": OPENAI_STD, "mlp_dim": c["intermediate_size"],
        "class_token": True, "patch_bias": False, "pre_norm": True, "final_norm": False,
    }  # fmt: skip


def _siglip(c: Config) -> Spec:
    if c["num_patches"] is not None:
        _naflex(c)
    return vit(c) | {"mlp_dim": c["intermediate_size"], "fit": "stretch"}


def _naflex(c: Config) -> Spec:
    del c
    raise CheckpointError(
        "config.json: a SigLIP 2 of images of any shape (NaFlex), which are not read; take a "
        "variant of fixed resolution, as google/siglip2-base-patch16-224 or -384: their model_type "
        "is 'siglip'"
    )


FAMILIES: dict[str, Family] = {
    "clip_vision_model": Family(_clip, (_CLIP,), _CLIP_KEYS),
    "metaclip_2_vision_model": Family(_clip, (_CLIP,), _CLIP_KEYS),
    "siglip_vision_model": Family(_siglip, (_SIGLIP,), _SIGLIP_KEYS),
    "siglip2_vision_model": Family(_naflex, (), {}),
}
