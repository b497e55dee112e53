"""Rates are chosen by validation loss, finished runs are kept, and wrong ones are refused.

Runs finish at once here (`use_fake_runs`); `test_compare` trains real ones.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cases import some_slow
from support.comparisons import RATES, prepared, tiny_comparison, use_fake_runs

from vadapter.compare.comparison import Comparison
from vadapter.compare.plan import read_plan
from vadapter.compare.train import train_comparison
from vadapter.errors import CheckpointError, ConfigError, NonFiniteError, Preempted, UserError
from vadapter.io.lock import lock
from vadapter.stages.run import Run

LOW, HIGH = RATES
ARMS = ("mlp", "perceiver")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return prepared(tmp_path_factory)


class Trainer:
    """`train_comparison` in a directory, with runs whose loss is a function."""

    def __init__(self, world: Path, folder: Path, patch: pytest.MonkeyPatch):
        self.world, self.folder, self.patch = world, folder, patch
        self.said: list[str] = []
        self.loss: Callable[[str, float, int], float] = lambda arm, lr, seed: 1.0
        self.part = "a digest"
        self.trained = use_fake_runs(patch, lambda *run: self.loss(*run), lambda: self.part)

    def __call__(self, *overrides: str, seeds: int = 2, arms: Any = ARMS, **keys: Any):
        config = tiny_comparison(self.world, arms, test=(), **keys)
        plan = read_plan(config, self.folder, seeds=seeds, overrides=overrides)
        self.trained.clear()
        self.said.clear()
        return train_comparison(plan, self.said.append)

    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "compare.json").read_text())

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(p): p.read_bytes() for p in paths if p.name != ".lock"}


@pytest.fixture
def train(world, tmp_path, monkeypatch):
    return Trainer(world, tmp_path / "compare", monkeypatch)


def chosen(comparison: Comparison) -> dict[str, set[float]]:
    return {arm.name: {run.lr for run in arm.runs} for arm in comparison.arms}


def test_every_rate_is_tried_with_the_first_seed_and_the_best_with_all(train):
    best = {"mlp": LOW, "perceiver": HIGH}
    train.loss = lambda arm, lr, seed: 1.0 + (lr != best[arm]) + seed
    comparison = train(seeds=3)
    grid = [(arm, lr, 0) for arm in ARMS for lr in RATES]
    seeds = [(arm, best[arm], seed) for arm in ARMS for seed in (1, 2)]
    assert train.trained[1:] == grid + seeds  # after the parts
    assert chosen(comparison) == {"mlp": {LOW}, "perceiver": {HIGH}}
    assert [run.seed for run in comparison.arms[0].runs] == [0, 1, 2]
    assert comparison.arms[0].grid == {LOW: 1.0, HIGH: 2.0}
    assert "perceiver: chose lr 0.01 by held/loss (0.001: 2, 0.01: 1)" in train.said


@pytest.mark.parametrize("rates", [RATES, RATES[::-1]])
def test_of_equal_losses_the_lowest_rate_is_chosen(train, rates):
    assert chosen(train(lr=rates)) == {"mlp": {LOW}, "perceiver": {LOW}}


def fails(loss: Callable[[str, float, int], bool]) -> Callable[[str, float, int], float]:
    def result(*run: Any) -> float:
        if loss(*run):
            raise NonFiniteError(f"{run}: gradients were not finite")
        return 1.0 / run[1]  # the highest rate is the best

    return result


def test_a_rate_that_diverges_is_infinitely_bad_and_is_not_tried_again(train):
    train.loss = fails(lambda arm, lr, seed: arm == "mlp" and lr == HIGH)
    comparison = train()
    assert chosen(comparison) == {"mlp": {LOW}, "perceiver": {HIGH}}
    assert comparison.arms[0].grid == {LOW: 1 / LOW, HIGH: math.inf}
    assert train.record()["arms"]["mlp"]["grid"] == {str(LOW): 1 / LOW, str(HIGH): None}
    assert "mlp: chose lr 0.001 by held/loss (0.001: 1000, 0.01: diverged)" in train.said
    again = train()
    assert train.trained == []
    assert again == comparison


def test_a_rate_with_a_validation_loss_that_is_no_number_is_infinitely_bad(train):
    train.loss = lambda arm, lr, seed: math.nan if lr == LOW else 5.0
    assert chosen(train()) == {"mlp": {HIGH}, "perceiver": {HIGH}}


def test_a_seed_that_diverges_is_named_and_ends_nothing(train):
    train.loss = fails(lambda arm, lr, seed: (arm, seed) == ("perceiver", 1))
    comparison = train(seeds=3)
    assert [run.seed for run in comparison.arms[1].runs] == [0, 2]
    assert comparison.arms[1].diverged == (1,)
    assert train.record()["arms"]["perceiver"]["diverged"] == [1]


def test_an_arm_that_diverges_at_every_rate_ends_the_comparison_by_name(train):
    train.loss = fails(lambda arm, lr, seed: arm == "perceiver")
    with pytest.raises(NonFiniteError, match=r"arm perceiver diverged at every .*0.001, 0.01"):
        train()
    assert ("mlp", HIGH, 0) in train.trained
    assert not train.record()["finished"]


def test_a_second_call_trains_nothing(train):
    first = train()
    before = train.files()
    assert train() == first
    assert train.trained == []
    assert train.files() == before


@pytest.mark.parametrize(
    ("change", "new"),
    [
        ({"seeds": 3}, [("mlp", LOW, 2), ("perceiver", LOW, 2)]),
        ({"lr": (*RATES, 0.1)}, [("mlp", 0.1, 0), ("perceiver", 0.1, 0)]),
        ({"seeds": 1}, []),
        pytest.param({"lr": (LOW,)}, [], marks=pytest.mark.slow),
        pytest.param({"baseline": "mlp"}, [], marks=pytest.mark.slow),
    ],
)
def test_seeds_and_rates_may_be_added_and_left_out_later(train, change, new):
    train()
    comparison = train(**change)
    assert train.trained == new
    assert len(comparison.arms[0].runs) == change.get("seeds", 2)
    assert set(comparison.arms[0].grid) == set(change.get("lr", RATES))


def test_arms_may_be_added_later(train, world):
    train()
    comparison = train(arms=(*ARMS, "another"))
    assert {run[0] for run in train.trained} == {"another"}
    assert [arm.name for arm in comparison.arms] == ["another", *ARMS]


def test_a_better_rate_that_is_added_is_trained_with_all_seeds(train):
    train.loss = lambda arm, lr, seed: lr
    train()
    comparison = train(lr=(*RATES, 1e-4))
    assert chosen(comparison) == {"mlp": {1e-4}, "perceiver": {1e-4}}
    assert train.trained == [(arm, 1e-4, seed) for seed in (0, 1) for arm in ARMS]


@pytest.mark.parametrize("count", some_slow(range(1, 8), fast=(1, 4)))
def test_an_interrupted_comparison_continues_where_it_stopped(train, count):
    def stop_at(*run: Any) -> float:
        if len(train.trained) == count:
            raise Preempted("stopped")
        return run[1]

    whole = [("llm", 1e-2, 0), *[(a, lr, 0) for a in ARMS for lr in RATES],
             *[(a, LOW, 1) for a in ARMS]]  # fmt: skip
    train.loss = lambda *run: run[1]
    if count > 1:  # the parts are first, and have no loss
        train.loss = stop_at
        with pytest.raises(Preempted):
            train()
        assert train.trained == whole[:count]
        assert not train.record()["finished"]
        train.loss = lambda *run: run[1]
        train()
        assert train.trained == whole[count - 1 :]
    else:
        train()
        assert train.trained == whole
    assert train.record()["finished"]


def test_a_signal_between_two_runs_stops_before_the_next(train, monkeypatch):
    def loss(*run: Any) -> float:
        if run[:2] == ("mlp", HIGH):
            signal.raise_signal(signal.SIGTERM)
        return run[1]

    train.loss = loss
    with pytest.raises(Preempted, match=r"before perceiver, lr 0\.001, seed 0: stopped by SIGTERM"):
        train()
    assert train.trained[-1] == ("mlp", HIGH, 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


# -- directories that do not fit -----------------------------------------------------------------

# (overrides of the second call, what the message names)
CHANGED = {
    "steps of an arm": (["stages.mlp.steps=5"], "config.steps"),
    "the optimizer of an arm": (["stages.mlp.optim.warmup=0"], "config.optim.warmup"),
    "a component": (["components.mlp.hidden_dim=17"], "components.mlp.hidden_dim"),
    "the batch": (["stages.mlp.batch=4", "stages.perceiver.batch=4"], "config.batch"),
    "the data": (["data.images.texts=2"], "data.images.texts"),
    "a part": (["stages.llm.steps=3"], "config.steps"),
    "the LLM": (["components.llm.mlp_dim=40"], "components.llm.mlp_dim"),
    "how the loss is measured": (
        ["stages.mlp.loss_batches=2", "stages.perceiver.loss_batches=2"], "protocol.loss_batches"
    ),
    "the validation set": (["data.held.texts=1"], "protocol.sets.held.texts"),
    "where training data is read": (["data.images.source.split=val"], "content of images"),
    "where the validation set is read": (["data.held.source.split=train"], "content of held"),
}  # fmt: skip
FAST = ("a component", "a part", "how the loss is measured", "where the validation set is read")


@pytest.mark.parametrize("case", some_slow(CHANGED, fast=FAST))
def test_runs_of_another_recipe_are_refused_before_anything_is_trained(train, case):
    items, key = CHANGED[case]
    train(seeds=1)
    before = train.files()
    with pytest.raises(CheckpointError, match="was trained with another recipe") as raised:
        train(*items)
    assert key in str(raised.value)
    assert train.trained == []
    assert train.files() == before


@pytest.mark.parametrize(("data", "split"), [("images", "val"), ("held", "train")])
@pytest.mark.parametrize("arms", [ARMS, (*ARMS, "another")])
def test_other_data_is_refused_when_nothing_is_left_to_train_and_with_a_new_arm(
    train, data, split, arms
):
    train()
    before = train.files()
    with pytest.raises(CheckpointError, match=f"content of {data}"):
        train(f"data.{data}.source.split={split}", arms=arms)
    assert train.trained == []
    assert train.files() == before


def records(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/*/done.json"))


def test_runs_of_an_earlier_version_have_no_record_of_what_measured_them(train):
    train()
    for path in records(train.folder):
        record = json.loads(path.read_text())
        del record["measured"]
        path.write_text(json.dumps(record))
    train(arms=(*ARMS, "another"))
    assert {run[0] for run in train.trained} == {"another"}
    assert train.record()["finished"]
    scores = records(train.folder)[-1].parent / "eval" / "captions" / "score.json"
    scores.parent.mkdir(parents=True)
    scores.write_text('{"scores": {}, "protocol": {"data": "another"}}')  # what they do have
    with pytest.raises(CheckpointError, match="content of held"):
        train(seeds=3)


def test_runs_that_started_from_other_parts_are_refused(train):
    train(seeds=1)
    shutil.rmtree(train.folder / "parts")
    train.part = "another digest"  # they would not be the same bits on another machine
    with pytest.raises(CheckpointError, match="was trained with another recipe") as raised:
        train(seeds=2)
    assert "start of llm" in str(raised.value)
    assert [run[0] for run in train.trained] == ["llm"]


def test_keys_that_do_not_change_what_is_trained_may_change(train):
    train()
    train("workers=1", "stages.mlp.log_every=7", "stages.perceiver.keep=1")
    assert train.trained == []


def test_all_runs_of_another_recipe_are_named_at_once(train):
    train()
    with pytest.raises(CheckpointError) as raised:
        train("components.llm.mlp_dim=40")
    for place in ("parts/llm", f"mlp/lr-{LOW}-seed-0", f"perceiver/lr-{HIGH}-seed-0"):
        assert place in str(raised.value)
    assert str(raised.value).count("components.llm.mlp_dim") < 4  # parts, mlp and perceiver


def test_a_run_that_diverged_with_another_recipe_is_refused(train):
    train.loss = fails(lambda arm, lr, seed: lr == HIGH)
    train()
    with pytest.raises(CheckpointError, match=rf"mlp/lr-{HIGH}-seed-0/mlp: was trained with"):
        train("stages.mlp.steps=5")


def test_a_finished_run_that_measured_another_loss_is_refused(train):
    train()
    done = train.folder / "mlp" / f"lr-{LOW}-seed-0" / "mlp" / "done.json"
    done.write_text(done.read_text().replace("held/loss", "hold/loss"))
    with pytest.raises(CheckpointError, match="without measuring held/loss"):
        train()


def write_run(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def write_export(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"format": "vadapter-export"}')


def test_a_first_command_that_is_refused_names_the_arm_and_leaves_nothing(
    world, tmp_path, monkeypatch
):
    tokenizers, check = [], Run.check

    def spied(run: Run) -> None:
        try:
            check(run)
        finally:
            tokenizers.append((run.workdir / "tokenizer.json").is_file())

    monkeypatch.setattr(Run, "check", spied)
    config = tiny_comparison(world, ARMS, test=())
    plan = read_plan(
        config, tmp_path / "compare", seeds=1, overrides=("arms.mlp.components.mlp.width=17",)
    )
    with pytest.raises(ConfigError, match=r"^arm mlp: "):
        train_comparison(plan, print)
    assert True in tokenizers
    assert [path.name for path in plan.folder.iterdir()] == [".lock"]


FOLDERS = {
    "a run": (write_run, "is a run, not a comparison"),
    "an export": (write_export, "is an exported adapter, not a comparison"),
    "a file": (lambda folder: folder.write_text(""), "cannot write"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_directory_of_something_else_is_refused(train, case):
    make, words = FOLDERS[case]
    make(train.folder)
    with pytest.raises(UserError, match=words):
        train()
    assert train.trained == []


def test_a_directory_that_another_comparison_uses_is_refused(train):
    train()
    with lock(train.folder / ".lock"), pytest.raises(ConfigError, match="in use by another run"):
        train()


def test_a_record_that_was_lost_or_is_corrupt_is_written_again(train):
    first = train()
    record = (train.folder / "compare.json").read_text()
    for spoiled in ("", "{", "[1]"):
        (train.folder / "compare.json").write_text(spoiled)
        assert train() == first
        assert (train.folder / "compare.json").read_text() == record
    assert train.trained == []


def test_a_comparison_may_be_moved(train, tmp_path):
    first = train()
    shutil.move(train.folder, tmp_path / "moved")
    train.folder = tmp_path / "moved"
    second = train(seeds=3)
    assert train.trained == [(arm, LOW, 2) for arm in ARMS]
    assert [len(arm.runs) for arm in (*first.arms, *second.arms)] == [2, 2, 3, 3]
