"""`vadapter data doctor`: which official files of a benchmark are there, and what they hold."""

from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark
from vadapter.data.benchmarks.files import holders, locate, missing, no_media, places
from vadapter.data.benchmarks.registry import BENCHMARKS, find_benchmark
from vadapter.data.benchmarks.source import BenchmarkSource
from vadapter.errors import DataError


def list_benchmarks() -> list[str]:
    """A line for each benchmark: its name, task, default split with official counts, and page."""
    lines = []
    for name, row in BENCHMARKS.items():
        media, texts, _ = row.splits[row.split]
        size = f"{media:,} {row.media}s, {texts:,} {row.task}s"
        lines.append(f"{name:<10} {row.split:<5} {size:<32} {row.homepage}")
    return lines


def diagnose(name: str, folder: Path) -> tuple[list[str], bool]:
    """What is there of a benchmark, and what is missing with the page that it comes from.

    Args:
      name: of the benchmark.
      folder: of its official files.

    Returns:
      Lines to print, and whether the default split can be scored: its files are there and as
      officially published, and so are the training questions, which prompts take examples from. A
      split without some of its images or clips can be scored, and is named as partial.

    Raises:
      ConfigError: no benchmark of that name.
    """
    benchmark = find_benchmark(name)
    lines = [f"{name}, {benchmark.task}s, in {folder}; official page: {benchmark.homepage}"]
    usable = True
    for split in benchmark.splits:
        needed = split == benchmark.split
        lines.append(f"{split}{' (the split that is scored)' * needed}:")
        texts, media = _texts(benchmark, folder, split), _media(benchmark, folder, split)
        complete = True
        for there, line in texts + media:
            lines.append(f"  {'there  ' if there else 'MISSING'} {line}")
            complete &= there
        usable &= not (split == benchmark.training and not all(there for there, _ in texts))
        if complete:
            sound, line = _contents(benchmark, folder, split)
            lines.append(f"  {line}")
            complete &= sound
        usable &= complete or not needed
    return lines, usable


def _texts(benchmark: Benchmark, folder: Path, split: str) -> list[tuple[bool, str]]:
    lines = []
    for file in benchmark.files:
        if split in file.splits:
            try:
                found = locate(folder, file, split)
            except DataError as error:  # a damaged archive
                lines.append((False, str(error)))
                continue
            where = str(found[0]) + f": {found[1]}" * bool(found[1]) if found else ""
            lines.append((bool(found), where or missing(folder, file, split)))
    return lines


def _media(benchmark: Benchmark, folder: Path, split: str) -> list[tuple[bool, str]]:
    lines = []
    for place in places(benchmark, split):
        there = ", ".join(map(str, holders(folder, place, split)))
        lines.append((bool(there), there or no_media(folder, place, split)))
    return lines


def _contents(benchmark: Benchmark, folder: Path, split: str) -> tuple[bool, str]:
    """Whether a split can be read, and how it compares with the official one."""
    try:
        source = BenchmarkSource(benchmark, folder, split)
    except DataError as error:
        return False, f"UNUSABLE {error}"
    media, texts, _ = benchmark.splits[split]
    if source.official:
        return True, f"complete: {media:,} {benchmark.media}s, {texts:,} {benchmark.task}s"
    return True, f"PARTIAL {source.note}; its scores are not official"
