"""When the watchdog barks: told by what it asks of `faulthandler`, which does the rest."""

import faulthandler
import math
import os
import time

import pytest

from vadapter.distributed import hosts, watchdog
from vadapter.errors import ConfigError


@pytest.fixture
def limits(monkeypatch):
    """The limits that were set, in order; None where one was lifted. The clock stands still."""
    seen = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, **_: seen.append(s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: seen.append(None))
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    monkeypatch.setattr(watchdog, "_armed", (-math.inf, 0.0))
    monkeypatch.setattr(watchdog, "_end", math.inf)
    monkeypatch.delenv("VADAPTER_WATCHDOG", raising=False)
    return seen


def test_every_step_has_ten_minutes_unless_told_otherwise_and_one_that_compiles_an_hour(
    limits, monkeypatch
):
    watchdog.beat()
    watchdog.beat(slow=True)
    monkeypatch.setenv("VADAPTER_WATCHDOG", "7")
    watchdog.beat()
    assert limits == [600, 3600, 7]


def test_quick_steps_do_not_pay_for_it(limits, monkeypatch):
    for now in (1000.0, 1000.4, 1000.9, 1001.1, 1001.2):
        monkeypatch.setattr(time, "monotonic", lambda now=now: now)
        watchdog.beat()
    assert limits == [600, 600]


def test_after_a_loop_one_process_may_take_its_time_and_several_may_not(limits, monkeypatch):
    assert [*watchdog.watch("ab")] == ["a", "b"]
    assert limits == [600, None]
    monkeypatch.setattr(hosts, "count", lambda: 2)
    items = watchdog.watch("ab")
    next(items)
    with pytest.raises(ZeroDivisionError):
        items.throw(ZeroDivisionError)
    assert limits[2:] == [600, 3600]


def test_whoever_was_asked_to_end_gets_no_more_time_by_working_on(limits, monkeypatch):
    watchdog.beat()
    watchdog.exit_within(100)
    monkeypatch.setattr(time, "monotonic", lambda: 1060.0)
    watchdog.beat(slow=True)
    watchdog.pause()
    assert limits == [600, 100, 40]
    watchdog.disarm()
    watchdog.beat()
    assert limits[3:] == [None, 600]


def test_it_can_be_switched_off_and_at_a_terminal_it_is(limits, monkeypatch):
    monkeypatch.setenv("VADAPTER_WATCHDOG", "0")
    watchdog.beat()
    monkeypatch.delenv("VADAPTER_WATCHDOG")
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    watchdog.beat()
    assert not limits
    monkeypatch.setattr(hosts, "count", lambda: 2)
    watchdog.beat()
    assert limits == [600]


def test_a_limit_that_is_no_number_is_refused(limits, monkeypatch):
    monkeypatch.setenv("VADAPTER_WATCHDOG", "soon")
    with pytest.raises(ConfigError, match="VADAPTER_WATCHDOG='soon': must be seconds, 0 or more"):
        watchdog.beat()
