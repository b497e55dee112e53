"""Memory of a train step on the CPU beside what is said about it: `python -m benches.memory`.

A row per recipe and stage, each in a process of its own: the bytes of the arguments and how far the
process grows while a step runs; what the compiler says (arguments, temporaries, and results that
reuse no argument); and what `vadapter plan --topology=cpu:1` estimates from the trace. Needs Linux.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax

from benches.peer.case import Case
from benches.peer.rows import ROWS
from benches.resident import forget_peak, resident
from vadapter import console
from vadapter.distributed.compile import jit
from vadapter.distributed.topology import parse
from vadapter.plan.estimate import Setting, estimate_peak

CASES = ("nano-lm", "nano-vadapter", "flickr8k-lm", "flickr8k-vadapter", "s30m-vadapter")


def release() -> None:
    """Return freed memory to the kernel, which would else serve the step without being counted."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def measure(name: str) -> dict[str, int]:
    """Return bytes: `measured`, `compiled` and `planned`, and two parts of `compiled`."""
    case = Case(**ROWS[name].settings)
    stage = case.open()
    batch = case.batch(stage)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    state, frozen, _ = stage.arguments()
    compiled = (
        stage.jit_train_step(jit=jit).lower(state, case.used(stage, frozen), shapes).compile()
    )
    said: Any = compiled.memory_analysis()
    arguments = [*case.parameters(stage), jax.device_put(batch)]
    for _ in range(2):  # the first cannot reuse arrays that came from the host
        release()
        forget_peak()
        before = resident()
        arguments[0], _ = jax.block_until_ready(compiled(*arguments))
    growth = resident("VmHWM") - before
    held = sum(x.nbytes for x in jax.tree.leaves(arguments))
    kept = said.output_size_in_bytes - said.alias_size_in_bytes
    parts = {"arguments": said.argument_size_in_bytes, "temporaries": said.temp_size_in_bytes}
    return {
        "measured": held + growth,
        "compiled": sum(parts.values()) + kept,
        "planned": estimate_peak(stage.recipe, stage.name, Setting(parse("cpu:1"))),
        **parts,
    }


def results(names: list[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the results of cases, each from its own process."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    for name in names:
        command = [sys.executable, "-m", "benches.memory", name, "--here"]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
        yield name, json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Print a table, with the deviation of both numbers from what is measured."""
    parser = argparse.ArgumentParser("memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (all)")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.here:
        print(json.dumps(measure(args.cases[0])))
        return
    lines = []
    for name, row in results(args.cases or list(CASES)):
        off = (f"{row[key] / row['measured'] - 1:+.1%}" for key in ("compiled", "planned"))
        lines.append((name, *map(console.size, row.values()), *off))
    head = (
        "step", "measured", "compiled", "planned", "arguments", "temporaries", "compiled off",
        "planned off",
    )  # fmt: skip
    print(console.table(lines, head, right=set(range(1, len(head)))))


if __name__ == "__main__":
    main()
