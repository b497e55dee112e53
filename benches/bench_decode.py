"""How fast a stage writes here: `python -m benches.bench_decode --help`.

Greedy decoding of 32 tokens a row, with random weights and images at the recipe's sizes, beside
transformers' `generate` with a static cache where torch can use the same device. The language
model is given the form of Llama's, see `peer.decoding.LLAMA`.
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benches.bench_step import device_peak, parse
from benches.peer.case import Case
from benches.peer.decoding import LLAMA, NEW, OurDecoding
from benches.peer.measure import alternate, summary
from vadapter.distributed.memory import exhausted


def torch_device() -> tuple[str, str]:
    """Return the device of torch that is JAX's, "" if there is none, and the reason."""
    if importlib.util.find_spec("torch") is None:
        return "", "torch is not installed: pip install 'vadapter[parity]'"
    import torch

    kind = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), "")
    if kind == "cuda" and not torch.cuda.is_available():
        return "", f"torch {torch.__version__} has no CUDA device"
    return kind, "" if kind else f"torch has no {jax.default_backend()}"


def bench(
    case: Case, batch: int, overrides: Sequence[str], *, rounds: int = 5, device: str = ""
) -> dict[str, Any]:
    """Return the speed of a batch; with torch where it has the `device`.

    Returns:
      `tokens_s` (median, wall time), `compile_s`, `parameters_gb`, `peak_gb` where the device
      reports it; of transformers `torch_tokens_s` and `ratio`, ours over theirs.
    """
    ours = OurDecoding(case, batch, [*LLAMA, *overrides])
    sides: dict[str, Callable[[], Any]] = {"ours": ours}
    bytes_ = sum(x.nbytes for x in jax.tree.leaves(ours.params))
    out = {"batch": batch, "compile_s": ours.compile_seconds, "parameters_gb": bytes_ / 1e9}
    if device:
        from benches.peer.decode_rows import Generate, compare

        sides["torch"] = theirs = Generate(ours, device, static=True)
        exact = ours.stage.recipe.dtype == "float32"
        out["same"] = compare(ours(), theirs(), None if exact else theirs.gap)
    for call in sides.values():
        call()  # transformers compiles its step in the first calls
    times = summary(alternate(sides, rounds, calls=1))
    out["tokens_s"] = batch * NEW / times["ours"]["wall"][0] * 1e3
    if device:
        out["torch_tokens_s"] = batch * NEW / times["torch"]["wall"][0] * 1e3
        out["ratio"] = times["torch"]["ratio_wall"][0]
    return out | device_peak()


def main(argv: list[str] | None = None) -> None:
    """Print one JSON object per batch size."""
    parser = argparse.ArgumentParser("bench_decode", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGS]", help="the recipe")
    parser.add_argument("--stage", required=True, metavar="S")
    parser.add_argument("--batch", default="1,64", metavar="N,…", help="rows (1,64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="without transformers")
    args, overrides = parse(parser, argv)
    device, reason = ("", "not asked for") if args.alone else torch_device()
    for batch in map(int, args.batch.split(",")):
        row: dict[str, Any] = {"config": args.config, "stage": args.stage, "batch": batch}
        try:
            case = Case(args.config, args.stage)
            row |= bench(case, batch, overrides, rounds=args.rounds, device=device)
        except jax.errors.JaxRuntimeError as error:
            if not exhausted(error):
                raise
            row["error"] = "out of memory"
        if not device:
            row["without_torch"] = reason
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
