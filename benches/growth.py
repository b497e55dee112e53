"""How the time of a train step grows with one size at a time: `python -m benches.growth`.

The stage is `vadapter` of configs/quickstart.py. Work is that of `flops.formula`, in which
attention counts with the square of its length; what is linear in work is therefore as it should be.
A step also has work that is none of these products (norms, optimizer, calls), so that the line
through the times need not begin at zero: the deviation is that from the line with the least squares
of relative errors.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benches.peer.case import Case
from benches.peer.measure import timed
from vadapter import console
from vadapter.distributed import cpu
from vadapter.distributed.compile import jit
from vadapter.stages import flops

CASE = Case("configs/quickstart.py:weights=", "vadapter")
STEPS = 5
# Size -> its least value, and the keys that it sets; {0} is the value and {1} that less two.
SIZES: dict[str, tuple[int, tuple[str, ...]]] = {
    "tlm.depth": (2, ("components.tlm.depth={0}",)),
    "llm.depth": (2, ("components.llm.depth={0}",)),
    "batch": (4, ("stages.vadapter.batch={0}",)),
    "text_len": (
        32,
        tuple(
            f"data.{data}.{key}"
            for data in ("images", "clips")
            for key in ("text_len={0}", "target_len={1}")
        ),
    ),
    "queries": (8, ("components.resampler.queries={0}",)),
}
COMMON = (
    "stages.vadapter.batch=8", "data.images.text_len=32", "data.images.target_len=30",
    "data.images.texts=1", "components.llm.max_len=1024", "components.tlm.max_len=1024",
)  # fmt: skip


def measure(overrides: Sequence[str]) -> dict[str, float]:
    """Return `gflop` of a step, its `ms` and the seconds to compile it (`compile_s`), of CPU."""
    stage = CASE.open([*COMMON, *overrides])
    state, frozen = CASE.parameters(stage)
    batch = jax.device_put(CASE.batch(stage))
    step, compile_s = timed(stage.jit_train_step(jit=jit).lower(state, frozen, batch).compile)
    times = []
    for _ in range(STEPS + 1):
        start = time.process_time()
        state, _ = jax.block_until_ready(step(state, frozen, batch))
        times.append(1000 * (time.process_time() - start))
    gflop = sum(flops.formula(stage).values()) / 1e9
    return {"gflop": gflop, "ms": statistics.median(times[1:]), "compile_s": compile_s}


def deviations(work: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return each time over that of the line nearest to all in relative terms, minus 1."""
    w, t = np.asarray(work), np.asarray(times)
    (slope, start), *_ = np.linalg.lstsq(np.stack([w / t, 1 / t], 1), np.ones(len(t)))
    return (t / (slope * w + start) - 1).tolist()


def main(argv: list[str] | None = None) -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser("growth", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", metavar="SIZE", help=f"of {', '.join(SIZES)} (all)")
    parser.add_argument(
        "--points", type=int, default=5, help="values of each, over a 16× range (5)"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    cpu.prepare()
    lines = []
    for size in args.sizes or SIZES:
        least, keys = SIZES[size]
        values = [round(least * 16 ** (i / (args.points - 1))) for i in range(args.points)]
        rows: list[dict[str, Any]] = []
        for value in values:
            rows.append({"size": size, "value": value})
            rows[-1] |= measure([key.format(value, value - 2) for key in keys])
            console.note(json.dumps(rows[-1]))
        off = deviations([row["gflop"] for row in rows], [row["ms"] for row in rows])
        for row, deviation in zip(rows, off, strict=True):
            row |= {"ms_gflop": row["ms"] / row["gflop"], "deviation": deviation}
            if args.json:
                print(json.dumps(row), flush=True)
            lines.append((
                size, str(row["value"]), f"{row['gflop']:.2f}", f"{row['ms']:.1f}",
                f"{row['ms_gflop']:.1f}", f"{deviation:+.1%}", f"{row['compile_s']:.1f}",
            ))  # fmt: skip
    head = ("size", "value", "GFLOP", "CPU ms", "ms/GFLOP", "from linear", "compile CPU s")
    if not args.json:
        print(console.table(lines, head, right=set(range(1, 7))))


if __name__ == "__main__":
    main()
