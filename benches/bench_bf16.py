"""Products of few rows in bfloat16 and float32 on a CPU, by XLA and PyTorch: what bounds decoding.

    python -m benches.bench_bf16

One token of a language model in bfloat16 is a chain of products of a few rows with weights that do
not fit in the caches. Each formulation and compiler option is timed beside the float32 product of
XLA and the bfloat16 product of PyTorch (extra `parity`) on the same sizes: SmolLM2-135M's
feed-forward, 60 matrices. Prints CPU ms for all 60, medians of alternating rounds.

Legend: M rows, I inputs, O outputs, L matrices.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

L, I, O = 60, 576, 1536  # noqa: E741
FORMS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "dot": lambda x, w: x @ w,
    "dot, float32 sums": lambda x, w: jnp.einsum(
        "mi,io->mo", x, w, preferred_element_type=jnp.float32
    ).astype(x.dtype),
    "dot, weights [O, I]": lambda x, w: jnp.einsum("mi,oi->mo", x, w.reshape(O, I)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no YNNPACK": {"xla_cpu_experimental_ynn_fusion_type": ""},
    "oneDNN": {"xla_cpu_use_onednn": True, "xla_cpu_experimental_ynn_fusion_type": ""},
    "512-bit": {"xla_cpu_prefer_vector_width": 512, "xla_cpu_experimental_ynn_fusion_type": ""},
}


def _products(fn: Callable[..., jax.Array], x: jax.Array, weights: list[jax.Array]) -> Any:
    return [fn(x, w) for w in weights]


def xla(rows: int, dtype: Any) -> dict[str, Callable[[], Any]]:
    """Return the compiled products of every form and option that the compiler accepts."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, I)), dtype)
    weights = [jnp.asarray(rng.standard_normal((I, O)), dtype) for _ in range(L)]
    out: dict[str, Callable[[], Any]] = {}
    for form, fn in FORMS.items():
        for option, values in OPTIONS.items():
            products = functools.partial(_products, fn)
            try:
                run = jax.jit(products, compiler_options=values).lower(x, weights).compile()
            except jax.errors.JaxRuntimeError:  # an option of other versions
                continue
            name = f"XLA {jnp.dtype(dtype).name}, {form}, {option}"
            out[name] = lambda run=run: jax.block_until_ready(run(x, weights))
    return out


def torch_products(rows: int) -> dict[str, Callable[[], Any]]:
    """Return PyTorch's bfloat16 product, as its linear layers compute it; none without PyTorch."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(1)
    x = torch.randn(rows, I).bfloat16()
    weights = [torch.randn(O, I).bfloat16() for _ in range(L)]
    linear = torch.nn.functional.linear

    def run() -> Any:
        with torch.inference_mode():
            return [linear(x, w) for w in weights]

    return {"PyTorch bfloat16, linear": run}


def main(argv: list[str] | None = None) -> None:
    """Print a line for each product, fastest first."""
    parser = argparse.ArgumentParser("bench_bf16", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", default="1,8,512", metavar="M,…", help="rows (1,8,512)")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds (7)")
    args = parser.parse_args(argv)
    for rows in map(int, args.rows.split(",")):
        runs = xla(rows, jnp.bfloat16) | xla(rows, jnp.float32) | torch_products(rows)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                start = time.process_time()
                run()
                times[name].append(1e3 * (time.process_time() - start))
        medians = {name: statistics.median(of[1:]) for name, of in times.items()}
        print(f"{rows} rows")
        for name, ms in sorted(medians.items(), key=lambda item: item[1]):
            print(f"  {ms:7.2f} ms  {name}", flush=True)


if __name__ == "__main__":
    main()
