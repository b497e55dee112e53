# ruff: noqa: C408
"""A comparison in seconds: arms over the stages of `recipes.tiny_recipe`.

recipe = write_comparison(folder)
main(["compare", f"--config={recipe}", "--seeds=2", f"--workdir={folder / 'compare'}"])
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from support.paths import TESTS
from support.recipes import tiny_recipe

ARMS = ("vadapter", "perceiver", "mlp")
RATES = (1e-2, 1e-3)
# A recipe file; its argument is a,b,c: the arms. `change` is lines that change `config`.
RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import comparisons

def get_config(arg):
    config = comparisons.tiny_comparison(Path({shapes!r}), tuple(filter(None, (arg or "").split("+"))))
    with config.unlocked():
        {change}
    return config
"""  # noqa: E501


def tiny_arm(shapes: Path, name: str, steps: int = 4) -> ConfigDict:
    """The recipe of an arm: frozen parts, and one adapter that trains on images alone."""
    config = tiny_recipe(shapes, steps=steps)
    own = {"vadapter": ("tlm", "decoder", "vadapter")}.get(name, (name,))
    with config.unlocked():
        config.components.mlp = dict(kind="mlp", hidden_dim=16, width=0)
        config.stages.mlp = dict(config.stages.perceiver.to_dict(), chain=("mlp",))
        for stage in ("vadapter", "perceiver", "mlp"):
            config.stages[stage].data = dict(images=1.0)
            config.stages[stage].evals = ("captions",)
        config.data.images.cache = True
        config.evals.test = dict(data="held", max_new=6, batch=8, limit=0)
        parts = tuple(n for n in ("tlm", "llm", "vision") if n in own or n != "tlm")
        config.chain = parts + tuple(n for n in own if n not in parts)
        config.stages = {n: config.stages[n] for n in config.chain}
    return config


def tiny_comparison(
    shapes: Path, arms: tuple[str, ...] = (), steps: int = 4, **keys: Any
) -> ConfigDict:
    """A comparison as `configs/compare.py` returns it; `keys` are its keys beside `arms`."""
    return ConfigDict(
        dict(
            name="tiny",
            arms={name: tiny_arm(shapes, name, steps) for name in arms or ARMS},
            baseline="perceiver",
            lr=RATES,
            validation_loss="held/loss",
            score="captions/cider",
            test=("test",),
        )
        | keys
    )


def write_comparison(folder: Path, shapes: Path, change: str = "pass") -> Path:
    """The comparison as a file; `change` is a line of Python that changes `config`."""
    path = folder / "compare.py"
    path.write_text(RECIPE.format(tests=str(TESTS), shapes=str(shapes), change=change))
    return path
