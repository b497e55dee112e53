"""How many cores this process may use, and how many threads and processes read data with them."""

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_MOST_THREADS = 16  # of one process: more would wait for the interpreter's lock


def available(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> int:
    """Return the number of cores that affinity and the quotas of control groups leave, at least 1.

    Quotas are those of Linux's cgroups, version 2 or 1, of this process's group and of all above
    it, as containers and SLURM set them; a part of a core counts as one.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS has neither
        cores = os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas(cgroups, own))]))


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Return all quotas that apply, in cores."""
    found = []
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        v1 = "cpu" in controllers.split(",")
        if controllers and not v1:
            continue
        root = cgroups / "cpu" if v1 else cgroups
        group = root / path.lstrip("/")
        # In a container, the path may be that outside of it: its own group is then the root.
        for folder in [group, *group.parents]:
            found += _quota(folder, v1=v1)
            if folder == root:
                break
    return found


def _quota(folder: Path, *, v1: bool) -> list[float]:
    try:
        if v1:
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
            quota, period = ((folder / name).read_text() for name in names)
        else:
            quota, period = (folder / "cpu.max").read_text().split()
        microseconds = int(quota)
        return [microseconds / int(period)] if microseconds > 0 else []
    except (OSError, ValueError):  # no such file, or "max"
        return []


def readers(workers: int, threads: int | None, cores: int) -> tuple[int, int]:
    """Return the processes that read data, and the threads of each (of this one without any).

    Args:
      workers: -1: a process for each core but one, which this process needs.
      threads: None: as many as there are cores, divided among the workers; at least two in this
        process, as one may wait for the disk.
    """
    if workers < 0:
        workers = cores - 1
    if threads is None:
        threads = max(1 if workers else 2, min(cores // max(workers, 1), _MOST_THREADS))
    return workers, threads
