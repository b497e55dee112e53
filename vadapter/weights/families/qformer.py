"""BLIP-2's Q-Former: from config.json to the spec of a component, and its tensor names.

It is read from a whole BLIP-2, whose queries and whose norm of the visual tokens come with it, or
alone, without these two. The text branch is left out.

Source: `Blip2Config` and `Blip2QFormerModel` of transformers.
"""

from collections.abc import Mapping
from typing import Any

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
from vadapter.weights.name_mapping import Form, Table, Tokens

_CROSS_EVERY = 2  # of all published ones


def _attention(ours: str, theirs: str) -> dict[str, Form]:
    names = {"q": "query", "k": "key", "v": "value"}
    projections: dict[str, Form] = {
        f"{ours}/{x}": f"{theirs}.attention.{name}" for x, name in names.items()
    }
    return projections | {
        f"{ours}/o": f"{theirs}.output.dense", f"norm_{ours}": f"{theirs}.output.LayerNorm"
    }  # fmt: skip


_TEXT_BRANCH = r"encoder\.layer\.\d+\.(intermediate|output)\."
_ALONE = Table(
    layers="encoder.layer.{}.",
    stacks={f"groups/layer_{i}/": (i, _CROSS_EVERY) for i in range(_CROSS_EVERY)},
    modules={
        "norm": "layernorm",
        **_attention("attn", "attention"),
        **_attention("cross", "crossattention"),
        "mlp/up": "intermediate_query.dense", "mlp/down": "output_query.dense",
        "norm_mlp": "output_query.LayerNorm",
    },
    ignored=(rf"^{_TEXT_BRANCH}",),
)  # fmt: skip
_BLIP2 = Table(
    layers=f"qformer.{_ALONE.layers}",
    stacks=_ALONE.stacks,
    modules={
        **_ALONE.modules,
        "norm": "qformer.layernorm",
        "queries": Tokens("query_tokens"),
        "norm_visual": "vision_model.post_layernorm",
    },
    ignored=(rf"^qformer\.{_TEXT_BRANCH}", r"^(qformer\.)?embeddings\.",
             r"^vision_model\.(?!post_layernorm\b)", r"^language_(model|projection)\.",
             r"^((vision|text)_projection|itm_head)\."),
    optional={"norm_visual": r"^vision_model\.post_layernorm\."},
)  # fmt: skip

_KEYS: Keys = {
    "hidden_size": Key(768, COUNT), "num_hidden_layers": Key(12, COUNT),
    "num_attention_heads": Key(12, COUNT), "intermediate_size": Key(3072, COUNT),
    "hidden_act": Key("gelu", ACTIVATION), "hidden_dropout_prob": Key(0.1, NOT_NEGATIVE),
    "layer_norm_eps": Key(1e-12, NOT_NEGATIVE),
    "cross_attention_frequency": Key(2, only(_CROSS_EVERY)),
    "per_layer_config": Key(None, only(None)),
}  # fmt: skip
_WHOLE: Keys = {
    **_KEYS, "num_query_tokens": Key(32, COUNT), "visual_eps": Key(1e-6, NOT_NEGATIVE),
}  # fmt: skip


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a BLIP-2's config.json says about its Q-Former, under BLIP-2's `model_type`.

    Raises:
      TypeError, AttributeError: the file has another form.
    """
    eps = (config.get("vision_config") or {}).get("layer_norm_eps", 1e-6)
    outside = {"num_query_tokens": config.get("num_query_tokens", 32), "visual_eps": eps}
    return {**(config.get("qformer_config") or {}), **outside, "model_type": config["model_type"]}


def _alone(c: Config) -> Spec:
    require_heads(c)
    return {
        "kind": "qformer", "width": c["hidden_size"], "depth": c["num_hidden_layers"],
        "heads": c["num_attention_heads"], "mlp_dim": c["intermediate_size"],
        "cross_every": c["cross_attention_frequency"], "mlp": ACTIVATIONS[c["hidden_act"]],
        "norm_eps": c["layer_norm_eps"], "dropout": c["hidden_dropout_prob"],
    }  # fmt: skip


def _blip2(c: Config) -> Spec:
    return _alone(c) | {"queries": c["num_query_tokens"], "visual_eps": c["visual_eps"]}


FAMILIES: dict[str, Family] = {
    "blip-2": Family(_blip2, (_BLIP2,), _WHOLE),
    "blip_2_qformer": Family(_alone, (_ALONE,), _KEYS),
}
