"""How fast a stage trains here: `python -m benches.bench_step --help`.

Random weights and images at the recipe's sizes; nothing is read from disk. The share of the peak
is that of the products that the step needs (`flops.formula`: nothing recomputed) at the measured
step time, over a large matrix product's rate measured in the same run.

Legend: B batch, F frames, n size of the matrices.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benches.fake_batch import fake_batch
from vadapter import __version__, config
from vadapter.distributed.memory import exhausted
from vadapter.distributed.mesh import make_mesh, shardings_of
from vadapter.models.generate import Decode
from vadapter.recipe.schema import Recipe, read, resized
from vadapter.stages import flops
from vadapter.stages.stage import Stage
from vadapter.stages.steps import init_state

MATMUL = {"cpu": 1024}  # n; elsewhere 8192


def matmul_peak(n: int = 0, repeats: int = 20) -> float:
    """Return the FLOP/s of a bfloat16 product of two random n × n matrices on one device."""
    n = n or MATMUL.get(jax.default_backend(), 8192)
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    return 2 * n**3 / statistics.median(_times(lambda: product(a, b), repeats))


def _times(run: Callable[[], Any], repeats: int, group: int = 5) -> list[float]:
    """Return seconds per call, each the mean of a group of calls that are queued on the device."""
    jax.block_until_ready(run())
    times = []
    for _ in range(max(repeats // group, 1)):
        start, out = time.perf_counter(), None
        for _ in range(group):
            out = run()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / group)
    return times


def random_arguments(stage: Stage) -> tuple[Any, Any, Any]:
    """Return (state, frozen, batch) of the train step with random content, on the devices."""
    state, frozen, batch = stage.arguments()
    rng = jax.random.key(0)
    random = stage.initializer.random
    sizes = stage.sizes()
    content: Any = fake_batch(
        stage.config.batch, frames=sizes.get("F", 0), size=sizes.get("S", 0),
        prompt_len=sizes["P"], text_len=sizes["T"], segments=1, vocab_size=stage.vocab_size,
    )  # fmt: skip
    content |= {key: content[key][:, : sizes["M"]] for key in ("target_at", "targets", "weights")}
    init = jax.jit(lambda p: init_state(p, stage.tx), out_shardings=shardings_of(state))
    return (
        init(random(stage.trained, rng, state.params)),
        random(frozen, rng, frozen),
        jax.device_put(content, shardings_of(batch)),
    )


def bench(stage: Stage, *, repeats: int = 20, max_new: int = 0) -> dict[str, Any]:
    """Compile and time a stage's step, and its generation if `max_new` is above 0.

    Args:
      repeats: steps.
      max_new: tokens of each generation.

    Returns:
      `compile_s`, `ms` (median per step), `rows_s`, `tflops` (of the formula) and `tflops_run`
      (with recomputation) per second and device, `temporary_gb`; of the generation `texts_s`.
    """
    rows, devices = stage.config.batch, stage.mesh.size
    state, frozen, batch = random_arguments(stage)
    start = time.perf_counter()
    compiled = stage.jit_train_step().lower(state, frozen, batch).compile()
    memory: Any = compiled.memory_analysis()
    out: dict[str, Any] = {"compile_s": time.perf_counter() - start}

    def run() -> Any:
        nonlocal state  # its memory is reused
        state, metrics = compiled(state, frozen, batch)
        return metrics

    seconds = statistics.median(_times(run, repeats))
    loss = float(run()["loss"])
    counted = flops.count(stage.train_step, *stage.arguments())
    needed = sum(flops.formula(stage).values())
    out |= {
        "ms": 1000 * seconds,
        "rows_s": rows / seconds,
        "tflops": needed / seconds / devices / 1e12,
        "tflops_run": counted / seconds / devices / 1e12,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "loss": loss,
    }
    if max_new and stage.captions:
        params = state.params | frozen
        start = time.perf_counter()
        decode = jax.jit(stage.decode(Decode(max_new))).lower(params, batch).compile()
        out["decode_compile_s"] = time.perf_counter() - start
        out["texts_s"] = rows / statistics.median(_times(lambda: decode(params, batch), 2, 2))
    return out | device_peak()


def device_peak() -> dict[str, float]:
    """Return `peak_gb`, the most memory of the process so far; {} if the device does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_gb": peak / 1e9}


def parse(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """Return the arguments, and the overrides of the recipe, `KEY=VALUE`; exit on any other."""
    args, rest = parser.parse_known_args(argv)
    if unknown := [item for item in rest if not item.startswith("--config.")]:
        parser.error(f"unknown {' '.join(unknown)}")
    return args, [item.removeprefix("--config.") for item in rest]


def main(argv: list[str] | None = None) -> None:
    """Print one JSON object per line: the machine, then each setting."""
    parser = argparse.ArgumentParser("bench_step", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGS]", help="the recipe")
    parser.add_argument("--stage", default="", metavar="S", help="stage (the last of the chain)")
    parser.add_argument("--batch", default="0", metavar="N,…", help="rows per step (the stage's)")
    parser.add_argument("--frames", default="1", metavar="F,…", help="of a row (1: images)")
    parser.add_argument("--remat", default="", metavar="R,…", help="remat of components")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="steps (20)")
    parser.add_argument("--max-new", type=int, default=0, metavar="N", help="also time generation")
    args, overrides = parse(parser, argv)
    values = config.load(args.config)
    config.override(values, overrides, Recipe)
    recipe = read(values)
    name = args.stage or recipe.chain[-1]
    peak = matmul_peak()
    device = jax.devices()[0]
    _print({
        "device": device.device_kind, "devices": jax.device_count(), "matmul_tflops": peak / 1e12,
        "jax": jax.__version__, "python": sys.version.split()[0], "vadapter": __version__,
    })  # fmt: skip
    mesh = make_mesh(recipe.mesh)
    for batch in map(int, args.batch.split(",")):
        for frames in map(int, args.frames.split(",")):
            for remat in args.remat.split(","):
                setting = {"config": args.config, "stage": name, "batch": batch, "remat": remat}
                sized = resized(recipe, name, batch=batch, frames=frames, remat=remat)
                stage = Stage(sized, name, mesh)
                setting |= {"frames": stage.sizes().get("F", 0)}
                try:
                    result = bench(stage, repeats=args.repeats, max_new=args.max_new)
                    result["share"] = result["tflops"] * 1e12 / peak
                except jax.errors.JaxRuntimeError as error:
                    if not exhausted(error):
                        raise
                    result = {"error": "out of memory"}
                _print(setting | result)


def _print(row: dict[str, Any]) -> None:
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(short), flush=True)


if __name__ == "__main__":
    main()
