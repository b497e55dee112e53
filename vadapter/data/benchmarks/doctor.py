"""`vadapter data doctor`: which official files of a benchmark are present, and what they hold."""

from collections.abc import Iterator
from pathlib import Path

from vadapter.data.benchmarks import files as official
from vadapter.data.benchmarks.benchmark import Benchmark
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
    """Report which official files of a benchmark `folder` has, and the pages of the missing ones.

    Returns lines to print, and whether the default split can be scored: its files are present and
    in the official format, and so are the training questions, which few-shot prompts take examples
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
        files = list(_files(benchmark, folder, split))
        parts = [*files, *_media(benchmark, folder, split)]
        complete = all(present for present, _ in parts)
        lines += [f"  {'present' if present else 'MISSING'} {line}" for present, line in parts]
        if split == benchmark.training:
            usable &= all(present for present, _ in files)
        if complete:
            complete, line = _contents(benchmark, folder, split)
            lines.append(f"  {line}")
        usable &= complete or not needed
    return lines, usable


def _files(benchmark: Benchmark, folder: Path, split: str) -> Iterator[tuple[bool, str]]:
    """Yield, for each annotation file, whether it is present, and its location or remedy."""
    for file in benchmark.files:
        if split in file.splits:
            try:
                stored = official.locate(folder, file, split)
            except DataError as error:  # a corrupt archive
                yield False, str(error)
            else:
                yield stored is not None, str(stored or official.missing_file(folder, file, split))


def _media(benchmark: Benchmark, folder: Path, split: str) -> Iterator[tuple[bool, str]]:
    """Yield, for each set of images or clips, what `_files` yields for a file."""
    for media_set in official.media_sets(benchmark, split):
        holders = ", ".join(map(str, official.find_holders(folder, media_set, split)))
        yield bool(holders), holders or official.missing_media(folder, media_set, split)


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
