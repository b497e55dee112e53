"""The one loop: trains the stages of a recipe, each from its newest checkpoint to its end.

Order within a step, which resuming relies on: next batch → step → (metrics of the step before) →
save → evaluate. Everything that a step depends on is a function of (recipe, step).
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clu.parameter_overview import get_parameter_overview

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.checkpoints.manager import Checkpointer
from vadapter.config import differences, plain
from vadapter.console import difference_table
from vadapter.data.batch import Batch, check_batch
from vadapter.data.open import describe
from vadapter.data.pipeline import Schedule, make_loader
from vadapter.distributed import hosts, watchdog
from vadapter.distributed.compile import jit
from vadapter.distributed.memory import memory_errors
from vadapter.distributed.mesh import shardings_of, to_mesh, with_mesh
from vadapter.distributed.preemption import fault, signals
from vadapter.errors import CheckpointError, NonFiniteError, Preempted, disk_errors
from vadapter.evaluate.evaluator import Evaluator
from vadapter.io import buckets, storage
from vadapter.io.json_files import write_json
from vadapter.recipe.optim import learning_rate
from vadapter.recipe.schema import Recipe, trained
from vadapter.stages import initialization
from vadapter.stages.run import Run, made_with, record
from vadapter.stages.stage import Stage
from vadapter.stages.steps import TrainState, init_state
from vadapter.train.host_agreement import require_own_rows, shared_run
from vadapter.train.metric_writer import MetricWriter, open_writer
from vadapter.train.monitor import Monitor


def train(
    recipe: Recipe, workdir: Path, *, before: Callable[[str], None] = lambda name: None
) -> None:
    """Runs the recipe's chain of stages in `workdir`, from wherever it stopped.

    Args:
      recipe: what to run.
      workdir: the run directory.
      before: called with the name of each stage, done before or not, when its turn comes.

    Raises:
      UserError: something to mend in configuration, data or checkpoints.
      Preempted: a signal came; the state is saved.
      NonFiniteError: the loss diverged.
    """
    workdir = storage.as_path(workdir)
    with (
        shared_run(recipe, workdir),
        buckets.bucket_errors(),
        disk_errors(),
        signals() as stop,
    ):
        run = Run(recipe, workdir, stop)
        require_own_rows(run.mesh)
        run.check()
        for name in recipe.chain:
            stop.check(name)
            before(name)
            stage = run.stage(name)
            with memory_errors(lambda stage=stage: f"{stage.name}, {stage.at}"):
                train_stage(stage)


def train_stage(stage: Stage) -> None:
    """Trains a stage to its end, from its newest checkpoint if there is one, unless it is done.

    Raises:
      CheckpointError: what was done or saved before does not fit, or a frozen part changed.
      DataError, Preempted, NonFiniteError: see `train`.
    """
    identity = stage.identity()
    hosts.require_same(identity, f"what stage {stage.name} trains, and on what")
    if hosts.of_first((stage.directory / initialization.DONE).is_file(), f"{stage.name}: done?"):
        _check_done(stage, identity)
        if hosts.first():
            print(f"{stage.name}: done before", flush=True)
        return
    stage.stop.require_handlers()
    c, began = stage.config, time.monotonic()
    checkpointer = Checkpointer(stage.directory / "checkpoints", keep=c.keep)
    with open_writer(stage.directory, stage.name, c.steps) as writer:
        writer.say(
            f"{c.kind}, {c.steps} steps of {c.batch}, mesh {dict(stage.mesh.shape)}\n"
            + initialization.report(stage.starts, c, stage.abstract)
        )
        state, frozen = _begin(stage, checkpointer, identity, writer)
        if hosts.first():
            table = get_parameter_overview(state.params | frozen, include_stats="sharding")
            storage.write_bytes(stage.directory / "parameters.txt", f"{table}\n".encode())
        evaluator = Evaluator(stage, frozen)  # compiled once, for the looks on the way too
        digests = _digests(frozen)
        try:

            def save(step: int, state: TrainState) -> None:
                writer.flush()  # what a checkpoint knows is there
                checkpointer.save(step, state, {**identity, "made_with": made_with(stage.mesh)})

            state = _steps(stage, state, frozen, evaluator, save, writer)
        except BaseException as error:
            # A save needs all hosts, and they are all here only for what all of them met.
            if hosts.count() == 1 or isinstance(error, NonFiniteError | Preempted):
                with contextlib.suppress(CheckpointError):  # the first error is the one to tell
                    checkpointer.close()
            raise
        checkpointer.close()
        stage.stop.check(f"{stage.name}, step {int(state.step)}, saved")
        _check_frozen(stage, digests, _digests(frozen))
        stage.at = "evaluation at the end"
        fault(stage.name, "finish")
        scores = evaluator(state.params, 0, stage.directory / "eval")
        if scores:
            writer.write(c.steps, scores, loud=True)
        _hand_over(stage, state, identity, scores, time.monotonic() - began)


def _check_done(stage: Stage, identity: dict[str, Any]) -> None:
    before = initialization.finished(stage.directory)["identity"]
    if diff := differences(before, plain(identity)):
        raise CheckpointError(
            f"{stage.directory} was finished with another configuration:\n"
            + difference_table(diff)
            + "\nUse another --workdir, or remove that directory to train it again."
        )


def _begin(
    stage: Stage,
    checkpointer: Checkpointer,
    identity: dict[str, Any],
    writer: MetricWriter,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the newest checkpoint, or a fresh one; and the frozen components."""
    abstract = stage.abstract_state
    restored = checkpointer.restore(abstract, expect=identity)
    record(stage.recipe, stage.workdir)
    trainable, frozen = stage.load_params(resumed=restored is not None)
    if restored is None:
        begin = jit(lambda p: init_state(p, stage.tx), out_shardings=shardings_of(abstract))
        return begin(trainable), frozen
    state, meta = restored
    writer.say(f"resumed at step {int(state.step)}")
    now = plain(made_with(stage.mesh))
    if diff := differences(meta.get("made_with", now), now):
        was = ", ".join(f"{key} {there} (now {here})" for key, there, here in diff)
        writer.say(
            f"saved with {was}: the same state, data and order, but what follows equals that of "
            "the old setting within rounding, not bit for bit"
        )
    return state, frozen


def _steps(
    stage: Stage,
    state: TrainState,
    frozen: dict[str, Any],
    evaluator: Evaluator,
    save: Callable[[int, TrainState], Any],
    writer: MetricWriter,
) -> TrainState:
    """Steps to the end, or to where a signal asks to stop; the state returned is saved."""
    c, stop, start = stage.config, stage.stop, int(state.step)
    step_fn, loader = _step_fn(stage), _loader(stage, frozen, start)
    drawn = lambda step: Schedule(c.data)(step - 1)[0]  # noqa: E731
    journal = Monitor(
        writer, stage.name, c, learning_rate(c.optim, c.steps),
        lambda step, i: describe(drawn(step), stage.source(drawn(step)), i),
    )  # fmt: skip
    due = lambda step: c.eval_every and step % c.eval_every == 0 and 0 < step < c.steps  # noqa: E731

    def look(step: int) -> None:
        began, stage.at = time.monotonic(), f"evaluation at step {step}"
        writer.write(step, evaluator(state.params, c.eval_limit), loud=True)
        journal.paused(time.monotonic() - began)

    if due(start) and not hosts.of_first(writer.evaluated(start), f"evaluated at {start}?"):
        look(start)
    fault(stage.name, "begin")
    shapes = set()
    for step, batch in enumerate(watchdog.watch(loader), start + 1):
        stage.at = f"step {step}"
        shape = str({k: v.shape for k, v in batch.items()})
        if new := shape not in shapes:
            watchdog.beat(slow=True)
            shapes.add(shape)
            check_batch(batch, stage.tokenizer.vocab_size)
            journal.flush()
        began = time.monotonic()
        state, metrics = step_fn(state, frozen, to_mesh(stop.sign(batch), stage.mesh))
        if new:
            journal.compiled(time.monotonic() - began)
        asked = metrics.pop("stop", None)
        journal.add(step, metrics, batch["id"][batch["bad"]])
        stop.hear(asked)
        if new:
            journal.flush()
        fault(stage.name, "step", step)
        if step % c.save_every == 0 or step == c.steps or stop.asked:
            journal.flush()
            watchdog.beat(slow=True)
            save(step, state)
            fault(stage.name, "saving", step)
        if due(step) and not stop.asked:
            journal.flush()
            with contextlib.suppress(Preempted):  # told once the state is saved
                look(step)
        if stop.asked:
            save(step, state)  # unless it is already: the signal came after
            break
    journal.flush()
    return state


def _step_fn(stage: Stage) -> Callable[..., Any]:
    """The compiled train step, which leaves the state where it is and reuses its memory.

    What the hosts sign a batch with (`Stop.sign`) comes out as a metric.
    """

    def step(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Any]:
        rows = {name: x for name, x in batch.items() if name != "stop"}
        state, metrics = stage.train_step(state, frozen, rows)
        return state, metrics | {"stop": batch["stop"].max()} if "stop" in batch else metrics

    return stage.jit_train_step(with_mesh(stage.mesh, step), jit)


def _loader(stage: Stage, frozen: dict[str, Any], start: int) -> Iterator[Batch]:
    """This host's part of the batches after step `start`."""
    c = stage.config
    return make_loader(
        {name: (*stage.stream(name, frozen), weight) for name, weight in c.data.items()},
        global_batch=c.batch,
        seed=stage.recipe.seed,
        start_step=start,
        num_steps=c.steps,
        host_index=hosts.index(),
        host_count=hosts.count(),
        workers=stage.recipe.workers,
    )


def _digests(frozen: dict[str, Any]) -> dict[str, str]:
    return {name: combined(tree_digests(tree)) for name, tree in frozen.items()}


def _check_frozen(stage: Stage, before: dict[str, str], after: dict[str, str]) -> None:
    for name in before:
        if after[name] != before[name]:
            raise CheckpointError(
                f"{stage.name}: {name} is frozen but changed during training: the result is worth "
                f"nothing. Move {stage.directory} away and train it again; if this comes back, "
                "suspect the memory."
            )


def _hand_over(
    stage: Stage,
    state: TrainState,
    identity: dict[str, Any],
    scores: dict[str, float],
    seconds: float,
) -> None:
    """Stores the trained components, then the record that they are complete."""
    store = ComponentStore(stage.workdir / initialization.STORE)
    digests = {n: store.put(n, state.params[n]) for n in trained(stage.config)}
    record = {"components": digests, "identity": plain(identity), "scores": scores,
              "steps": stage.config.steps, "seconds": round(seconds, 1)}  # fmt: skip
    fault(stage.name, "stored")
    if hosts.first():
        write_json(stage.directory / initialization.DONE, record)
    hosts.exchange("", f"{stage.name}: handed over")
