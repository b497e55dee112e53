"""Public language models: from config.json to the spec of a component, and their tensor names.

A family is a `model_type` of Hugging Face's transformers, whose `modeling_*.py` is the reference.
Keys that a config.json may lack have that library's defaults.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vadapter.errors import CheckpointError
from vadapter.weights import llama2c
from vadapter.weights.name_mapping import Table, fused
from vadapter.weights.safetensors import TensorFiles

Config = Mapping[str, Any]
Spec = dict[str, Any]

_LLAMA = Table(
    layers="model.layers.{}.",
    prefixes=("", "language_model."),
    modules={
        "embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head",
        "norm_attn": "input_layernorm",
        **{f"attn/{x}": f"self_attn.{x}_proj" for x in "qkvo"},
        "attn/norm_q": "self_attn.q_norm", "attn/norm_k": "self_attn.k_norm",
        "norm_mlp": "post_attention_layernorm",
        **{f"mlp/{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")},
    },
    ignored=(r"rotary_emb\.inv_freq$", r"^vision_tower\.", r"^multi_modal_projector\."),
)  # fmt: skip
_GEMMA2 = _LLAMA | {
    "norm_attn_out": "post_attention_layernorm",
    "norm_mlp": "pre_feedforward_layernorm",
    "norm_mlp_out": "post_feedforward_layernorm",
}
# GPT-2s are saved with or without the prefix "transformer."; the head never has it.
_GPT2S = tuple(
    Table(
        layers=f"{root}h.{{}}.",
        modules={
            "embedding": f"{root}wte", "position_embedding": f"{root}wpe",
            "norm": f"{root}ln_f", "head": "lm_head",
            "norm_attn": "ln_1", **fused("attn/{}", "attn.c_attn"), "attn/o": "attn.c_proj",
            "norm_mlp": "ln_2", "mlp/up": "mlp.c_fc", "mlp/down": "mlp.c_proj",
        },
        transposed=False,
        ignored=(r"\.attn\.(masked_)?bias$",),
    )
    for root in ("transformer.", "")
)  # fmt: skip
_NEOX = Table(
    layers="gpt_neox.layers.{}.",
    modules={
        "embedding": "gpt_neox.embed_in", "norm": "gpt_neox.final_layer_norm", "head": "embed_out",
        "norm_attn": "input_layernorm",
        **fused("attn/{}", "attention.query_key_value", by_head=True),
        "attn/o": "attention.dense",
        "norm_mlp": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h", "mlp/down": "mlp.dense_4h_to_h",
    },
    ignored=(r"rotary_emb\.inv_freq$", r"attention\.(masked_)?bias$"),
)  # fmt: skip

_ACTIVATIONS = {
    "gelu": "gelu_erf", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu",
    "quick_gelu": "quick_gelu", "relu": "relu",
}  # fmt: skip
_GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu"}


def _sizes(c: Config) -> Spec:
    return {
        "kind": "lm", "vocab_size": c["vocab_size"], "width": c["hidden_size"],
        "depth": c["num_hidden_layers"], "heads": c["num_attention_heads"],
    }  # fmt: skip


def _llama(c: Config) -> Spec:
    """Llama 1 to 3, SmolLM, TinyLlama, Mistral; the base of Qwen and Gemma."""
    heads = c["num_attention_heads"]
    return {
        **_sizes(c),
        "kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or c["hidden_size"] // heads,
        "mlp_dim": c["intermediate_size"],
        "mlp": activation(c.get("hidden_act", "silu"), gated=True),
        "norm": "rms", "norm_eps": c.get("rms_norm_eps", 1e-6),
        "bias": bool(c.get("attention_bias", False)), "mlp_bias": bool(c.get("mlp_bias", False)),
        "parallel": False,
        "rope": _rope(c, "full_attention"), "windows": _windows(c),
        "max_len": c["max_position_embeddings"],
        "tied": c.get("tie_word_embeddings", False), "embed_scale": False,
    }  # fmt: skip


def _gemma(c: Config) -> Spec:
    name = c.get("hidden_activation") or c.get("hidden_act") or "gelu_pytorch_tanh"
    if name == "gelu":  # the first release wrote this for the approximation
        name = "gelu_pytorch_tanh"
    tied = c.get("tie_word_embeddings", True)
    return _llama({**c, "hidden_act": name}) | {
        "norm_offset": 1.0,
        "embed_scale": True,
        "tied": tied,
    }


def _gemma2(c: Config) -> Spec:
    c = {"query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
         "final_logit_softcapping": 30.0, "sliding_window": 4096, "head_dim": 256,
         "num_attention_heads": 8, "num_key_value_heads": 4, **c}  # fmt: skip
    return _gemma(c) | {
        "post_norms": True,
        "attn_scale": c["query_pre_attn_scalar"] ** -0.5,
        "attn_softcap": c["attn_logit_softcapping"] or 0.0,
        "final_softcap": c["final_logit_softcapping"] or 0.0,
        "windows": _windows(c, pattern=2),
    }


def _gemma3(c: Config) -> Spec:
    c = {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_theta": 1e6,
         "rope_local_base_freq": 1e4, "vocab_size": 262_208, "max_position_embeddings": 131_072,
         **c}  # fmt: skip
    pattern = c.get("sliding_window_pattern") or c.get("_sliding_window_pattern") or 6
    return _gemma2(c) | {
        "qk_norm": True,
        "windows": _windows(c, pattern=pattern),
        "rope_local": _rope(c, "sliding_attention"),
    }


def _gpt2(c: Config) -> Spec:
    if c.get("scale_attn_by_inverse_layer_idx"):
        raise CheckpointError("config.json: scale_attn_by_inverse_layer_idx is not supported")
    return {
        "kind": "lm", "vocab_size": c["vocab_size"], "width": c["n_embd"], "depth": c["n_layer"],
        "heads": c["n_head"], "kv_heads": c["n_head"],
        "mlp_dim": c.get("n_inner") or 4 * c["n_embd"],
        "mlp": activation(c.get("activation_function", "gelu_new")),
        "norm": "layer", "norm_eps": c.get("layer_norm_epsilon", 1e-5), "bias": True,
        "parallel": False, "positions": "learned", "max_len": c["n_positions"],
        "tied": c.get("tie_word_embeddings", True), "embed_scale": False,
    }  # fmt: skip


def _neox(c: Config) -> Spec:
    return {
        **_sizes(c),
        "kv_heads": c["num_attention_heads"], "mlp_dim": c["intermediate_size"],
        "mlp": activation(c.get("hidden_act", "gelu")),
        "norm": "layer", "norm_eps": c.get("layer_norm_eps", 1e-5),
        "bias": bool(c.get("attention_bias", True)), "mlp_bias": True,
        "parallel": c.get("use_parallel_residual", True), "shared_norm": False,
        "rope": _rope(c, "full_attention"), "max_len": c["max_position_embeddings"],
        "tied": c.get("tie_word_embeddings", False), "embed_scale": False,
    }  # fmt: skip


def activation(name: str, *, gated: bool = False) -> str:
    """Return our name of a feed-forward's activation; raise CheckpointError if we have none."""
    names = _GATED if gated else _ACTIVATIONS
    if name not in names:
        raise CheckpointError(f"config.json: activation {name!r} is none of {', '.join(names)}")
    return names[name]


def _rope(c: Config, kind: str) -> Spec:
    """Return the rotary positions of layers of a kind, full_attention or sliding_attention.

    Newer files have one group `rope_parameters`, by kind where kinds differ; older ones have
    `rope_theta` and `rope_scaling`, and Gemma 3's `rope_local_base_freq`.
    """
    group = c.get("rope_parameters") or {}
    group = group.get(kind, group)
    if not group:
        local = kind == "sliding_attention" and "rope_local_base_freq" in c
        group = {} if local else dict(c.get("rope_scaling") or {})
        theta = c["rope_local_base_freq"] if local else c.get("rope_theta")
        group["rope_theta"] = theta or c.get("rotary_emb_base") or 10_000.0
    part = group.get("partial_rotary_factor", c.get("partial_rotary_factor", c.get("rotary_pct")))
    spec: Spec = {"theta": float(group["rope_theta"]), "part": 1.0 if part is None else part}
    scaling = group.get("rope_type") or group.get("type") or "default"
    if scaling == "default":
        return spec
    if scaling not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            f"config.json: rotary positions of type {scaling!r} are none of default, linear, "
            "llama3, yarn"
        )
    spec |= {"scaling": scaling, "factor": float(group["factor"])}
    original = group.get("original_max_position_embeddings") or c["max_position_embeddings"]
    if scaling != "linear":
        spec["original_len"] = int(original)
    for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                "attention_factor", "truncate"):  # fmt: skip
        if group.get(key) is not None:
            spec[key] = group[key]
    if scaling == "yarn" and (group.get("mscale") or group.get("mscale_all_dim")):
        raise CheckpointError("config.json: yarn with mscale is not supported")
    return spec


def _windows(c: Config, pattern: int = 0) -> tuple[int, ...]:
    """Return the window of each layer, 0 for none: as listed, or in all but every `pattern`-th."""
    window = c.get("sliding_window") or 0
    if c.get("use_sliding_window") is False or not window:
        return ()
    if (kinds := c.get("layer_types")) is not None:
        full = [kind == "full_attention" for kind in kinds]
    else:
        first = c.get("max_window_layers", 0) if "use_sliding_window" in c else 0
        layers = range(c["num_hidden_layers"])
        full = [i < first or (pattern and (i + 1) % pattern == 0) for i in layers]
    return () if all(full) else tuple(0 if f else window for f in full)


@dataclasses.dataclass(frozen=True)
class Family:
    """A supported model_type."""

    spec: Callable[[Config], Spec]  # config.json -> spec
    tables: tuple[Table, ...]  # names in use; the table that matches a checkpoint best is taken
    files: Callable[[Path], TensorFiles] = TensorFiles.open  # opens the folder's tensors


FAMILIES: dict[str, Family] = {
    "llama": Family(_llama, (_LLAMA,)),
    "mistral": Family(_llama, (_LLAMA,)),
    "qwen2": Family(lambda c: _llama(c) | {"qkv_bias": True}, (_LLAMA,)),
    "qwen3": Family(lambda c: _llama(c) | {"qk_norm": True}, (_LLAMA,)),
    "gemma": Family(_gemma, (_LLAMA,)),
    "gemma2": Family(_gemma2, (_GEMMA2,)),
    "gemma3_text": Family(_gemma3, (_GEMMA2,)),
    "gpt2": Family(_gpt2, _GPT2S),
    "gpt_neox": Family(_neox, (_NEOX,)),
    "llama2c": Family(_llama, (llama2c.TABLE,), llama2c.open_files),
}
