"""ViTs of timm: from the architecture that a folder's config.json names to a spec, and their names.

The hyperparameters are not in that file but in timm: those of its ViTs are in timm_models.json, as
far as they are not the defaults below, under timm's own names; `model_args` in config.json are
others. The tokens are those of `forward_features`, without class token and registers.

Source: `VisionTransformer` of timm's vision_transformer.py and `Eva` of its eva.py.
"""

import functools
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError
from vadapter.weights.families.family import (
    COUNT,
    FLAG,
    GROUP,
    NOT_NEGATIVE,
    POSITIVE,
    SIDE,
    Config,
    Family,
    Key,
    Keys,
    Spec,
    Values,
    one_of,
    only,
    refuse,
    require,
    require_heads,
    side,
)
from vadapter.weights.name_mapping import SQUARE, Form, Pairs, Part, Patches, Table, Tokens, fused
from vadapter.weights.preprocessor import preprocess_of_timm

_NORMS = {"layernorm": "layer", "rmsnorm": "rms"}
_ACTS = {"gelu": "gelu_erf", "gelu_tanh": "gelu", "quick_gelu": "quick_gelu", "relu": "relu"}
_GATED = {"silu": "swiglu", "gelu": "geglu_erf", "gelu_tanh": "geglu"}
_MLPS = {"": 1, "swiglupacked": 2, "swiglu": 1}  # by how much the hidden width is divided
# Pool -> whether the last norm is behind it.
_POOLS = {"": False, "token": False, "map": False, "prr": False, "avg": True, "avgmax": True,
          "max": True}  # fmt: skip
# Arguments that change neither parameters nor tokens.
_IGNORED = {
    "num_classes", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size",
    "pool_include_prefix", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords",
    "attn_pool_num_heads", "attn_pool_mlp_ratio", "head_init_scale", "qkv_fused",
}  # fmt: skip
_REGISTERS = Values(lambda v: v == 0 or COUNT.test(v), "a whole number")
_SCALE = NOT_NEGATIVE.or_null()

_COMMON: Keys = {
    "preprocess": Key({}, GROUP), "in_chans": Key(3, only(3)),
    "img_size": Key(224, SIDE), "patch_size": Key(16, SIDE), "embed_dim": Key(768, COUNT),
    "depth": Key(12, COUNT), "num_heads": Key(12, COUNT), "mlp_ratio": Key(4.0, POSITIVE),
    "qkv_bias": Key(True, FLAG), "qk_norm": Key(False, FLAG), "init_values": Key(None, _SCALE),
    "class_token": Key(True, FLAG), "no_embed_class": Key(False, FLAG),
    "norm_layer": Key("layernorm", one_of(_NORMS)), "norm_eps": Key(1e-6, POSITIVE),
}  # fmt: skip
_VIT: Keys = _COMMON | {
    "global_pool": Key("token", one_of(_POOLS)), "proj_bias": Key(True, FLAG),
    "scale_attn_norm": Key(False, FLAG), "scale_mlp_norm": Key(False, FLAG),
    "pos_embed": Key("learn", only("learn", "none", "")), "reg_tokens": Key(0, _REGISTERS),
    "pre_norm": Key(False, FLAG), "final_norm": Key(True, FLAG),
    "fc_norm": Key(None, FLAG.or_null()), "act_layer": Key("gelu", one_of(_ACTS | _GATED)),
    "mlp_layer": Key("", one_of(_MLPS)), "embed_norm_layer": Key("", one_of({"": 0} | _NORMS)),
}  # fmt: skip
_EVA: Keys = _COMMON | {
    "global_pool": Key("avg", one_of(_POOLS)), "attn_type": Key("eva", only("eva", "rope")),
    "scale_attn_inner": Key(False, FLAG), "scale_mlp": Key(False, FLAG),
    "swiglu_mlp": Key(False, FLAG), "swiglu_align_to": Key(0, _REGISTERS),
    "num_reg_tokens": Key(0, _REGISTERS), "use_abs_pos_emb": Key(True, FLAG),
    "use_pre_transformer_norm": Key(False, FLAG),
    "use_post_transformer_norm": Key(None, FLAG.or_null()),
    "use_fc_norm": Key(None, FLAG.or_null()), "use_rot_pos_emb": Key(False, FLAG),
    "rope_type": Key("cat", only("cat", "dinov3")), "rope_grid_offset": Key(0.0, NOT_NEGATIVE),
    "rope_grid_indexing": Key("ij", only("ij", "xy")), "rope_temperature": Key(10_000.0, POSITIVE),
    "rope_rotate_half": Key(False, FLAG), "ref_feat_shape": Key(None, SIDE.or_null()),
}  # fmt: skip
_CLASSES = {"vit": ("timm_vit", _VIT), "eva": ("timm_eva", _EVA)}


@functools.cache
def models() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Return class -> architecture -> the arguments that are not that class's defaults."""
    return json.loads(Path(__file__).with_name("timm_models.json").read_text(encoding="utf-8"))


def arguments(architecture: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of an architecture, some of them replaced, with a `model_type` of ours.

    Raises:
      CheckpointError: not a ViT of the table, or an argument that is not read.
    """
    name = architecture.partition(".")[0]
    for cls, (model_type, keys) in _CLASSES.items():
        if name not in models()[cls]:
            continue
        for key in own:
            if key not in keys and key not in _IGNORED:
                refuse(f"model_args.{key}", own[key], "it is not read")
        args = {**models()[cls][name], **own}
        if args.get("rope_rotate_half"):
            model_type += "_half"
        return {"model_type": model_type, **args}
    known = sum(len(table) for table in models().values())
    raise CheckpointError(
        f"timm's {name!r} is not one of its {known} plain ViTs that are read: SigLIP, CLIP, "
        "EVA-02, PE, DINOv2 and 3, AIMv2 and others. Give one of those, such as "
        "timm/vit_so400m_patch14_siglip_384.webli"
    )


def read_config(config: Config) -> dict[str, Any]:
    """Return the arguments that timm's config.json means, and its `preprocess`.

    Raises:
      CheckpointError, ValueError: as `arguments` and the preprocessing.
    """
    own = {k: v for k, v in (config.get("model_args") or {}).items() if v is not None}
    pixels = preprocess_of_timm(config["pretrained_cfg"])
    fields = pixels.fields()
    own = {"img_size": fields.pop("image_size"), **own}
    return {**arguments(config["architecture"], own), "preprocess": fields}


def _shared(c: Config) -> Spec:
    require_heads(c, "embed_dim", "num_heads")
    return {
        "kind": "vit", "image_size": side(c["img_size"]), "patch": side(c["patch_size"]),
        "width": c["embed_dim"], "depth": c["depth"], "heads": c["num_heads"],
        "qkv_bias": c["qkv_bias"], "qk_norm": c["qk_norm"], "class_token": c["class_token"],
        "norm": _NORMS[c["norm_layer"]], "norm_eps": c["norm_eps"], "patches_only": True,
        **c["preprocess"],
    }  # fmt: skip


def _positions(c: Config, added: bool, registers: str) -> str:
    if not added:
        return "none"
    require(c, registers, c["no_embed_class"] or not c[registers],
            "it is read with no_embed_class=True alone: registers have no positions")  # fmt: skip
    return "patches" if c["no_embed_class"] else "trained"


def _vit(c: Config) -> Spec:
    gated = bool(c["mlp_layer"])
    kinds = _GATED if gated else _ACTS
    require(c, "act_layer", c["act_layer"] in kinds,
            f"beside mlp_layer={c['mlp_layer']!r} only {', '.join(kinds)} are read")  # fmt: skip
    require(c, "embed_norm_layer", c["embed_norm_layer"] in ("", c["norm_layer"]),
            f"beside norm_layer={c['norm_layer']!r} only that is read")  # fmt: skip
    inner = {(False, False): "none", (False, True): "mlp", (True, True): "both"}
    scaled = c["scale_attn_norm"], c["scale_mlp_norm"]
    require(c, "scale_attn_norm", scaled in inner, "it is read with scale_mlp_norm=True alone")
    behind_pool = _POOLS[c["global_pool"]] if c["fc_norm"] is None else c["fc_norm"]
    hidden = int(c["embed_dim"] * c["mlp_ratio"])
    return _shared(c) | {
        "mlp": kinds[c["act_layer"]], "mlp_dim": hidden // _MLPS[c["mlp_layer"]],
        "bias": c["proj_bias"], "inner_norms": inner[scaled], "registers": c["reg_tokens"],
        "layer_scale": bool(c["init_values"]), "patch_norm": bool(c["embed_norm_layer"]),
        "positions": _positions(c, c["pos_embed"] == "learn", "reg_tokens"),
        "patch_bias": not c["pre_norm"], "pre_norm": c["pre_norm"],
        "final_norm": c["final_norm"] and not behind_pool,
    }  # fmt: skip


def _eva(c: Config) -> Spec:
    inner = {(False, False): "none", (False, True): "mlp", (True, True): "both"}
    scaled = c["scale_attn_inner"], c["scale_mlp"]
    require(c, "scale_attn_inner", scaled in inner, "it is read with scale_mlp=True alone")
    final, behind_pool = c["use_post_transformer_norm"], c["use_fc_norm"]
    if behind_pool is None:
        behind_pool = c["global_pool"] == "avg"
    hidden = int(c["embed_dim"] * c["mlp_ratio"])
    if c["swiglu_mlp"] and c["swiglu_align_to"]:
        hidden += -hidden % c["swiglu_align_to"]
    spec = _shared(c) | {
        "mlp": "swiglu" if c["swiglu_mlp"] else "gelu_erf", "mlp_dim": hidden,
        "key_bias": c["attn_type"] == "rope", "inner_norms": inner[scaled],
        "registers": c["num_reg_tokens"], "layer_scale": c["init_values"] is not None,
        "positions": _positions(c, c["use_abs_pos_emb"], "num_reg_tokens"),
        "patch_bias": not c["use_pre_transformer_norm"],
        "pre_norm": c["use_pre_transformer_norm"],
        "final_norm": not behind_pool if final is None else final,
    }  # fmt: skip
    if c["use_rot_pos_emb"]:
        spec["rope"] = {
            "theta": c["rope_temperature"], "offset": c["rope_grid_offset"],
            "coordinates": "center" if c["rope_type"] == "dinov3" else "index",
            "reference": 0 if c["rope_type"] == "dinov3" else side(c["ref_feat_shape"] or 0),
            "column_first": c["rope_grid_indexing"] == "xy",
        }  # fmt: skip
    return spec


_TABLE = Table(
    layers="blocks.{}.",
    prefixes=("", "visual.trunk."),
    modules={
        "patches": Patches("patch_embed.proj"), "patch_norm": "patch_embed.norm",
        "class_token": Tokens("cls_token"), "registers": Tokens("reg_token"),
        "positions": Tokens("pos_embed", grid=SQUARE, antialias=True),
        "pre_norm": "norm_pre", "norm": "norm",
        "norm_attn": "norm1", **fused("attn/{}", "attn.qkv"), "attn/o": "attn.proj",
        "attn/norm_q": "attn.q_norm", "attn/norm_k": "attn.k_norm", "attn/inner_norm": "attn.norm",
        "scale_attn_out": "ls1.gamma",
        "norm_mlp": "norm2", "mlp/up": "mlp.fc1", "mlp/down": "mlp.fc2",
        "mlp/inner_norm": "mlp.norm", "scale_mlp_out": "ls2.gamma",
    },
    ignored=(r"^(visual\.trunk\.)?(head|fc_norm|attn_pool)\.", r"mask_token$",
             r"^visual\.head\.", r"^text\.", r"^logit_(scale|bias)$"),
)  # fmt: skip
_PACKED: dict[str, Form] = {"mlp/gate": Part("mlp.fc1", 0, 2), "mlp/up": Part("mlp.fc1", 1, 2)}
_SPLIT: dict[str, Form] = {"mlp/gate": "mlp.fc1_g", "mlp/up": "mlp.fc1_x"}
_GAMMA: dict[str, Form] = {"scale_attn_out": "gamma_1", "scale_mlp_out": "gamma_2"}
_OWN_BIASES: dict[str, Form] = {"attn/q/bias": "attn.q_bias", "attn/v/bias": "attn.v_bias"}
_APART: dict[str, Form] = {f"attn/{x}": f"attn.{x}_proj" for x in "qkv"}
_FEED_FORWARDS: tuple[dict[str, Form], ...] = ({}, _PACKED, _SPLIT)
_ATTENTIONS: tuple[dict[str, Form], ...] = ({}, _OWN_BIASES, _APART)

_VITS = tuple(_TABLE | mlp for mlp in _FEED_FORWARDS)
_HALVES = tuple(
    _TABLE | mlp | attention | _GAMMA
    for mlp, attention in itertools.product(_FEED_FORWARDS, _ATTENTIONS)
)


def _adjacent(table: Table) -> Table:
    """Return the table of a model that rotates adjacent pairs of queries and keys."""
    turned = [k for k in table.modules if k.startswith(("attn/q", "attn/k", "attn/norm_"))]
    own = {key: table.modules[key] for key in turned}
    forms = {key: Pairs(form) for key, form in own.items() if isinstance(form, str | Part)}
    return table | forms


FAMILIES: dict[str, Family] = {
    "timm_vit": Family(_vit, _VITS, _VIT),
    "timm_eva": Family(_eva, tuple(map(_adjacent, _HALVES)), _EVA),
    "timm_eva_half": Family(_eva, _HALVES, _EVA),
}
