"""Short runs: a chain of three stages, commands in processes of their own, a step without a model.

recipe = write_recipe(prepare(tmp_path))
assert run(recipe, tmp_path / "run", fault="KILL:decoder:step:3").returncode == -9
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
from support import faults, tiny
from support.paths import TESTS
from support.recipes import draw, tiny_recipe

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.models.registry import make_module
from vadapter.stages.initialization import DONE, STORE

VADAPTER = (sys.executable, "-m", "vadapter")
CHAIN = ("llm", "decoder", "vadapter")
STEPS = 6
# A recipe file; `kind` is a function of this module.
RECIPE = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from support import runs

def get_config(arg):
    return runs.{kind}(Path({folder!r}))
"""

# What a recipe begins with whose process, if INTERRUPTED is set, gets a SIGTERM while its step is
# compiled.
COMPILING = """
import os, signal, threading
import jax

EVENT = "/jax/core/compile/backend_compile_duration"

def stop():
    print("asked", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

def begins(event, value, fun_name="", **_):
    if event == EVENT and "step" in fun_name:
        print("compiling", fun_name, flush=True)
        threading.Timer(0.05, stop).start()

def ends(event, seconds, fun_name="", **_):
    if event == EVENT and "step" in fun_name:
        print("compiled", fun_name, flush=True)

if os.environ.get("INTERRUPTED"):
    jax.monitoring.register_scalar_listener(begins)
    jax.monitoring.register_event_duration_secs_listener(ends)
"""


def prepare(folder: Path) -> Path:
    """Draw the images, and make an encoder that another run might have trained."""
    spec = tiny_recipe(draw(folder / "shapes")).components.encoder.to_dict()
    size = spec["image_size"]
    params = tiny.init(make_module("encoder", spec), jnp.zeros((1, 1, size, size, 3)))
    finish_stage(folder / "outside" / "vision", {"encoder": params})
    return folder


def finish_stage(stage: Path, components: dict[str, Any]) -> None:
    """Write what a finished stage leaves behind."""
    store = ComponentStore(stage.parent / STORE)
    stored = {n: store.put(n, jax.tree.map(jnp.asarray, p)) for n, p in components.items()}
    stage.mkdir(parents=True)
    (stage / DONE).write_text(json.dumps({"components": stored, "identity": {"stage": stage.name}}))


def small(folder: Path) -> ConfigDict:
    """llm (text; dropout, two micro-batches) → decoder → vadapter, both on cached tokens.

    Keys of these two that are off by default are on: they change what is trained.

    Six steps of eight each, saved at every second; an epoch of the 24 images is three steps. The
    encoder was trained by another run, and the parts of the chain are the simplest there are.

    Args:
      folder: what `prepare` filled.
    """
    config = tiny_recipe(folder / "shapes")
    encoder = {"encoder": str(folder / "outside" / "vision")}
    inner = {"front": "decoder", "tlm": "decoder", "llm": "llm"}
    every = {"steps": STEPS, "batch": 8, "save_every": 2, "log_every": 1}
    every["optim"] = {"lr": 1e-2, "warmup": 1}
    see = {**every, "data": {"images": 1.0}}
    llm = {"kind": "lm", "lm": "llm", "data": {"documents": 1.0}, "accumulate": 2}
    llm["use_dropout"] = True
    decoder = {"kind": "decoder", "lm": "tlm", "chain": ("front",), "start": encoder}
    decoder |= {"query_loss": 0.5, "bidirectional": True}
    vadapter = {"kind": "adapter", "lm": "llm", "chain": ("front", "tlm", "fc_out")}
    vadapter |= {"start": encoder | inner, "evals": ("captions",), "eval_every": 3, "exit_layer": 1}
    slower = {"optim": every["optim"] | {"lr_mults": {"tlm": 0.5}}}
    with config.unlocked():
        config.chain = CHAIN
        config.components.front = {"kind": "mlp", "hidden_dim": 16, "width": 16}
        config.components.llm.dropout = 0.1
        config.components.tlm.depth = 2
        config.data.images.update(cache=True, flip=True, texts=1)
        config.evals = {"captions": config.evals.captions}
        config.stages = {"llm": llm | every, "decoder": decoder | see}
        config.stages.vadapter = vadapter | see | slower
    return config


def public(world: Path, **encoder: Any) -> ConfigDict:
    """decoder (front → tiny LM) → vadapter (front → tiny LM → LLM) of public checkpoints.

    Args:
      world: what `prepare` filled, with the checkpoints clip/, tlm/ and llm/ beside it.
      encoder: keys of the encoder beside its weights.
    """
    config = small(world)
    with config.unlocked():
        config.components.encoder = {"weights": str(world / "clip"), **encoder}
        config.components.tlm = {"weights": str(world / "tlm")}
        config.components.llm = {"weights": str(world / "llm")}
        config.chain = ("decoder", "vadapter")
        config.stages = {name: config.stages[name] for name in config.chain}
        config.tokenizer.data = ()
        config.data.images.update(text_len=80, target_len=78)
        config.stages.decoder.start = {}
        config.stages.vadapter.start = {"front": "decoder", "tlm": "decoder"}
    return config


def text_only(folder: Path, **stage: Any) -> ConfigDict:
    """The first stage of `small` alone, without its micro-batches and dropout."""
    config = small(folder)
    with config.unlocked():
        config.chain = ("llm",)
        config.stages = {"llm": config.stages.llm}
        config.stages.llm.update(accumulate=1, use_dropout=False)
        config.stages.llm.update(stage)
    return config


def blind(folder: Path, table: str = "images", **stage: Any) -> ConfigDict:
    """The stage `decoder` alone, on images as they are: for `fake_step`, which sees none."""
    config = small(folder)
    with config.unlocked():
        config.chain = ("decoder",)
        config.tokenizer.data = (table,)
        config.data = {table: config.data[table]}
        config.data[table].update(cache=False, flip=False)
        config.evals = {}
        config.stages = {"decoder": config.stages.decoder}
        config.stages.decoder.update(data={table: 1.0})
        config.stages.decoder.update(stage)
    return config


def fake_step(objective: Any, tx: Any, **_: Any) -> Any:
    """A train step without a model: moves every parameter by what the batch and the step are."""

    def step(state: Any, frozen: Any, batch: Any) -> Any:
        moved = 1e-3 * (batch["id"].sum() + jnp.sin(batch["targets"].sum()) + state.step)
        bad = ~jnp.isfinite(batch["weights"].sum())
        params = jax.tree.map(lambda p: jnp.where(bad, p, p + moved), state.params)
        skipped = jnp.where(bad, state.skipped + 1, 0)
        metrics = {"loss": moved, "skipped": skipped, "bad": batch["bad"].sum()}
        return state.replace(step=state.step + 1, params=params, skipped=skipped), metrics

    return step


# -- commands ----------------------------------------------------------------------------------


def write_recipe(folder: Path, kind: str = "small") -> Path:
    """A recipe of this module as a file."""
    path = folder / f"{kind}.py"
    path.write_text(RECIPE.format(tests=str(TESTS), folder=str(folder), kind=kind))
    return path


def environment(devices: int = 1, **more: str) -> dict[str, str]:
    """Of a process of its own."""
    return {
        **os.environ,
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        **more,
    }


def start(recipe: Path, workdir: Path, *overrides: str, **options: Any) -> subprocess.Popen:
    """Start `python -m vadapter train`, see `launch`."""
    items = [f"--config.{item}" for item in overrides]
    command = (*VADAPTER, "train", f"--config={recipe}", f"--workdir={workdir}", *items)
    return launch(command, **options)


def launch(
    command: Sequence[str],
    *,
    fault: str = "",
    devices: int = 1,
    more: Mapping[str, str] = {},
    **popen: Any,
) -> subprocess.Popen:
    """Start a command with both streams in one pipe.

    Args:
      fault: see `support.faults`; a command other than vadapter calls `faults.install` itself.
      more: variables.
    """
    if fault and "vadapter" in command:
        command = [word if word != "vadapter" else "support.faults" for word in command]
    env = environment(devices, **{faults.VARIABLE: fault}, **more)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=env, **{**pipes, **popen})


def run(recipe: Path, workdir: Path, *overrides: str, **options: Any) -> Any:
    """Run it to its end; return `returncode` and `stdout`, which holds both streams."""
    with start(recipe, workdir, *overrides, **options) as process:
        try:
            out, _ = process.communicate(timeout=600)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out)


def trained_digests(workdir: Path, stages: tuple[str, ...] = CHAIN) -> dict[str, str]:
    """The digest of every component that finished stages have trained."""
    records = {name: json.loads((workdir / name / DONE).read_text()) for name in stages}
    return {f"{n}/{k}": v for n, r in records.items() for k, v in r["components"].items()}
