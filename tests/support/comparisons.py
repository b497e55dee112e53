# ruff: noqa: C408
"""A comparison in seconds: three arms over an encoder of another run and one trained LLM.

recipe = write_comparison(runs.prepare(folder))
main(["compare", f"--config={recipe}", "--seeds=2", f"--workdir={folder / 'compare'}"])
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict
from support.paths import TESTS
from support.runs import prepare, small
from support.shared import make_once

from vadapter.config import plain
from vadapter.io.json_files import write_json
from vadapter.recipe.schema import Recipe, StageConfig, components, measured_data
from vadapter.recipe.schema import trained as trained_by
from vadapter.stages.initialization import DONE
from vadapter.stages.run import Run
from vadapter.stages.stage import Sources, settings
from vadapter.train import loop

ARMS = ("mlp", "perceiver", "vadapter")
RATES = (1e-3, 1e-2)
SEEDS = 2
# A recipe file; `change` are statements that change `config`.
RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import comparisons

def get_config(arg):
    arms = tuple((arg or "").split(",")) if arg else comparisons.ARMS
    config = comparisons.tiny_comparison(Path({folder!r}), arms)
    with config.unlocked():
        {change}
    return config
"""


def tiny_arm(folder: Path, name: str) -> ConfigDict:
    """The recipe of an arm: the part llm, for vadapter the decoder (stage 1), and the adapter.

    Args:
      folder: what `runs.prepare` filled.
    """
    config = small(folder)
    chains = {"vadapter": ("front", "tlm", "fc_out"), "perceiver": ("perceiver", "fc_out")}
    own = ("decoder", "vadapter") if name == "vadapter" else (name,)
    stage = config.stages.vadapter.to_dict()
    chain = chains.get(name, ("mlp",))
    start = {n: source for n, source in stage["start"].items() if n in ("encoder", "llm", *chain)}
    stage |= dict(chain=chain, start=start, steps=4, save_every=2, eval_every=0)
    stage |= dict(loss=("held",), loss_batches=1)
    del stage["optim"]["lr_mults"], stage["exit_layer"]  # of a component that not all arms have
    with config.unlocked():
        config.components.mlp = dict(kind="mlp", hidden_dim=16, width=0)
        config.evals.test = dict(data="held", max_new=6, batch=8, limit=0)
        config.stages[own[-1]] = stage
        config.stages.decoder.update(steps=2, save_every=2)
        config.stages.llm.update(steps=2, save_every=2, accumulate=1, use_dropout=False)
        config.chain = ("llm", *own)
        config.stages = {n: config.stages[n] for n in config.chain}
    return config


def tiny_comparison(folder: Path, arms: tuple[str, ...] = ARMS, **keys: Any) -> ConfigDict:
    """A comparison as `configs/compare.py` returns it; `keys` are its keys beside `arms`."""
    values = dict(
        name="tiny",
        arms={name: tiny_arm(folder, name) for name in arms},
        baseline="perceiver",
        lr=RATES,
        validation_loss="held/loss",
        score="captions/cider",
        test=("test",),
    )
    return ConfigDict(values | keys)


def write_comparison(folder: Path, to: Path | None = None, change: str = "pass") -> Path:
    """The comparison over `folder` as a file in `to`; `change` is a line that changes `config`."""
    path = (to or folder) / "compare.py"
    path.write_text(RECIPE.format(tests=str(TESTS), folder=str(folder), change=change))
    return path


def prepared(factory: pytest.TempPathFactory) -> Path:
    """The folder that `runs.prepare` fills, once for all tests of comparisons."""
    return make_once(factory, "comparison_world", prepare)


def use_fake_runs(
    patch: pytest.MonkeyPatch,
    loss: Callable[[str, float, int], float],
    digest: Callable[[], str],
) -> list[tuple[Any, ...]]:
    """Let runs finish at once, without a model; return the list that each of them is added to.

    Args:
      loss: (arm, lr, seed) -> validation loss of a run, or raises.
      digest: that of every component which a run trains now.
    """
    trained: list[tuple[Any, ...]] = []

    def starts(stage: StageConfig) -> dict[str, str]:
        found = {}
        for name in components(stage):
            path = Path(stage.start.get(name, "")) / DONE
            done = json.loads(path.read_text())["components"] if path.is_file() else {}
            found[name] = done.get(name, "")
        return found

    def train(recipe: Recipe, workdir: Path, **_: Any) -> None:
        stage = recipe.stages[recipe.chain[-1]]
        run = (recipe.chain[-1], stage.optim.lr, recipe.seed)
        trained.append(run)
        source = Sources(recipe)
        scores = {"held/loss": loss(*run)} if stage.kind == "adapter" else {}
        for name in recipe.chain:
            data = recipe.stages[name].data
            identity = {
                **plain(settings(recipe, name)),
                "fingerprints": {n: source(n).fingerprint() for n in data},
                "tokenizer": "that of the parts",
                "start": starts(recipe.stages[name]),
            }
            parts = dict.fromkeys(trained_by(recipe.stages[name]), digest())
            measured = measured_data(recipe, recipe.stages[name])
            done = {"components": parts, "identity": identity, "scores": scores,
                    "measured": {n: source(n).fingerprint() for n in measured}}  # fmt: skip
            write_json(workdir / name / DONE, done)
        write_json(workdir / "config.json", plain(recipe))

    patch.setattr(loop, "train", train)
    patch.setattr(Run, "check", lambda run: None)
    return trained
