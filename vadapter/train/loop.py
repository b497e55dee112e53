"""The training loop: train the stages of a recipe, each from its newest checkpoint to its end.

A resumed run ends in the same bits because everything that a step depends on is a function of
(recipe, step), and because the order within a step is fixed: next batch → step → metrics of the
step before → save → evaluate. Metrics are read one step late, so that the devices never wait for
the host; a save or an evaluation reads them first. Evaluation comes after the save: if it is cut
short, the resumed run repeats it. Read `train`, `train_stage`, `_steps`; `supervisor` wraps the
steps with what is not training.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clu.parameter_overview import get_parameter_overview

from vadapter.checkpoints.component_store import ComponentStore
from vadapter.checkpoints.digest import combined, tree_digests
from vadapter.checkpoints.manager import Checkpointer
from vadapter.config import differences, plain
from vadapter.console import difference_table
from vadapter.data.batch import Batch
from vadapter.data.pipeline import make_loader
from vadapter.distributed import hosts, watchdog
from vadapter.distributed.compile import jit
from vadapter.distributed.memory import memory_errors
from vadapter.distributed.mesh import axes, to_mesh, with_mesh
from vadapter.distributed.preemption import Stop, signals
from vadapter.errors import CheckpointError, NonFiniteError, Preempted, disk_errors
from vadapter.io import buckets, storage
from vadapter.io.json_files import write_json
from vadapter.recipe.schema import Recipe, trained
from vadapter.stages import initialization
from vadapter.train.host_agreement import require_own_rows, shared_run, write_record
from vadapter.train.metric_writer import MetricWriter
from vadapter.train.supervisor import Supervisor

# A run loads what its own stages need: `Run`, `Stage` and `Evaluator`, which import the code of
# models, data formats and scores, are therefore imported by the functions below, when it starts.
if TYPE_CHECKING:
    from vadapter.evaluate.evaluator import Evaluator
    from vadapter.stages.stage import Stage
    from vadapter.stages.steps import TrainState


def train(
    recipe: Recipe, workdir: Path, *, before: Callable[[str], None] = lambda name: None,
    stop: Stop | None = None,
) -> None:  # fmt: skip
    """Train the recipe's chain of stages in `workdir`, resuming where it stopped.

    Args:
      before: called with the name of each stage before it starts, or is skipped as finished.
      stop: of `preemption.signals`, of a caller that trains several runs; None: of this run alone.

    Raises:
      UserError: invalid configuration, data or checkpoints; the message says what to fix.
      Preempted: stopped by a signal; the state is saved.
      NonFiniteError: the loss diverged.
    """
    workdir = storage.as_path(workdir)
    handlers = signals() if stop is None else contextlib.nullcontext(stop)
    with shared_run(recipe, workdir), buckets.bucket_errors(), disk_errors(), handlers as stop:
        from vadapter.stages.run import Run

        run = Run(recipe, workdir, stop)
        require_own_rows(run.mesh)
        run.check()
        for name in recipe.chain:
            stop.check(name)
            before(name)
            stage = run.stage(name)
            with memory_errors(lambda stage=stage: f"{stage.name}, {stage.activity}"):
                train_stage(stage)


def train_stage(stage: "Stage") -> None:
    """Train a stage to its end from its newest checkpoint, if any; skip it if it is finished.

    Raises:
      CheckpointError: the finished stage or the checkpoint is of another configuration, or a frozen
        component changed.
      DataError, Preempted, NonFiniteError: see `train`.
    """
    identity = stage.identity()
    hosts.require_same(identity, f"the configuration or data of stage {stage.name}")
    finished = (stage.directory / initialization.DONE).is_file()
    if hosts.of_first(finished, f"{stage.name}: finished?"):
        _check_finished(stage, identity)
        if hosts.first():
            print(f"{stage.name}: already finished", flush=True)
        return
    from vadapter.evaluate.evaluator import Evaluator

    stage.stop.require_handlers()
    c, began = stage.config, time.monotonic()
    checkpointer = Checkpointer(stage.directory / "checkpoints", keep=c.keep)
    with MetricWriter(stage.directory, stage.name, c.steps) as writer:
        writer.say(
            f"{c.kind}, {c.steps} steps of {c.batch}, mesh {axes(stage.mesh.shape)}\n"
            + initialization.report(stage.starts, c, stage.abstract)
        )
        state, frozen = _begin(stage, checkpointer, identity, writer)
        if hosts.first():
            table = get_parameter_overview(state.params | frozen, include_stats="sharding")
            storage.write_bytes(stage.directory / "parameters.txt", f"{table}\n".encode())
        evaluator = Evaluator(stage, frozen)  # compiled once for all evaluations
        digests = _digests(frozen)

        def save(step: int, state: "TrainState") -> None:
            writer.flush()  # the rows of steps up to a checkpoint are never lost
            watchdog.beat(slow=True)
            record = {"measured": stage.measured(), "made_with": stage.setup()}
            checkpointer.save(step, state, {**identity, **record})

        try:
            state = _steps(stage, state, frozen, evaluator, save, writer)
        except BaseException as error:
            # Closing waits for a save that needs all hosts; only these errors reach all of them.
            if hosts.count() == 1 or isinstance(error, NonFiniteError | Preempted):
                with contextlib.suppress(CheckpointError):  # report the first error
                    checkpointer.close()
            raise
        checkpointer.close()
        stage.stop.check(f"{stage.name}, step {int(state.step)}, saved")
        _check_frozen(stage, digests, _digests(frozen))
        stage.activity = "evaluation at the end"
        scores = evaluator(state.params, 0, stage.directory / "eval")
        if scores:
            writer.write(c.steps, scores, loud=True)
        _store(stage, state, identity, scores, time.monotonic() - began)


def _check_finished(stage: "Stage", identity: dict[str, Any]) -> None:
    before = stage.upgrade_identity(initialization.finished(stage.directory)["identity"])
    if diff := differences(before, plain(identity)):
        raise CheckpointError(
            f"{stage.directory} was finished with another configuration:\n"
            + difference_table(diff)
            + "\nUse another --workdir, or remove that directory to train it again."
        )


def _begin(
    stage: "Stage", checkpointer: Checkpointer, identity: dict[str, Any], writer: MetricWriter
) -> "tuple[TrainState, dict[str, Any]]":
    """Return the state of the newest checkpoint, or a fresh one, and the frozen components."""
    restored = checkpointer.restore(
        stage.abstract_state, expect=identity, upgrade=stage.upgrade_identity
    )
    write_record(stage.recipe, stage.workdir)
    trainable, frozen = stage.load_params(resumed=restored is not None)
    if restored is None:
        return stage.init_state(trainable), frozen
    state, meta = restored
    writer.say(f"resumed at step {int(state.step)}")
    setup = plain(stage.setup())
    if diff := differences(meta.get("made_with", setup), setup):
        was = ", ".join(f"{key} {old} (now {new})" for key, old, new in diff)
        writer.say(
            f"saved with {was}: resuming with the same state, data and order, but results will "
            "match those of the old setup up to rounding, not bit for bit"
        )
    return state, frozen


def _steps(
    stage: "Stage", state: "TrainState", frozen: dict[str, Any], evaluator: "Evaluator",
    save: "Callable[[int, TrainState], Any]", writer: MetricWriter,
) -> "TrainState":  # fmt: skip
    """Train to the last step, or until a signal stops the run; the returned state is saved."""
    c, start = stage.config, int(state.step)
    step_fn, loader = _step_fn(stage), _loader(stage, frozen, start)
    supervisor = Supervisor(stage, writer)

    def is_due(step: int) -> bool:
        return bool(c.eval_every) and step % c.eval_every == 0 and 0 < step < c.steps

    def evaluate(step: int) -> None:
        with supervisor.pause(f"evaluation at step {step}"):
            writer.write(step, evaluator(state.params, c.eval_limit), loud=True)

    # A signal may have cut this evaluation short after the step was saved.
    if is_due(start) and not hosts.of_first(writer.evaluated(start), f"evaluated at {start}?"):
        evaluate(start)

    for step, batch in supervisor.steps(loader, start):
        state, metrics = step_fn(state, frozen, to_mesh(batch, stage.mesh))
        supervisor.after(step, metrics)

        if step % c.save_every == 0 or step == c.steps or supervisor.stopping:
            supervisor.flush()  # raises if this update must not be saved
            save(step, state)
        if is_due(step) and not supervisor.stopping:
            supervisor.flush()
            with contextlib.suppress(Preempted):  # raised again once the state is saved
                evaluate(step)
        if supervisor.stopping:
            save(step, state)  # does nothing unless the signal came after the save above
            break
    supervisor.flush()
    return state


def _step_fn(stage: "Stage") -> Callable[..., Any]:
    """Compile the train step, which updates the state in place.

    The marks of the hosts in the batch (`Stop.mark`) come out as a metric: their maximum.
    """

    def step(state: "TrainState", frozen: Any, batch: Any) -> "tuple[TrainState, Any]":
        rows = {name: x for name, x in batch.items() if name != "stop"}
        state, metrics = stage.train_step(state, frozen, rows)
        return state, metrics | {"stop": batch["stop"].max()} if "stop" in batch else metrics

    return stage.jit_train_step(with_mesh(stage.mesh, step), jit)


def _loader(stage: "Stage", frozen: dict[str, Any], start: int) -> Iterator[Batch]:
    """Return this host's rows of the batches after step `start`."""
    c = stage.config
    streams = {name: (*stage.stream(name, frozen), weight) for name, weight in c.data.items()}
    return make_loader(
        streams, global_batch=c.batch, seed=stage.recipe.seed, start_step=start, num_steps=c.steps,
        host_index=hosts.index(), host_count=hosts.count(), workers=stage.recipe.workers,
    )  # fmt: skip


def _digests(frozen: dict[str, Any]) -> dict[str, str]:
    return {name: combined(tree_digests(tree)) for name, tree in frozen.items()}


def _check_frozen(stage: "Stage", before: dict[str, str], after: dict[str, str]) -> None:
    for name in before:
        if after[name] != before[name]:
            raise CheckpointError(
                f"{stage.name}: {name} is frozen but changed during training: the result is "
                f"invalid. Move {stage.directory} away and train it again; if this recurs, check "
                "the machine's RAM."
            )


def _store(
    stage: "Stage", state: "TrainState", identity: dict[str, Any], scores: dict[str, float],
    seconds: float,
) -> None:  # fmt: skip
    """Store the trained components, then the record that they are complete."""
    store = ComponentStore(stage.workdir / initialization.STORE)
    digests = {n: store.put(n, state.params[n]) for n in trained(stage.config)}
    record = {"components": digests, "identity": plain(identity), "scores": scores,
              "measured": stage.measured(), "steps": stage.config.steps,
              "seconds": round(seconds, 1)}  # fmt: skip
    if hosts.first():
        write_json(stage.directory / initialization.DONE, record)
    hosts.exchange("", f"{stage.name}: stored")
