"""Text for terminals, logs and messages: sizes, durations, counts, tables and progress.

One format for each, so that every command and every error writes them the same way.
"""

import itertools
import math
import sys
import textwrap
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

WIDTH = 98  # columns of reports
LIMIT = 12  # lines of a table of differences, or of a list of problems, in a message
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def note(text: object) -> None:
    """Print a line about the command itself to stderr, after its name; stdout is for results."""
    print(f"vadapter: {text}", file=sys.stderr, flush=True)


def size(count: float) -> str:
    """Return a number of bytes in decimal units, with three digits: `999 kB`, `1.71 GB`."""
    for unit, power in (("TB", 12), ("GB", 9), ("MB", 6), ("kB", 3)):
        if count >= 0.9995 * 10**power:  # 999.5 kB would print as 1e+03 kB
            return f"{count / 10**power:.3g} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: `45 s`, `8 min 0 s`, `2 h 13 min`, `3 d 4 h`."""
    seconds = round(seconds)
    for (unit, length), (smaller, part) in itertools.pairwise(_UNITS):
        if seconds >= length:
            return f"{seconds // length:,} {unit} {seconds % length // part} {smaller}"
    return f"{seconds} s"


def number(value: float) -> str:
    """Return a number with four significant digits; whole numbers in full."""
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.4g}"


def quantity(count: int, noun: str) -> str:
    """Return a count with its noun: `1 shard`, `1,000 shards`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def listing(names: Iterable[Any], limit: int = LIMIT) -> str:
    """Return names in one line: `a, b, c and 4 more`."""
    names = [str(name) for name in names]
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def truncate(lines: Sequence[str], limit: int = LIMIT) -> list[str]:
    """Return the first lines of a long list, then `… 4 more`."""
    more = len(lines) - limit
    return [*lines[:limit], *([f"… {more:,} more"] if more > 0 else [])]


def wrap(line: str, indent: str = "", subsequent: str = "  ") -> list[str]:
    """Return a long line as lines of at most `WIDTH` columns, with a prefix for each."""
    return textwrap.wrap(line, WIDTH, initial_indent=indent, subsequent_indent=subsequent)


def table(
    rows: Iterable[Sequence[str]], header: Sequence[str], *, right: Collection[int] = (),
    separator: str = "  ", rule: bool = True,
) -> str:  # fmt: skip
    """Return rows of cells as aligned columns; a cell with line breaks takes several lines.

    Args:
      rows, header: the cells, and the titles of the columns.
      right: columns to align on the right, counted from 0.
      separator: text between columns.
      rule: underline the header.
    """
    cells = [[str(cell).split("\n") for cell in row] for row in (header, *rows)]
    columns = zip(*cells, strict=True)
    widths = [max(len(line) for cell in column for line in cell) for column in columns]
    lines = []
    for row in cells:
        for texts in itertools.zip_longest(*row, fillvalue=""):
            aligned = (
                text.rjust(width) if column in right else text.ljust(width)
                for column, (text, width) in enumerate(zip(texts, widths, strict=True))
            )
            lines.append(separator.join(aligned).rstrip())
        if rule and row is cells[0]:
            lines.append(separator.join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Return the cells of `table` as a Markdown table."""

    def line(row: Sequence[str], line_break: str) -> str:
        cells = (str(cell).replace("\n", line_break).replace("|", "\\|") for cell in row)
        return f"| {' | '.join(cells)} |"

    rule = "|" + "---|" * len(header)
    return "\n".join([line(header, " "), rule, *(line(row, "<br>") for row in rows)]) + "\n"


def difference_table(
    rows: Sequence[tuple[str, Any, Any]],
    header: tuple[str, str, str] = ("key", "saved", "this run"),
    limit: int = LIMIT,
) -> str:
    """Return differences, see `config.differences`, as an indented table for a message."""
    shown = [(key, str(saved), str(current)) for key, saved, current in rows[:limit]]
    text = table(shown, header, separator=" | ", rule=False)
    more = len(rows) - limit
    return textwrap.indent(text + (f"\n… {more:,} more" if more > 0 else ""), "  ")


class Progress:
    """Progress of a task: a bar on a terminal, a line every few seconds elsewhere.

    The rate, and with it the time left, is measured from the first update on: neither compilation
    nor the work of an earlier attempt counts.

    Args:
      title: name of the task, before every line; "" hides the progress.
      total: amount of work, in any unit.
      done: work of an earlier attempt.
      every: seconds between lines, where there is no bar.
      file: stream that is written to; stdout if None.
      say: receives the lines instead of `file`; there is no bar then.
      amount: formats an amount of work.
    """

    def __init__(
        self, title: str, total: int, done: int = 0, *, every: float = 10.0,
        file: TextIO | None = None, say: Callable[[str], Any] | None = None,
        amount: Callable[[int], str] = "{:,}".format,
    ):  # fmt: skip
        self._title, self._total, self.done = title, total, done
        self._every, self._amount = every, amount
        self._file, self._say = file or sys.stdout, say
        self._began = 0.0  # time of the first update
        self._before = done  # work done by then
        self._last = time.monotonic()
        self._bar: RichProgress | None = None
        if title and say is None and self._file.isatty():
            self._bar = _bar(self._file)
            self._bar.start()
            self._task = self._bar.add_task(title, total=total, completed=done, text="")
        if done:
            self.say(f"resuming: {amount(done)} of {amount(total)} already done")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    @property
    def live(self) -> bool:
        """Whether a bar is shown."""
        return self._bar is not None

    def advance(self, count: int, note: str = "") -> None:
        """Add finished work, see `update`."""
        self.update(self.done + count, note)

    def update(self, done: int, note: str = "") -> None:
        """Show how much is done in all, at what rate, and how long the rest takes; then a note."""
        self.done, now = done, time.monotonic()
        if not self._began:
            self._began, self._before = now, done
        parts = [f"{self._amount(done)}/{self._amount(self._total)}"]
        if done > self._before and now > self._began:
            rate = (done - self._before) / (now - self._began)
            parts.append(f"{rate:.3g}/s" if rate < 1000 else f"{self._amount(round(rate))}/s")
            if done < self._total:
                parts.append(f"{duration((self._total - done) / rate)} left")
        text = "  ".join([*parts, *([note] if note else [])])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif done >= self._total or now - self._last >= self._every:
            self._last = now
            self.say(text)

    def say(self, text: str) -> None:
        """Print a line after the title, above the bar if there is one."""
        if not self._title:
            return
        line = f"{self._title}: {text}"
        if self._say is not None:
            self._say(line)
        elif self._bar is not None:  # no markup: a digest in brackets is not a style
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._file, flush=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(file: TextIO) -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Rich

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(30),
        TextColumn("{task.fields[text]}", markup=False),
    )
    return Rich(*columns, console=Console(file=file), transient=True)
