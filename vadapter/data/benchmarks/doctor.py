"""`vadapter data doctor`: which official files of a benchmark are present, and what they hold."""

from pathlib import Path

from vadapter.data.benchmarks.benchmark import Benchmark
from vadapter.data.benchmarks.files import (
    find_holders,
    locate,
    media_sets,
    missing_file,
    missing_media,
)
from vadapter.data.benchmarks.source import BenchmarkSource
from vadapter.data.benchmarks.table import BENCHMARKS, find_benchmark
from vadapter.errors import DataError


def list_benchmarks() -> list[str]:
    """Return a line per benchmark: its name, default split with official counts, and page."""
    lines = []
    for name, row in BENCHMARKS.items():
        media, texts, _ = row.splits[row.default_split]
        size = f"{media:,} {row.media}s, {texts:,} {row.task}s"
        lines.append(f"{name:<10} {row.default_split:<5} {size:<32} {row.homepage}")
    return lines


def diagnose(name: str, folder: Path) -> tuple[list[str], bool]:
    """Report which files of a benchmark are present, and which are missing with their pages.

    Args:
      name: name of the benchmark.
      folder: folder of its official files.

    Returns:
      Lines to print, and whether the default split can be scored: its files are present and in the
      official format, and so are the training questions, which few-shot prompts take examples
      from. A split that lacks some images or clips can be scored, and is reported as partial.

    Raises:
      ConfigError: no benchmark of that name.
    """
    benchmark = find_benchmark(name)
    lines = [f"{name}, {benchmark.task}s, in {folder}; official page: {benchmark.homepage}"]
    usable = True
    for split in benchmark.splits:
        needed = split == benchmark.default_split
        lines.append(f"{split}{' (the split that is scored)' * needed}:")
        files, media = _files(benchmark, folder, split), _media(benchmark, folder, split)
        complete = all(present for present, _ in files + media)
        for present, line in files + media:
            lines.append(f"  {'present' if present else 'MISSING'} {line}")
        if split == benchmark.training:
            usable &= all(present for present, _ in files)
        if complete:
            complete, line = _contents(benchmark, folder, split)
            lines.append(f"  {line}")
        usable &= complete or not needed
    return lines, usable


def _files(benchmark: Benchmark, folder: Path, split: str) -> list[tuple[bool, str]]:
    """Return, for each annotation file, whether it is present, and its location or remedy."""
    lines = []
    for file in benchmark.files:
        if split in file.splits:
            try:
                located = locate(folder, file, split)
            except DataError as error:  # a corrupt archive
                lines.append((False, str(error)))
                continue
            if located is None:
                lines.append((False, missing_file(folder, file, split)))
            else:
                lines.append((True, ": ".join(filter(None, map(str, located)))))
    return lines


def _media(benchmark: Benchmark, folder: Path, split: str) -> list[tuple[bool, str]]:
    """Return, for each set of images or clips, what `_files` returns for a file."""
    lines = []
    for media_set in media_sets(benchmark, split):
        holders = ", ".join(map(str, find_holders(folder, media_set, split)))
        lines.append((bool(holders), holders or missing_media(folder, media_set, split)))
    return lines


def _contents(benchmark: Benchmark, folder: Path, split: str) -> tuple[bool, str]:
    """Return whether a split can be read, and how it compares with the official one."""
    try:
        source = BenchmarkSource(benchmark, folder, split)
    except DataError as error:
        return False, f"UNUSABLE {error}"
    media, texts, _ = benchmark.splits[split]
    if source.official:
        return True, f"complete: {media:,} {benchmark.media}s, {texts:,} {benchmark.task}s"
    return True, f"PARTIAL {source.note}; its scores are not official"
