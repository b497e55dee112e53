import math

import jax.numpy as jnp
import pytest
from support.patches import use_clock

from vadapter.errors import DataError, NonFiniteError
from vadapter.recipe.optim import OptimConfig
from vadapter.recipe.schema import StageConfig
from vadapter.train.supervisor import FEW_BAD, Monitor


class Lines:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.rows, self.said = [], []

    def write(self, step, values):
        self.rows.append({"step": step, **values})

    def say(self, text):
        self.said.append(text)

    tell = say


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    return use_clock(monkeypatch)


def make(lines, *, steps=100, log_every=4, batch=8, **more):
    config = StageConfig("lm", steps, batch, {"text": 1.0}, log_every=log_every, **more)
    return Monitor(lines, "stage", config, lambda step: 0.5 / (step + 1), lambda s, i: f"no {i}")


def metrics(skipped=0, bad=0, loss=1.0):
    values = {"loss": loss, "skipped": skipped, "bad": bad}
    return {k: jnp.asarray(v) for k, v in values.items()}


def test_a_line_holds_the_mean_time_of_its_steps_also_where_the_last_is_short(clock):
    lines = Lines()
    journal = make(lines, steps=10)
    for step in range(1, 11):
        clock[0] += 0.5
        journal.add(step, metrics(), [])
        journal.flush()
    assert [(row["step"], row["step_ms"]) for row in lines.rows] == [
        (1, 500.0), (4, 500.0), (8, 500.0), (10, 500.0)
    ]  # fmt: skip
    assert lines.rows[2]["lr"] == 0.5 / 8  # the rate that step 8 used


def test_no_time_falls_between_two_lines_not_even_that_of_writing_them(clock):
    lines = Lines()
    keep = lines.write
    lines.write = lambda *row: keep(*row) or clock.__setitem__(0, clock[0] + 0.25)
    journal = make(lines, log_every=1)
    for step in range(1, 5):
        clock[0] += 0.5
        journal.add(step, metrics(), [])
        journal.flush()
    assert [row["step_ms"] for row in lines.rows] == [500.0, 750.0, 750.0, 750.0]


def test_logging_does_not_wait_for_the_next_step(clock):
    lines, asked = Lines(), []
    optim = OptimConfig(lr_mults={"tlm": 0.25})
    config = StageConfig("lm", 8, 8, {"text": 1.0}, log_every=1, optim=optim)

    def rate(step):
        asked.append(step)
        return 0.5 / (step + 1)

    journal = Monitor(lines, "stage", config, rate, str)
    before = len(asked)
    for step in range(1, 9):
        journal.add(step, metrics(), [])
    journal.flush()
    assert len(asked) == before
    wanted = [0.5 / step for step in range(1, 9)]
    assert [row["lr"] for row in lines.rows] == pytest.approx(wanted)
    assert [row["lr_tlm"] for row in lines.rows] == pytest.approx([x / 4 for x in wanted])


def test_compilation_and_evaluation_do_not_count_as_steps_and_are_logged_once(clock):
    lines = Lines()
    journal = make(lines)
    clock[0] += 30.0
    journal.exclude(30.0, compiling=True)
    for step in range(1, 9):
        clock[0] += 0.25
        journal.add(step, metrics(), [])
        journal.flush()
        if step in (2, 5):
            clock[0] += 100.0
            journal.exclude(100.0)
    assert [row["step_ms"] for row in lines.rows] == [250.0, 250.0, 250.0]
    assert [row.get("compile_s") for row in lines.rows] == [30.0, None, None]


def test_metrics_of_a_step_are_read_during_the_next_or_on_request(clock):
    lines = Lines()
    journal = make(lines)
    journal.add(1, metrics(loss=1.5), [])
    assert not lines.rows
    journal.add(2, metrics(), [])
    assert [row["loss"] for row in lines.rows] == [1.5]
    journal.add(3, metrics(), [])
    journal.add(4, metrics(), [])
    journal.flush()
    journal.flush()
    assert [row["step"] for row in lines.rows] == [1, 4]


def test_a_line_holds_the_mean_loss_of_its_updates_without_the_dropped_ones():
    lines = Lines()
    journal = make(lines)
    nan = float("nan")
    for step, (skipped, loss) in enumerate([(0, 8.0), (0, 1.0), (1, nan), (0, 3.0), (1, nan)], 1):
        journal.add(step, metrics(skipped, loss=loss), [])
    journal.add(8, metrics(2, loss=nan), [])
    journal.flush()
    assert [r["loss"] for r in lines.rows[:2]] == [8.0, 2.0]
    assert math.isnan(lines.rows[2]["loss"])  # not a single update


def test_counts_between_two_lines_are_not_lost(clock):
    lines = Lines()
    journal = make(lines)
    for step, (skipped, bad) in enumerate([(0, 0), (1, 0), (0, 2), (0, 0), (0, 1), (1, 0)], 1):
        journal.add(step, metrics(skipped, bad), range(100, 100 + bad))
    journal.flush()
    journal.add(8, metrics(), [])
    journal.flush()
    assert [(r["step"], r["skipped"], r["bad"]) for r in lines.rows] == [
        (1, 0, 0), (4, 1, 2), (8, 1, 1)
    ]  # fmt: skip
    assert lines.said == [
        "step 2: gradients not finite, update dropped (1 in a row)",
        "step 3: left out no 100",
        "step 3: left out no 101",
        "step 5: left out no 100",
        "step 6: gradients not finite, update dropped (1 in a row)",
    ]


@pytest.mark.parametrize("log_every", [1, 1000])
def test_three_dropped_updates_in_a_row_end_the_run_however_seldom_it_logs(log_every):
    lines = Lines()
    journal = make(lines, log_every=log_every)
    for step, skipped in enumerate([0, 1, 2, 0, 1, 2], 1):
        journal.add(step, metrics(skipped), [])
        journal.flush()
    journal.add(7, metrics(3, loss=float("nan")), [])
    with pytest.raises(
        NonFiniteError, match=r"stage: .* for 3 steps in a row, up to step 7; the l"
    ):
        journal.flush()
    assert lines.rows[-1]["step"] == 7  # the line that shows it is written


def test_a_few_unusable_samples_are_tolerated_and_more_end_the_run_by_name():
    lines = Lines()
    journal = make(lines)
    journal.add(1, metrics(bad=FEW_BAD), range(FEW_BAD))
    journal.flush()
    assert len(lines.said) == FEW_BAD
    journal.add(2, metrics(bad=1), [77])
    with pytest.raises(DataError, match=r"stage: 11 of 16 samples .* 0\.1%: no 0; .*no 9\. Fix"):
        journal.flush()


def test_one_unusable_sample_in_a_thousand_is_always_tolerated():
    journal = make(Lines(), batch=10_000)
    for step in range(1, 30):
        journal.add(step, metrics(bad=10), [])
        journal.flush()
    journal.add(31, metrics(bad=11), [])
    with pytest.raises(DataError, match="301 of 300000 samples"):
        journal.flush()


def test_a_stage_may_allow_more_and_the_message_names_the_key():
    journal = make(Lines())
    journal.add(1, metrics(bad=8), range(8))
    journal.flush()
    journal.add(2, metrics(bad=4), range(4))
    with pytest.raises(DataError, match=r"12 of 16 .*, or allow .*stages\.stage\.max_bad=0\.75$"):
        journal.flush()
    journal = make(Lines(), max_bad=0.75)
    for step in range(1, 9):
        journal.add(step, metrics(bad=6), range(6))
        journal.flush()
    journal.add(9, metrics(bad=7), range(7))
    with pytest.raises(DataError, match=r"55 of 72 samples could not be used, more than 75\.0%"):
        journal.flush()
