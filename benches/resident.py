"""Resident memory of this process, as Linux counts it."""

from pathlib import Path

STATUS = Path("/proc/self/status")


def resident(key: str = "VmRSS") -> int:
    """Return the bytes of this process in memory; VmHWM: the most since `forget_peak`."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines[key].split()[0]) * 1024


def forget_peak() -> None:
    """Let the kernel record the largest use of memory from now on."""
    Path("/proc/self/clear_refs").write_text("5")
