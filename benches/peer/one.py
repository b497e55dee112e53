"""Measure one row in this process, on its own cores; see `__main__`."""

import argparse
import json
import os
import sys
from typing import Any

from benches.peer.rows import ROWS, function
from vadapter.errors import ConfigError


def pin(threads: int) -> None:
    """Bind this process to as many of its cores as it has threads.

    Raises:
      ConfigError: there are fewer.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads:
        raise ConfigError(f"{threads} threads need as many cores; this process has {len(cores)}")
    os.sched_setaffinity(0, cores[:threads])


def main(argv: list[str] | None = None) -> None:
    """Print the result of a row as JSON."""
    parser = argparse.ArgumentParser("benches.peer.one", description=__doc__)
    parser.add_argument("row", choices=ROWS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    pin(args.threads)  # before the libraries count the cores

    from benches.peer.measure import Options, Skipped
    from vadapter.distributed import cpu

    cpu.prepare()  # as in a run; torch gains by it, too
    options = Options(args.rounds, not args.no_compile, args.threads)
    try:
        result = measured(args.row, options)
    except Skipped as reason:
        result = {"skipped": str(reason)}
    print(json.dumps(result))


def measured(row: str, options: Any) -> dict[str, Any]:
    """Return the result of a row.

    Raises:
      Skipped: it needs what is not there.
    """
    from benches.peer.measure import Skipped

    try:
        measure = function(row)
    except ModuleNotFoundError as error:
        raise Skipped(f"{error}: pip install 'vadapter[parity]'") from error
    return measure(options, **ROWS[row].settings)


if __name__ == "__main__":
    sys.exit(main())
