"""Image towers of open_clip: from open_clip_config.json to a spec, and their tensor names.

The tokens are those of the last layer, without a norm and without the class token; with
tap="queries" those of CoCa's captioning decoder, see `vit.ViTConfig`.

A tower of timm is read as timm's own folders are, see `families.timm`.

Source: `VisionTransformer` of open_clip's transformer.py, `CLIPVisionCfg` of its model.py and
`TimmModel` of its timm_model.py.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError
from vadapter.weights.families import timm
from vadapter.weights.families.family import Config, Family, Spec
from vadapter.weights.name_mapping import Part, Patches, Table, Tokens, fused
from vadapter.weights.safetensors import TensorFiles

CONFIG = "open_clip_config.json"
_WEIGHTS = "open_clip_model.safetensors"
_EPS = 1e-5  # of torch's LayerNorm
_POOLER = "visual.attn_pool.attn."


def _projections(ours: str, theirs: str) -> dict[str, Part]:
    """Return queries, keys and values of torch's MultiheadAttention, which are one tensor."""
    kernels = fused(f"{ours}/{{}}/kernel", f"{theirs}in_proj_weight")
    return kernels | fused(f"{ours}/{{}}/bias", f"{theirs}in_proj_bias")


_SAME_WIDTH = Table(  # pooler and layers of one width: the pooler's projections are one tensor, too
    layers="visual.transformer.resblocks.{}.",
    modules={
        "patches": Patches("visual.conv1"),
        "class_token": Tokens("visual.class_embedding"),
        "positions": Tokens("visual.positional_embedding", grid=1, antialias=True),
        "pre_norm": "visual.ln_pre", "norm": "visual.ln_post",
        "norm_attn": "ln_1", **_projections("attn", "attn."), "attn/o": "attn.out_proj",
        "scale_attn_out": "ls_1.gamma",
        "norm_mlp": "ln_2", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj",
        "scale_mlp_out": "ls_2.gamma",
        "pooler/queries": Tokens("visual.attn_pool.query"),
        "pooler/norm_queries": "visual.attn_pool.ln_q",
        "pooler/norm_visual": "visual.attn_pool.ln_k",
        **_projections("pooler/attn", _POOLER),
        "pooler/attn/o": f"{_POOLER}out_proj",
        "pooler/norm": "visual.ln_post",
    },
    ignored=(r"^(?!visual\.)", r"^visual\.proj$"),
    optional={"pooler": r"^visual\.attn_pool\."},
)  # fmt: skip
_TABLE = _SAME_WIDTH | {
    f"pooler/attn/{name}/kernel": f"{_POOLER}{name}_proj_weight" for name in "qkv"
}


def _count(value: Any) -> bool:
    return type(value) is int and value > 0


def _any(value: Any) -> bool:
    return True


# Key of vision_cfg -> its default in open_clip, and which values are supported.
_VISION: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "layers": (12, _count),  # a list: a ResNet
    "width": (768, _count),
    "head_width": (64, _count),
    "mlp_ratio": (4.0, lambda v: type(v) in (int, float) and v > 0),
    "patch_size": (16, _count),
    "image_size": (224, _count),
    "ls_init_value": (None, _any),
    "no_ln_pre": (False, _any),
    "norm_kwargs": (None, lambda v: v in (None, {}) or (isinstance(v, dict) and set(v) == {"eps"})),
    "act_kwargs": (None, lambda v: v in (None, {}, {"approximate": "tanh"})),
    "block_type": (None, lambda v: v in (None, "default")),
    "attentional_pool": (False, lambda v: isinstance(v, bool)),  # "parallel", "cascade": unread
    "attn_pooler_queries": (256, _count),
    "attn_pooler_heads": (8, _count),
    "pool_type": ("tok", _any),
    # used in training only, or after the tokens, or implied by what is saved
    "patch_dropout": (None, _any),
    "output_tokens": (None, _any),
    "pos_embed_type": (None, _any),
    "final_ln_after_pool": (None, _any),
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model of open_clip_config.json, with a `model_type` of its own.

    Raises:
      KeyError, TypeError: the file has another form.
    """
    model = config["model_cfg"]
    if name := model["vision_cfg"].get("timm_model_name"):
        return _timm_tower(name, model["vision_cfg"])
    return {
        "model_type": "open_clip",
        "embed_dim": model["embed_dim"],
        "quick_gelu": model.get("quick_gelu", False),
        "vision_cfg": {**model["vision_cfg"]},
    }


def _timm_tower(name: str, vision: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a tower of timm, as open_clip's TimmModel passes them."""
    own = {"img_size": vision.get("image_size", 224)}
    if vision.get("timm_proj", "linear") not in ("linear", "mlp"):
        own["global_pool"] = vision.get("timm_pool", "avg")
    args = timm.arguments(name, own)
    return {**args, "model_type": f"open_clip_{args['model_type']}"}


def _vit(c: Config) -> Spec:
    v = {key: default for key, (default, _) in _VISION.items()} | c["vision_cfg"]
    for key, value in v.items():
        _check(key, value)
    for key in ("pool_type", "norm_kwargs"):  # which would change the pooler in other ways
        if v["attentional_pool"] and v[key] not in (_VISION[key][0], {}):
            _refuse(key, v[key])
    gelu = "gelu" if (v["act_kwargs"] or {}).get("approximate") == "tanh" else "gelu_erf"
    spec = {
        "kind": "vit", "image_size": v["image_size"], "patch": v["patch_size"],
        "width": v["width"], "depth": v["layers"], "heads": v["width"] // v["head_width"],
        "mlp_dim": int(v["width"] * v["mlp_ratio"]),
        "mlp": "quick_gelu" if c["quick_gelu"] else gelu,
        "norm_eps": (v["norm_kwargs"] or {}).get("eps", _EPS),
        "class_token": True, "patches_only": True, "patch_bias": False,
        "pre_norm": not v["no_ln_pre"], "final_norm": False,
        "layer_scale": v["ls_init_value"] is not None,
    }  # fmt: skip
    if v["attentional_pool"]:
        spec["pooler"] = {
            "queries": v["attn_pooler_queries"], "width": c["embed_dim"],
            "heads": v["attn_pooler_heads"], "norm_queries": True, "bias": True, "norm_eps": _EPS,
        }  # fmt: skip
    return spec


def _check(key: str, value: Any) -> None:
    if key in _VISION:
        supported = _VISION[key][1](value)
    else:  # other options change the tower; timm_… configures towers of timm
        supported = not value or key.startswith("timm_")
    if not supported:
        _refuse(key, value)


def _refuse(key: str, value: Any) -> None:
    raise CheckpointError(
        f"{CONFIG}: vision_cfg.{key}={value!r} is not supported; the towers that are read are "
        "open_clip's own ViTs, with the pooler of the published CoCa models or with none, and ViTs "
        "of timm"
    )


def _open(folder: Path, config: Config) -> TensorFiles:
    """Open the tower's own file, whatever else is in the folder."""
    own = folder / _WEIGHTS
    return TensorFiles.open(own if own.is_file() else folder)


FAMILIES: dict[str, Family] = {
    "open_clip": Family(_vit, (_TABLE, _SAME_WIDTH), files=_open),
    **{
        f"open_clip_{name}": dataclasses.replace(f, files=_open)
        for name, f in timm.FAMILIES.items()
    },
}
