"""A recipe with one language model, of the sizes of SmolLM2-135M."""

from pathlib import Path
from typing import Any

from vadapter import config


def get_config(arg=None):
    recipe: Any = config.load(f"{Path(__file__).parents[2]}/configs/quickstart.py:weights=")
    recipe.components.llm = {
        "kind": "lm", "vocab_size": 49152, "width": 576, "depth": 30, "heads": 9, "kv_heads": 3,
        "mlp_dim": 1536, "parallel": False, "norm_eps": 1e-5, "embed_scale": False,
        "rope": {"theta": 100_000.0},
    }  # fmt: skip
    recipe.tokenizer.vocab_size = 49152
    recipe.data.documents.text_len = 64  # tokens before the first new one
    return recipe
