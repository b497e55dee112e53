"""Everything that is measured on a GPU, in ten minutes: `python -m benches.gpu --out=DIR`.

Steps and decoding of the paper's sizes in bfloat16, most important first; each job in a process of
its own, so that one that fails leaves the memory to the next. What is not begun in time is named.
`--tiny` runs the same jobs at the quickstart's sizes, on any device.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vadapter import console

INT8 = "--config.components.llm.int8=true"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the jobs run on.

    Attributes:
      adapter, decoder: recipe and stage of stage 2 and stage 1.
      batch: of a step of both.
      rows: of decoding.
      repeats: steps.
      common: overrides of all recipes.
    """

    adapter: tuple[str, str]
    decoder: tuple[str, str]
    batch: tuple[int, int]
    rows: str = "1,64"
    repeats: int = 20
    common: tuple[str, ...] = ()

    def jobs(self) -> dict[str, list[str]]:
        """Return name -> arguments of Python, in the order of their importance."""
        repeats = f"--repeats={self.repeats}"

        def step(what: tuple[str, str], batch: int, *more: str) -> list[str]:
            where = [f"--config={what[0]}", f"--stage={what[1]}", f"--batch={batch}"]
            return ["-m", "benches.bench_step", *where, repeats, *self.common, *more]

        def decode(*more: str) -> list[str]:
            where = [f"--config={self.adapter[0]}", f"--stage={self.adapter[1]}"]
            rows = f"--batch={self.rows}"
            return ["-m", "benches.bench_decode", *where, rows, *self.common, *more]

        second, first = self.batch
        return {
            "stage 2": step(self.adapter, second),
            "stage 1": step(self.decoder, first),
            "decoding": decode(),
            "stage 2, int8": step(self.adapter, second, INT8),
            "decoding, int8": decode("--alone", INT8),
        }


PAPER = "configs/paper.py:stage={},encoder=l,llm=1b"
FULL = Sizes((PAPER.format(2), "vadapter"), (PAPER.format(1), "decoder"), (64, 128))
QUICKSTART = "configs/quickstart.py:weights="
TINY = Sizes(
    (QUICKSTART, "vadapter"), (QUICKSTART, "decoder"), (4, 4), "1,2", 2,
    ("--config.dtype=bfloat16", "--config.chain=vadapter", "--config.tokenizer.vocab_size=64"),
)  # fmt: skip


def run(jobs: dict[str, list[str]], seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects that jobs print, each with its `job`, and why one has none."""
    end = time.monotonic() + seconds
    for name, arguments in jobs.items():
        left = end - time.monotonic()
        if left <= 0:
            yield {"job": name, "error": "not begun: no time was left"}
            continue
        console.note(f"{name}: {' '.join(arguments)}")
        try:
            done = subprocess.run(
                [sys.executable, *arguments], capture_output=True, text=True, timeout=left
            )
            out, failed = done.stdout, done.returncode
            reason = (done.stderr.strip().splitlines() or [f"exit {failed}"])[-1]
        except subprocess.TimeoutExpired as late:
            out, failed = (late.stdout or b"").decode(), 1
            reason = f"stopped after {left:.0f} s: no time was left"
        for line in filter(lambda line: line.startswith("{"), out.splitlines()):
            yield {"job": name, **json.loads(line)}
        if failed:
            yield {"job": name, "error": reason}


def report(results: Iterator[dict[str, Any]], path: Path | None) -> int:
    """Print each result, append it to the file at `path`, and return 1 if a job failed, else 0."""
    failed = False
    for result in results:
        failed |= "error" in result
        line = json.dumps(result)
        print(line, flush=True)
        if path:
            with path.open("a") as file:
                file.write(line + "\n")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Print a JSON object per result; return 1 if a job failed."""
    parser = argparse.ArgumentParser("gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="at the quickstart's sizes")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all jobs (9.5)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write gpu.jsonl there")
    args = parser.parse_args(argv)
    results = run((TINY if args.tiny else FULL).jobs(), 60 * args.minutes)
    return report(results, args.out / "gpu.jsonl" if args.out else None)


if __name__ == "__main__":
    sys.exit(main())
