"""A language model of ours as `LlamaForCausalLM`, with the same weights."""

from typing import Any

import numpy as np
import torch

from benches.peer.originals import transformers
from benches.peer.torch_layers import tensor
from benches.peer.torch_model import unstacked
from vadapter.models.lm import LMConfig


def llama(config: LMConfig, params: Any, dtype: torch.dtype) -> Any:
    """Return the model.

    Raises:
      ValueError: the class has no such block.
    """
    if config.parallel or config.embed_scale or not config.tied:
        raise ValueError("LlamaForCausalLM has sequential blocks and embeddings without scale")
    library = transformers()
    settings = library.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.mlp_dim,
        num_hidden_layers=config.depth, num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads or config.heads,
        head_dim=config.head_dim or config.width // config.heads, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
        tie_word_embeddings=True, max_position_embeddings=config.max_len,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = library.LlamaForCausalLM(settings).eval()
    model.load_state_dict(_weights(config, params))
    return model.to(dtype)


def _weights(config: LMConfig, params: Any) -> dict[str, torch.Tensor]:
    table = tensor(params["embedding"]["embedding"])
    weights = {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": tensor(params["norm"]["scale"]),
    }
    norms = {"input_layernorm": "norm_attn", "post_attention_layernorm": "norm_mlp"}
    kernels = {f"self_attn.{name}_proj": ("attn", name) for name in "qkvo"}
    kernels |= {f"mlp.{name}_proj": ("mlp", name) for name in ("gate", "up", "down")}
    for i, layer in enumerate(unstacked(params["stack"]["blocks"], config.depth)):
        place = f"model.layers.{i}"
        for theirs, ours in norms.items():
            weights[f"{place}.{theirs}.weight"] = tensor(layer[ours]["scale"])
        for theirs, (group, ours) in kernels.items():
            kernel = np.asarray(layer[group][ours]["kernel"], np.float32)
            weights[f"{place}.{theirs}.weight"] = tensor(kernel.T)
    return weights
