"""A small BLIP-2 with drawn tensors, under the names that transformers gives them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

SMALL = {"hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 12, "cross_attention_frequency": 2}  # fmt: skip
D, QUERIES = 6, 3  # encoder width, queries


def write_blip2(folder: Path, spoil: Callable[[dict], Any] = lambda tensors: None) -> Path:
    """Write config.json and model.safetensors of a BLIP-2 with little more than its Q-Former.

    `spoil` changes the tensors before they are written.
    """
    shapes = {"query_tokens": (1, QUERIES, 8), "language_projection.weight": (5, 8),
              "vision_model.embeddings.class_embedding": (1, 1, D)}  # fmt: skip

    def dense(name, size, inputs):
        shapes.update({f"{name}.weight": (size, inputs), f"{name}.bias": (size,)})

    def norm(name, size):
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    def attention(name, inputs):
        for part, width in (("query", 8), ("key", inputs), ("value", inputs)):
            dense(f"{name}.attention.{part}", 8, width)
        dense(f"{name}.output.dense", 8, 8)
        norm(f"{name}.output.LayerNorm", 8)

    norm("vision_model.post_layernorm", D)
    norm("qformer.layernorm", 8)
    for i in range(4):
        layer = f"qformer.encoder.layer.{i}"
        attention(f"{layer}.attention", 8)
        if i % 2 == 0:
            attention(f"{layer}.crossattention", D)
        for branch in ("", "_query"):  # of texts, and of queries
            dense(f"{layer}.intermediate{branch}.dense", 12, 8)
            dense(f"{layer}.output{branch}.dense", 8, 12)
            norm(f"{layer}.output{branch}.LayerNorm", 8)
    rng, tensors = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        scale = name.lower().endswith("norm.weight")
        tensors[name] = (rng.standard_normal(shape) * 0.3 + scale).astype(np.float32)
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "blip-2", "num_query_tokens": QUERIES, "qformer_config": SMALL,
              "vision_config": {"hidden_size": D, "layer_norm_eps": 1e-5}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
