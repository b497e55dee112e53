"""Train a comparison: parts, learning rates, seeds, evaluations, pages.

Every run is an ordinary run, trained by `train.loop` in a directory of its own. What is finished is
skipped and an interrupted run resumes, so the same command continues wherever it stopped. On
several hosts all of them train every run together; the first one alone reads the directories,
decides and writes, and the others do as it says.
"""

import contextlib
import dataclasses
import gc
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vadapter.compare import fairness, progress
from vadapter.compare.comparison import Arm, Comparison
from vadapter.compare.plan import PARTS, Plan, PlannedRun
from vadapter.compare.read import common_facts
from vadapter.compare.record import write_record
from vadapter.compare.reuse import reuse_stages
from vadapter.config import digest, plain
from vadapter.console import duration, number
from vadapter.distributed import hosts
from vadapter.distributed.preemption import Stop, signals
from vadapter.errors import ConfigError, NonFiniteError, Problems, disk_errors
from vadapter.evaluate.recipe_evals import run_eval
from vadapter.evaluate.runner import Decoder
from vadapter.io import buckets, storage
from vadapter.io.json_files import is_export, write_json
from vadapter.io.lock import lock
from vadapter.recipe.schema import Recipe, used_data
from vadapter.stages.restore import open_run
from vadapter.stages.run import TOKENIZER, Run
from vadapter.train import loop

Say = Callable[[str], None]


def train_comparison(plan: Plan, say: Say) -> Comparison:
    """Train what is missing of a comparison, evaluate it and write its record.

    Raises:
      UserError: the directory is of something else, a run has another recipe, data cannot be read.
      Preempted: stopped by a signal; the state is saved.
      NonFiniteError: an arm diverged at every learning rate, or a frozen part did.
    """
    with _directory(plan.folder), buckets.bucket_errors(), disk_errors(), signals() as stop:
        return _Trainer(plan, say, stop).train()


@contextlib.contextmanager
def _directory(folder: Path) -> Iterator[None]:
    """Hold the lock of the directory; ConfigError if it is that of something else."""
    if is_export(folder) or (folder / "config.json").is_file():
        what = "an exported adapter" if is_export(folder) else "a run"
        raise ConfigError(f"--workdir={folder} is {what}, not a comparison; choose another folder")
    with lock(folder / ".lock") if hosts.first() else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _new_only_if_kept(folder: Path) -> Iterator[None]:
    """Remove a folder that the block made, such as one with a tokenizer, if the block fails."""
    existed = hosts.of_first(folder.exists(), f"{folder.name}: exists?")
    try:
        yield
    except BaseException:
        if hosts.first() and not existed:
            storage.remove_tree(folder)
        raise


class _Trainer:
    """A comparison that is being trained."""

    def __init__(self, plan: Plan, say: Say, stop: Stop):
        self.plan, self.say, self.stop = plan, say, stop
        rates = plan.settings.lr
        self._total = len(plan.arms) * (len(rates) + plan.seeds - 1)
        self._reached = 0  # runs that were trained or skipped
        self._seconds: list[float] = []  # of the runs that were trained now
        self._losses: dict[tuple[str, float, int], float] = {}

    def train(self) -> Comparison:
        plan = self.plan
        with _new_only_if_kept(plan.folder / PARTS):
            self._check()
        if plan.parts is not None and not self._finished(plan.parts, plan.folder / PARTS):
            self.say(f"frozen parts: {', '.join(plan.parts.chain)}")
            loop.train(plan.parts, plan.folder / PARTS, stop=self.stop)
            gc.collect()
            self._check_directories(Problems())  # of runs that started from other parts
        for run in plan.grid():
            self._train(run)
        for arm in plan.arms:
            self._announce(arm)
        for arm in plan.arms:
            for seed in range(1, plan.seeds):
                self._train(plan.run(arm, self._chosen(arm), seed))
        comparison = self._comparison()
        for arm in comparison.arms:
            for trained in arm.runs:
                self._evaluate(plan.run(arm.name, trained.lr, trained.seed))
        self._record(comparison, fairness.digests(common_facts(comparison)))
        return comparison

    # -- before --------------------------------------------------------------------------------

    def _check(self) -> None:
        """Check all recipes, and all directories that exist, before anything is trained."""
        plan, problems, content = self.plan, Problems(), dict[str, Any]()
        self._check_directories(problems)
        for arm, recipe in plan.arms.items():
            if not (self._complete(arm) and self._reads_as_before(arm)):
                with problems.gather(f"arm {arm}"):
                    content |= self._check_arm(arm, recipe)
        problems.settle(placed=True)
        if content:
            self._check_directories(problems, content)
        self._record(self._comparison(), {})

    def _check_directories(self, problems: Problems, content: Mapping[str, Any] = {}) -> None:
        """Raise CheckpointError if a run has another recipe or, with `content`, had other data."""
        plan = self.plan
        if plan.parts is not None:
            progress.require_same(plan.parts, plan.folder / PARTS, plan.folder, problems, content)
        for run in plan.all():
            progress.require_same(run.recipe, run.workdir, plan.folder, problems, content)
        problems.settle(placed=True)

    def _check_arm(self, arm: str, recipe: Recipe) -> dict[str, Any]:
        """Check the recipe of an arm as if it were one run; return the content of its data.

        In the directory of the parts, so that finished ones are found and the others come first.
        """
        whole = Run(recipe, self.plan.folder / PARTS, self.stop)
        whole.check()
        own = self.plan.run(arm, self.plan.settings.lr[0], 0).recipe
        names = {data for stage in own.stages.values() for data in used_data(own, stage)}
        return {name: whole.source(name).fingerprint() for name in names}

    def _complete(self, arm: str) -> bool:
        """Return whether nothing of an arm is left to train, and keep its losses."""
        for lr in self.plan.settings.lr:
            loss = self._outcome(self.plan.run(arm, lr, 0))
            if loss is None:
                return False
            self._losses[arm, lr, 0] = loss
        runs = [self.plan.run(arm, self._chosen(arm), seed) for seed in range(self.plan.seeds)]
        return all(self._outcome(run) is not None for run in runs)

    def _reads_as_before(self, arm: str) -> bool:
        """Return whether the runs of an arm that is complete read their data where it says now."""
        runs = [self.plan.run(arm, self._chosen(arm), seed) for seed in range(self.plan.seeds)]
        return hosts.of_first(
            all(progress.reads_as_before(run.recipe, run.workdir) for run in runs),
            f"arm {arm}: the same data?",
        )

    # -- runs ----------------------------------------------------------------------------------

    def _train(self, run: PlannedRun) -> None:
        """Train a run, unless it is finished, and keep its validation loss."""
        self._reached += 1
        self.stop.check(f"before {run}")
        place = f"[{self._reached}/{self._total}] {run}"
        before = self._outcome(run)
        if before is None:
            self.say(f"\n{place}: {run.recipe.stages[run.trained.stage].steps} steps{self._left()}")
            began = time.monotonic()
            self._prepare(run)
            try:
                loop.train(run.recipe, run.workdir, stop=self.stop)
            except NonFiniteError as error:
                if hosts.first():
                    progress.write_diverged(run, error)
                self.say(f"{run} diverged: {error}")
            gc.collect()  # its parameters, before the next run allocates its own
            self._seconds.append(time.monotonic() - began)
        else:
            self.say(f"{place}: already {'finished' if math.isfinite(before) else 'diverged'}")
        loss = self._outcome(run)
        assert loss is not None, f"{run} has ended, but is not finished"
        self._losses[run.arm, run.lr, run.seed] = loss
        self._record(self._comparison(), {})

    def _finished(self, recipe: Recipe, workdir: Path) -> bool:
        done = progress.finished(recipe, workdir)
        return hosts.of_first(done, f"{workdir.name}: finished?")

    def _outcome(self, run: PlannedRun) -> float | None:
        return hosts.of_first(
            progress.outcome(run, self.plan.settings.validation_loss), f"{run}: finished?"
        )

    def _left(self) -> str:
        """Return how long the rest will take, as long as the runs of this call took on average."""
        if not self._seconds:
            return ""
        left = (self._total - self._reached + 1) * sum(self._seconds) / len(self._seconds)
        return f", about {duration(left)} left"

    def _prepare(self, run: PlannedRun) -> None:
        """Give a run the tokenizer of the parts, and stages that it has in common with others."""
        if hosts.first():
            others = (other for other in self.plan.all() if other.arm == run.arm)
            reuse_stages(run, [other for other in others if other.seed == run.seed])
            config = Path(TOKENIZER).with_suffix(".config.json").name
            for name in (config, TOKENIZER):  # in this order, see `stages.run`
                source, target = self.plan.folder / PARTS / name, run.workdir / name
                if source.is_file() and not target.is_file():
                    storage.write_bytes(target, source.read_bytes())
        hosts.exchange("", f"{run}: prepared", patience=hosts.WORK)

    # -- the choice ----------------------------------------------------------------------------

    def _grid(self, arm: str) -> dict[float, float]:
        """Return the validation loss by rate, of the runs that have ended."""
        losses = {lr: self._losses.get((arm, lr, 0)) for lr in self.plan.settings.lr}
        return {lr: loss for lr, loss in losses.items() if loss is not None}

    def _chosen(self, arm: str) -> float:
        """Return the rate with the lowest validation loss; of equal ones the lowest rate.

        Raises:
          NonFiniteError: training diverged at every rate.
        """
        grid = self._grid(arm)
        loss, lr = min((loss, lr) for lr, loss in grid.items())
        if math.isinf(loss):
            rates = ", ".join(f"{lr:g}" for lr in grid)
            raise NonFiniteError(
                f"arm {arm} diverged at every learning rate ({rates}): add lower ones with "
                "--config.lr, or leave the arm out; finished runs are kept"
            )
        return lr

    def _announce(self, arm: str) -> None:
        lr, grid = self._chosen(arm), self._grid(arm)
        metric = self.plan.settings.validation_loss
        losses = (
            f"{rate:g}: {number(loss) if math.isfinite(loss) else 'diverged'}"
            for rate, loss in sorted(grid.items())
        )
        self.say(f"{arm}: chose lr {lr:g} by {metric} ({', '.join(losses)})")

    # -- after ---------------------------------------------------------------------------------

    def _evaluate(self, run: PlannedRun) -> None:
        """Run the test evaluations of a chosen run that have not been run."""
        recipe, workdir, stage = run.recipe, run.workdir, run.trained.stage
        scored = workdir / stage / "eval"
        missing = [
            name
            for name in self.plan.settings.test
            if not _is_scored(scored / name, recipe, name)
            or not progress.reads_as_before(recipe, workdir, recipe.evals[name].data)
        ]
        missing = hosts.of_first(missing, f"{run}: evaluated?")
        if not missing:
            return
        self.say(f"\n{run}: evaluating {', '.join(missing)}")
        if hosts.first():  # which evaluations there are may have changed since
            write_json(workdir / "config.json", plain(recipe))
        hosts.exchange("", f"{run}: recipe")
        loaded = open_run(workdir, stage)
        decoder = Decoder(loaded, lambda rows: self.stop.watch(rows, str(run), "evaluation"))
        for name in missing:
            self.stop.check(f"{run}, before {name}")
            run_eval(decoder, name)
        gc.collect()

    def _comparison(self) -> Comparison:
        """Return the comparison as far as it is trained."""
        plan, arms = self.plan, []
        settings = plan.settings
        for name in plan.arms:
            grid = self._grid(name)
            ended = len(grid) == len(settings.lr) and min(grid.values()) < math.inf
            runs, diverged = [], []
            for seed in range(plan.seeds) if ended else ():
                run = plan.run(name, self._chosen(name), seed)
                loss = self._losses.get((name, run.lr, seed))
                if loss is not None and math.isfinite(loss):
                    runs.append(run.trained)
                elif loss is not None:
                    diverged.append(seed)
            arms.append(Arm(name, tuple(runs), grid, tuple(diverged)))
        return Comparison(
            settings.name, tuple(arms), settings.baseline, settings.validation_loss,
            settings.score, settings.test,
        )  # fmt: skip

    def _record(self, comparison: Comparison, digests: dict[str, str]) -> None:
        if hosts.first():
            recipes = {name: digest(recipe) for name, recipe in self.plan.arms.items()}
            write_record(
                comparison, self.plan.folder, finished=bool(digests), digests=digests,
                recipes=recipes,
            )  # fmt: skip


def _is_scored(directory: Path, recipe: Recipe, name: str) -> bool:
    """Return whether an evaluation has been run as the recipe says now."""
    try:
        record: Any = json.loads((directory / "score.json").read_text(encoding="utf-8"))
        asked = plain(dataclasses.replace(recipe.evals[name], batch=record["eval"]["batch"]))
        return asked == record["eval"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
