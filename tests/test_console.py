"""Sizes, durations, counts, tables and progress have one format each."""

import io
import math

import pytest
from support.patches import use_clock

from vadapter import console
from vadapter.console import Progress


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1714, "1.71 kB"), (999_499, "999 kB"),
     (999_500, "1 MB"), (16_911_433_728, "16.9 GB"), (2.5e12, "2.5 TB")],
)  # fmt: skip
def test_sizes_have_three_digits_and_a_decimal_unit(count, text):
    assert console.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (480, "8 min 0 s"),
     (3600 * 2 + 60 * 13 + 5, "2 h 13 min"), (86400 * 3 + 3600 * 4, "3 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds, text):
    assert console.duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3.0, "3"), (0.123456, "0.1235"), (1e-9, "1e-09"), (math.nan, "nan"), (-math.inf, "-inf")],
)
def test_numbers_have_four_digits(value, shown):
    assert console.number(value) == shown


def test_a_count_agrees_with_its_noun():
    assert [console.quantity(n, "shard") for n in (0, 1, 1000)] == [
        "0 shards", "1 shard", "1,000 shards"
    ]  # fmt: skip


def test_long_lists_end_with_the_number_of_what_is_left_out():
    assert console.listing("abc") == "a, b, c"
    assert console.listing("abcde", 3) == "a, b, c and 2 more"
    assert console.truncate(["a", "b"], 2) == ["a", "b"]
    assert console.truncate(["a", "b", "c", "d"], 2) == ["a", "b", "… 2 more"]


def test_long_lines_are_wrapped_with_an_indent():
    first, second = console.wrap("word " * 25, "- ")
    assert len(first) <= console.WIDTH
    assert first.startswith("- word")
    assert second.startswith("  word")


def test_a_table_aligns_its_columns():
    text = console.table([("a", "1\n22", "7"), ("b|c", "3", "1,000")], ("x", "long\nhead", "n"),
                         right=(2,))  # fmt: skip
    assert text.splitlines() == [
        "x    long      n",
        "     head",
        "---  ----  -----",
        "a    1         7",
        "     22",
        "b|c  3     1,000",
    ]
    assert console.table([("a", "1")], ("key", "n"), rule=False, separator=" | ") == (
        "key | n\na   | 1"
    )


def test_a_table_without_rows_is_its_header():
    assert console.table([], ("a", "b")) == "a  b\n-  -"


def test_a_markdown_table_escapes_bars():
    page = console.markdown_table([("b|c", "1\n22")], ("x", "y"))
    assert page == "| x | y |\n|---|---|\n| b\\|c | 1<br>22 |\n"


def test_differences_are_a_table_that_says_how_many_are_left_out():
    rows = [("stages.x.steps", 10, 20), ("seed", "—", None), ("name", "a", "b")]
    assert console.difference_table(rows, limit=2).splitlines() == [
        "  key            | saved | this run",
        "  stages.x.steps | 10    | 20",
        "  seed           | —     | None",
        "  … 1 more",
    ]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    return use_clock(monkeypatch, 100.0)


def test_lines_are_rare_and_earlier_work_does_not_count_as_speed(clock):
    out = io.StringIO()
    with Progress("coco", 400, 300, file=out) as progress:
        for _ in range(10):
            clock[0] += 2
            progress.advance(10)
    assert out.getvalue().splitlines() == [
        "coco: resuming: 300 of 400 already done",
        "coco: 350/400  5/s  10 s left",
        "coco: 400/400  5/s",
    ]
    assert not progress.live


def test_the_first_update_which_compiles_does_not_count_as_time(clock):
    said = []
    progress = Progress("features", 5_000_000, every=0, say=said.append, amount=console.size)
    for seconds in (1000, 1):
        clock[0] += seconds
        progress.advance(1_000_000, "1 shard")
    assert said == [
        "features: 1 MB/5 MB  1 shard",
        "features: 2 MB/5 MB  1 MB/s  3 s left  1 shard",
    ]


def test_without_a_title_nothing_is_printed(capsys):
    with Progress("", 2) as progress:
        progress.advance(2)
        progress.say("text")
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_and_lines_above_it(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    with Progress("coco", 5000, file=out) as progress:
        assert progress.live
        for _ in range(2):
            clock[0] += 10
            progress.advance(100, "loss 2")
        progress.say("look [abc1] at [/b].png")
    assert "200/5,000  10/s  8 min 0 s left  loss 2" in out.getvalue()
    assert "coco: look [abc1] at [/b].png\n" in out.getvalue()
