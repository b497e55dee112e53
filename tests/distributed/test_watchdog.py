"""When the watchdog barks: told by what it asks of `faulthandler`, which does the rest."""

import contextlib
import faulthandler
import os
import pty

import pytest
from support.patches import use_clock, use_host_count

from vadapter.distributed import watchdog
from vadapter.errors import ConfigError


@contextlib.contextmanager
def standard_input(descriptor):
    """Let standard input be a copy of the descriptor."""
    saved = os.dup(0)
    os.dup2(descriptor, 0)
    try:
        yield
    finally:
        os.dup2(saved, 0)
        os.close(saved)


@pytest.fixture
def clock(monkeypatch):
    """A stopped clock, which the test moves."""
    return use_clock(monkeypatch, 1000.0)


@pytest.fixture
def limits(monkeypatch, clock):
    """The limits that were set, in order; None where one was lifted. There is no terminal."""
    seen = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda s, **_: seen.append(s))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: seen.append(None))
    monkeypatch.delenv("VADAPTER_WATCHDOG", raising=False)
    watchdog.disarm()  # earlier tests may have armed it
    seen.clear()
    with open(os.devnull) as null, standard_input(null.fileno()):
        yield seen
    watchdog.disarm()


def test_a_step_has_ten_minutes_by_default_and_one_that_compiles_an_hour(limits, monkeypatch):
    watchdog.beat()
    watchdog.beat(slow=True)
    monkeypatch.setenv("VADAPTER_WATCHDOG", "7")
    watchdog.beat()
    assert limits == [600, 3600, 7]


def test_quick_steps_do_not_pay_for_it(limits, clock):
    for now in (1000.0, 1000.4, 1000.9, 1001.1, 1001.2):
        clock[0] = now
        watchdog.beat()
    assert limits == [600, 600]


def test_after_a_loop_one_process_has_no_deadline_and_several_have(limits, monkeypatch):
    assert [*watchdog.watch("ab")] == ["a", "b"]
    assert limits == [600, None]
    use_host_count(monkeypatch, 2)
    items = watchdog.watch("ab")
    next(items)
    with pytest.raises(ZeroDivisionError):
        items.throw(ZeroDivisionError)
    assert limits[2:] == [600, 3600]


def test_a_stopping_process_gets_no_more_time_by_making_progress(limits, clock):
    watchdog.beat()
    watchdog.exit_within(100)
    clock[0] = 1060.0
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
    leader, follower = pty.openpty()
    with standard_input(follower):
        watchdog.beat()
        assert not limits
        use_host_count(monkeypatch, 2)
        watchdog.beat()
    assert limits == [600]
    os.close(leader)
    os.close(follower)


def test_a_limit_that_is_no_number_is_refused(limits, monkeypatch):
    monkeypatch.setenv("VADAPTER_WATCHDOG", "soon")
    with pytest.raises(ConfigError, match="VADAPTER_WATCHDOG='soon': must be seconds, 0 or more"):
        watchdog.beat()
