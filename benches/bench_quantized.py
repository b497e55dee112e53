"""What weights of int8 and int4 cost a language model in accuracy, and what they save.

    python -m benches.bench_quantized FOLDER TEXT --tokens=8192

Reads a public language model (a hub id or folder) and a text, and prints for each form of its
frozen weights: nats per token, the difference from the weights as floats with its standard error
over rows, the share of positions whose most probable token is that of the floats, and the bytes of
its parameters. Computed in float32, so that rounding of the weights is all that differs.
"""

import argparse
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.dtypes import itemsize_bits

from vadapter.data.tokenizers.pretrained import PretrainedTokenizer
from vadapter.models.paths import flatten
from vadapter.models.quantize import full_precision, quantize
from vadapter.models.registry import make_module
from vadapter.weights.hf_checkpoint import Checkpoint, locate

FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"int8": True},
    "int8, groups of 64": {"int8": True, "scale_group": 64},
    "int4": {"int4": True},
    "int4, groups of 64": {"int4": True, "scale_group": 64},
    "int4, groups of 32": {"int4": True, "scale_group": 32},
}
ROW = 256  # tokens


def score(module: nn.Module, params: Any, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nats of every token but the first of its row, and the most probable tokens."""

    @jax.jit
    def run(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = module.apply({"params": params}, tokens)
        logits = logits[:, :-1].astype(jnp.float32)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1)
        return nats[..., 0], logits.argmax(-1)

    rows = [jax.device_get(run(params, row[None])) for row in tokens]
    nats, best = (np.concatenate(each) for each in zip(*rows, strict=True))
    return nats, best


def bench(folder: Path, text: str, tokens: int) -> list[str]:
    """Return a line for each form."""
    checkpoint = Checkpoint.open(folder)
    ids = PretrainedTokenizer.load(folder).encode(text)[: tokens // ROW * ROW]
    rows = np.asarray(ids, np.int32).reshape(-1, ROW)
    lines, first = [f"{rows.size} tokens in rows of {ROW}"], None
    for name, form in FORMS.items():
        module = make_module("llm", {**checkpoint.spec, **form})
        boxed = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
        abstract = nn.unbox(boxed["params"])
        read = checkpoint.leaves(full_precision(abstract), jnp.dtype("float32"))
        params = quantize(read, abstract)
        size = sum(x.size * itemsize_bits(x.dtype) for x in flatten(params).values()) / 8
        nats, best = score(module, params, rows)
        first = first or (nats, best)
        by_row = (nats - first[0]).mean(1)
        error = by_row.std(ddof=1) / len(by_row) ** 0.5
        lines.append(
            f"{name:20} {nats.mean():.4f} nats ({by_row.mean():+.4f} ± {error:.4f})  same argmax "
            f"{100 * (best == first[1]).mean():5.1f} %  {size / 1e6:7.1f} MB"
        )
        print(lines[-1], flush=True)
    return lines


def main(argv: list[str] | None = None) -> None:
    """Print the lines of a model and a text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="hub id or folder")
    parser.add_argument("text", type=Path, help="a text file")
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args(argv)
    bench(locate(args.model, "model").path, args.text.read_text(encoding="utf-8"), args.tokens)


if __name__ == "__main__":
    main()
