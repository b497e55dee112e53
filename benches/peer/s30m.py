"""A recipe of 30 million parameters: that of configs/quickstart.py with larger components."""

from pathlib import Path
from typing import Any

from vadapter import config


def get_config(arg=None):
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.py"
    recipe: Any = config.load(f"{quickstart}:weights=")
    lm = {"kind": "lm", "vocab_size": 8192, "kv_heads": 1, "head_dim": 64, "max_len": 256}
    queries = {"kind": "resampler", "queries": 64, "query_dim": 384, "hidden_dim": 384, "heads": 6}
    vit = {"kind": "vit", "image_size": 144, "patch": 18, "width": 384, "depth": 6, "heads": 6}
    sizes = {
        "encoder": {**vit, "mlp_dim": 1536},
        "tlm": {**lm, "width": 384, "depth": 6, "heads": 6, "mlp_dim": 1024},
        "llm": {**lm, "width": 512, "depth": 8, "heads": 8, "mlp_dim": 1408},
        "resampler": {**queries, "layers": 1},
        "perceiver": {**queries, "layers": 6},
    }
    for name, spec in sizes.items():
        recipe.components[name] = spec
    recipe.tokenizer.vocab_size = 8192
    for name in ("decoder", "vadapter", "perceiver"):
        recipe.stages[name].batch = 8
    for name in ("images", "held_images", "clips"):
        recipe.data[name].text_len, recipe.data[name].target_len = 32, 30
        recipe.data[name].texts = 1
    return recipe
