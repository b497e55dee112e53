"""Loading a language model beside transformers, each in a process of its own.

    python -m benches.bench_load --gigabytes=1 --rounds=5

Writes a random Llama in bfloat16 and loads it to bfloat16 and to float32, the sides in turn:
`ours`; `mapped`, transformers as it loads by default, whose tensors are pages of the file until
they are changed or converted; `read`, transformers with `disable_mmap=True`, which copies them.
Then every byte is read once, as the first use of the weights does. Prints medians: CPU seconds of
loading, those in the kernel (pages, mostly), CPU seconds of loading and that first use, seconds of
loading, and the peak of resident memory. transformers and torch: `pip install 'vadapter[parity]'`.

Linux only: resident memory is read, and its peak reset, under /proc. On the CPU backend arrays are
host memory, so the peak holds what was loaded, too.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benches.resident import forget_peak, resident

CONFIG = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4,
          "max_position_embeddings": 2048}  # fmt: skip
# transformers needs what we take from the shapes or do not need.
ORIGINAL = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
Facts = dict[str, float]


def write(folder: Path, gigabytes: float) -> Path:
    """Write a random Llama in bfloat16, of four shards, whose layers outweigh its ends."""
    from safetensors.numpy import save_file

    width = 64 * round(32 * (gigabytes / 2) ** 0.5)
    config = CONFIG | ORIGINAL | {"hidden_size": width, "intermediate_size": 11 * width // 4,
                       "vocab_size": 16 * width, "num_hidden_layers": 20}  # fmt: skip
    block = np.random.default_rng(0).standard_normal(999_983, np.float32)
    block = block.astype(ml_dtypes.bfloat16)  # of a prime length: no two tensors are alike
    names, files = shapes(config), {}
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        part = dict(list(names.items())[shard::4])
        drawn = {n: np.resize(np.roll(block, 7 * len(n)), shape) for n, shape in part.items()}
        save_file(drawn, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape [out, in] of a Llama's tensors."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    narrow = width * config["num_key_value_heads"] // config["num_attention_heads"]
    names: dict[str, tuple[int, ...]]
    names = dict.fromkeys(["model.embed_tokens", "lm_head"], (config["vocab_size"], width))
    names["model.norm"] = (width,)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}."
        names |= dict.fromkeys([f"{at}self_attn.{p}_proj" for p in "qo"], (width, width))
        names |= dict.fromkeys([f"{at}self_attn.{p}_proj" for p in "kv"], (narrow, width))
        names |= dict.fromkeys([f"{at}mlp.{p}_proj" for p in ("gate", "up")], (mlp, width))
        names[f"{at}mlp.down_proj"] = (width, mlp)
        names |= dict.fromkeys([f"{at}input_layernorm", f"{at}post_attention_layernorm"], (width,))
    return {f"{name}.weight": shape for name, shape in names.items()}


def ours(folder: Path, dtype: str, devices: int = 1) -> Facts:
    """Load through this project, over a mesh of CPU devices if there are several.

    Facts beside those of `_measured`, in bytes: all that devices hold (`shards`), the `largest`
    tensor and all that is `stored`.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from vadapter.distributed.mesh import MeshConfig, make_mesh
    from vadapter.models.registry import make_module
    from vadapter.stages import outline
    from vadapter.weights.hf_checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    module = make_module("llm", checkpoint.spec)
    boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    abstract = nn.unbox(boxed)
    if devices > 1:
        mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
        abstract = outline.abstract(boxed, mesh)
    jax.block_until_ready(jax.device_put(np.ones(1 << 20, ml_dtypes.bfloat16)))
    sizes = [int(np.prod(t.shape)) * t.dtype.itemsize for t in checkpoint.files.tensors.values()]

    def load() -> list[np.ndarray]:
        params = dict(Checkpoint.open(folder).leaves(abstract, jnp.dtype(dtype)))
        jax.block_until_ready(params)
        places = [s.data for x in jax.tree.leaves(params) for s in x.addressable_shards]
        own = {x.unsafe_buffer_pointer(): x for x in places}  # replicas of a host share memory
        return [np.asarray(x) for x in own.values()]

    return _measured(load) | {"largest": max(sizes), "stored": sum(sizes)}


def original(folder: Path, dtype: str, **options: Any) -> Facts:
    """Load through transformers."""
    from benches.peer import originals

    transformers = originals.transformers()
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401  # imported outside the time

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)

    def load() -> list[np.ndarray]:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), **options
        )
        kept.append(model)
        return [x.detach().view(torch.uint8).numpy() for x in model.parameters()]

    kept: list[Any] = []
    return _measured(load)


def library(folder: Path, dtype: str) -> Facts:
    """Read every tensor as the safetensors library does, in the dtype that is stored."""
    from safetensors import safe_open

    assert dtype == "bfloat16"

    def load() -> list[np.ndarray]:
        tensors = []
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="numpy") as f:
                tensors += [f.get_tensor(name) for name in f.keys()]  # noqa: SIM118
        return tensors

    return _measured(load)


SIDES: dict[str, Callable[..., Facts]] = {
    "ours": ours,
    "mapped": original,
    "read": lambda folder, dtype: original(folder, dtype, disable_mmap=True),
    "library": library,
}


def _measured(load: Callable[[], list[np.ndarray]]) -> Facts:
    """Return CPU and wall seconds of `load` and of reading what it returns, and bytes of memory."""
    forget_peak()
    before, began, spent = resident("VmRSS"), time.perf_counter(), os.times()
    arrays = load()
    seconds, loaded = time.perf_counter() - began, os.times()
    peak, left = resident("VmHWM") - before, resident("VmRSS") - before
    for array in arrays:
        np.bitwise_or.reduce(_words(array))
    used = os.times()
    return {
        "seconds": seconds,
        "cpu": loaded.user - spent.user + loaded.system - spent.system,
        "kernel": loaded.system - spent.system,
        "cpu_used": used.user - spent.user + used.system - spent.system,
        "peak": peak,
        "left": left,
        "shards": sum(x.nbytes for x in arrays),
    }


def _words(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array as integers, as large as they fit."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return flat.view(np.uint64 if flat.size % 8 == 0 else np.uint8)


def measure(side: str, folder: Path, dtype: str = "bfloat16", devices: int = 1) -> Facts:
    """Return the facts of one side, measured in a process of its own."""
    root = str(Path(__file__).parents[1])
    command = [sys.executable, "-m", "benches.bench_load", f"--side={side}", f"--folder={folder}",
               f"--dtype={dtype}", f"--devices={devices}"]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=root,
        env={"PYTHONPATH": root, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{side} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: Iterable[tuple[str, str, list[Facts]]]) -> str:
    """Return medians as text: a line for each dtype and side."""
    lines = [f"{'to':9} {'side':8} {'CPU s':>6} {'kernel':>7} {'used':>6} {'s':>6} {'peak MB':>8}"]
    for dtype, side, found in rows:
        m = {key: statistics.median(each[key] for each in found) for key in found[0]}
        lines.append(
            f"{dtype:9} {side:8} {m['cpu']:6.2f} {m['kernel']:7.2f} {m['cpu_used']:6.2f} "
            f"{m['seconds']:6.2f} {m['peak'] / 1e6:8.0f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Compare the sides, or print the facts of one as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help="measure this side alone, in this process")
    parser.add_argument("--folder", type=Path, help="checkpoint of --side")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--devices", type=int, default=1, help="CPU devices; of ours alone")
    args = parser.parse_args(argv)
    if args.side:
        devices = {"devices": args.devices} if args.side == "ours" else {}
        print(json.dumps(SIDES[args.side](args.folder, args.dtype, **devices)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), args.gigabytes)
        sides = [(d, s) for d in ("bfloat16", "float32") for s in ("ours", "mapped", "read")]
        found: dict[tuple[str, str], list[Facts]] = {key: [] for key in sides}
        for _ in range(args.rounds):
            for dtype, side in sides:
                found[dtype, side].append(measure(side, path, dtype))
    print(f"{args.gigabytes:g} GB in bfloat16, medians of {args.rounds} rounds")
    print(table((dtype, side, each) for (dtype, side), each in found.items()))


if __name__ == "__main__":
    main()
