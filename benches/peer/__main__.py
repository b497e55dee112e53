"""Measure rows beside PyTorch: `python -m benches.peer [ROW …]`; `--list` names the rows."""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benches.peer import table
from benches.peer.rows import ROWS
from vadapter import console
from vadapter.config import nearest

Result = dict[str, Any]


def chosen(patterns: list[str]) -> list[str]:
    """Return the rows whose names match one of the patterns, all without any.

    Raises:
      ValueError: a pattern matches none.
    """
    for pattern in patterns:
        if not fnmatch.filter(ROWS, pattern):
            raise ValueError(f"unknown row {pattern!r}{nearest(pattern, ROWS)}")
    return [row for row in ROWS if not patterns or any(fnmatch.fnmatch(row, p) for p in patterns)]


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a process that computes on the CPU with this number of threads."""
    flags = os.environ.get("XLA_FLAGS", "")
    if threads == 1:
        flags += " --xla_cpu_multi_thread_eigen=false"
    count = str(threads)
    return {
        **os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": flags,
        "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
    }  # fmt: skip


def measure(row: str, threads: int, options: list[str]) -> Result:
    """Return the result of a row, measured in its own process, or the error that ended it."""
    command = [sys.executable, "-m", "benches.peer.one", row, f"--threads={threads}", *options]
    done = subprocess.run(command, env=environment(threads), capture_output=True, text=True)
    result: Result = {"row": row, "threads": threads}
    if done.returncode:
        return result | {
            "error": (done.stderr.strip() or f"exit {done.returncode}").splitlines()[-1]
        }
    return result | json.loads(done.stdout.splitlines()[-1])


def results(rows: list[str], threads: list[int], options: list[str]) -> Iterator[Result]:
    """Yield the results of rows one after the other, and name each on stderr before."""
    for row in rows:
        for count in threads:
            console.note(f"{row}, {console.quantity(count, 'thread')}")
            yield measure(row, count, options)


def main(argv: list[str] | None = None) -> int:
    """Print a line per result as it is made, then the table; return 1 if a row failed."""
    parser = argparse.ArgumentParser("benches.peer", description=__doc__, allow_abbrev=False)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="names or patterns (all)")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--threads", default="1", metavar="N,…", help="numbers of threads (1)")
    parser.add_argument("--rounds", type=int, default=10, help="alternating rounds (10)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="also write the numbers there")
    args = parser.parse_args(argv)
    try:
        rows = chosen(args.rows)
    except ValueError as error:
        parser.error(str(error))
    if args.list:
        print(console.table(((row, ROWS[row].about) for row in rows), ("row", "what is timed")))
        return 0
    options = [f"--rounds={args.rounds}", *["--no-compile"] * args.no_compile]
    done = []
    for result in results(rows, [int(count) for count in args.threads.split(",")], options):
        done.append(result)
        if args.out:
            table.write_csv(args.out, done)
    print(table.as_text(done))
    return int(any("error" in result for result in done))


if __name__ == "__main__":
    sys.exit(main())
