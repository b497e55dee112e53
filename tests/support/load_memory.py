"""Peak memory and speed of loading a checkpoint in a process that does nothing else.

    python tests/weights/load_memory.py write FOLDER GIGABYTES
    python tests/weights/load_memory.py load FOLDER DEVICES DTYPE      (DTYPE: bfloat16 | float32)
    python tests/weights/load_memory.py safetensors FOLDER             (the library itself)

Linux only: resident memory is read, and its peak reset, under /proc. On the CPU backend arrays are
host memory, so the peak holds what was loaded, too.
"""

import json
import os
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

CONFIG = {"model_type": "llama", "num_attention_heads": 16, "num_key_value_heads": 4,
          "max_position_embeddings": 2048}  # fmt: skip


def write(folder: Path, gigabytes: float) -> Path:
    """A random Llama in bfloat16, of four shards with an index, whose layers outweigh its ends."""
    from safetensors.numpy import save_file

    width = 64 * round(32 * (gigabytes / 2) ** 0.5)
    config = CONFIG | {"hidden_size": width, "intermediate_size": 11 * width // 4,
                       "vocab_size": 16 * width, "num_hidden_layers": 20}  # fmt: skip
    block = np.random.default_rng(0).standard_normal(999_983, np.float32)
    block = block.astype(ml_dtypes.bfloat16)  # of a prime length: no two tensors are alike
    names, files = shapes(config), {}
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(4):
        file = f"model-{shard + 1:05d}-of-00004.safetensors"
        part = dict(list(names.items())[shard::4])
        drawn = {n: np.resize(np.roll(block, 7 * len(n)), shape) for n, shape in part.items()}
        save_file(drawn, folder / file)
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name to shape [out, in] of a Llama's tensors."""
    width, mlp = config["hidden_size"], config["intermediate_size"]
    narrow = width * config["num_key_value_heads"] // config["num_attention_heads"]
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


def load(folder: Path, devices: int, dtype: str) -> dict[str, float]:
    """Bytes and seconds: `peak` above what the process had, own `shards`, `largest` tensor."""
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
    before, began = _reset(), time.perf_counter()
    params = dict(checkpoint.leaves(abstract, jnp.dtype(dtype)))
    jax.block_until_ready(params)
    seconds = time.perf_counter() - began
    places = [s.data for x in jax.tree.leaves(params) for s in x.addressable_shards]
    own = {x.unsafe_buffer_pointer(): x.nbytes for x in places}  # replicas of a host share memory
    return {
        "peak": _status("VmHWM") - before,
        "left": _status("VmRSS") - before,
        "shards": sum(own.values()),
        "largest": max(sizes),
        "stored": sum(sizes),
        "seconds": seconds,
    }


def safetensors(folder: Path) -> dict[str, float]:
    """The library's own reading of every tensor, into arrays of the dtype stored."""
    from safetensors import safe_open

    before, began = _reset(), time.perf_counter()
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    seconds = time.perf_counter() - began
    stored = sum(t.nbytes for t in tensors.values())
    return {"peak": _status("VmHWM") - before, "stored": stored, "seconds": seconds}


def _reset() -> int:
    """The resident bytes of this process, from which its peak is counted from now on."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))


if __name__ == "__main__":
    command, where, *rest = sys.argv[1:]
    if command == "write":
        write(Path(where), float(rest[0]))
    elif command == "load":
        print(json.dumps(load(Path(where), int(rest[0]), rest[1])))
    else:
        print(json.dumps(safetensors(Path(where))))
