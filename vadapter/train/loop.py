"""The one loop: builds a stage from its row in the recipe, starts or resumes it, and runs it.

Order within a step, which resuming relies on: next batch → step → (metrics of the step before) →
save → evaluate. Everything that a step depends on is a function of (recipe, step).
"""

import contextlib
import errno
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from vadapter import __version__
from vadapter.config import differences, plain
from vadapter.data.batch import check_batch
from vadapter.data.pipeline import Schedule, eval_batches, make_loader
from vadapter.data.tokenizer import Tokenizer
from vadapter.errors import CheckpointError, ConfigError, Preempted
from vadapter.evals.runner import Decoder, control_scores, evaluate, make_control
from vadapter.models.coca import CoCa
from vadapter.models.vadapter import component_seed
from vadapter.parallel.compile import jit
from vadapter.parallel.mesh import make_mesh, replicated, to_mesh
from vadapter.train import handover
from vadapter.train.checkpoint import Checkpointer
from vadapter.train.digest import combined, tree_digests
from vadapter.train.features import cached
from vadapter.train.inputs import describe, make_source, make_stream, train_tokenizer
from vadapter.train.interrupts import Stop, fault, signals
from vadapter.train.journal import Journal
from vadapter.train.lock import run_lock
from vadapter.train.optim import learning_rate, make_optimizer
from vadapter.train.recipe import (
    DTYPES,
    STAGES,
    Recipe,
    StageConfig,
    components,
    make_model,
    trained,
)
from vadapter.train.shapes import abstract_params, image_size, init_params
from vadapter.train.steps import CaptionObjective, CocaObjective, init_state, make_train_step, split
from vadapter.train.store import ComponentStore
from vadapter.train.writer import Writer, write_json

CONFIG = "config.json"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


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
    workdir = Path(workdir)
    with run_lock(workdir), _disk_errors(workdir), signals() as stop:
        run = Run(recipe, workdir)
        run.check()
        for name in recipe.chain:
            stop.check(name)
            before(name)
            run.stage(name, stop)


@contextlib.contextmanager
def _disk_errors(workdir: Path) -> Iterator[None]:
    """A full disk or a forbidden file, wherever it is met, is something to mend."""
    try:
        yield
    except OSError as e:
        if e.errno not in _DISK:
            raise
        raise ConfigError(
            f"{e.filename or workdir}: {e.strerror}. Free space or mend the permissions, then run "
            "the same command again: what was saved is intact."
        ) from e


class Run:
    """What the stages of a run share: mesh, data sources, tokenizer."""

    def __init__(self, recipe: Recipe, workdir: Path):
        self.recipe, self.workdir = recipe, Path(workdir)
        self.mesh = make_mesh(recipe.mesh)
        self._sources: dict[str, Any] = {}
        self._check_tokenizer()
        names = dict.fromkeys(recipe.tokenizer.data)
        sources = {n: self.source(n) for n in names} if not self._tokenizer_path.exists() else {}
        self.tokenizer: Tokenizer = train_tokenizer(recipe.tokenizer, sources, self._tokenizer_path)

    @property
    def _tokenizer_path(self) -> Path:
        return self.workdir / "tokenizer.json"

    def _check_tokenizer(self) -> None:
        """A tokenizer that is there already was made as the recipe says."""
        config = self.workdir / CONFIG
        if not (config.is_file() and self._tokenizer_path.is_file()):
            return
        before = json.loads(config.read_text()).get("tokenizer")
        if diff := differences(before, plain(self.recipe.tokenizer), "tokenizer"):
            raise CheckpointError(
                f"{self._tokenizer_path} was made with another configuration:\n"
                + diff_table(diff)
                + "\nUse another --workdir, or the configuration of before."
            )

    def check(self) -> None:
        """Finds what a later stage would stumble over before the first one is paid for.

        Raises:
          UserError: models that do not fit together, data that cannot be read, starts that are not
            there.
        """
        for name in self.recipe.chain:
            stage = self.recipe.stages[name]
            if (self.workdir / name / handover.DONE).is_file():
                continue
            make_model(self.recipe, stage, self.tokenizer.vocab_size)
            _check_batch_size(name, stage, self.mesh.size)
            evaluated = [self.recipe.evals[e].data for e in stage.evals]
            for data in (*stage.data, *stage.loss, *evaluated):
                self.source(data)
            handover.check_sources(self.recipe, name, self.workdir)

    def record(self) -> None:
        """Writes what is about to run; not before it is known to fit what ran before."""
        write_json(self.workdir / CONFIG, plain(self.recipe))
        write_json(self.workdir / "env.json", environment())

    def source(self, name: str) -> Any:
        """The data set's source, made once."""
        if name not in self._sources:
            self._sources[name] = make_source(name, self.recipe.data[name])
        return self._sources[name]

    def stage(self, name: str, stop: Stop) -> None:
        """Runs one stage, unless it is done."""
        Stage(self, name).run(stop)


def _check_batch_size(name: str, stage: StageConfig, devices: int) -> None:
    if stage.batch % (stage.accumulate * devices):
        raise ConfigError(
            f"stages.{name}.batch={stage.batch} does not divide over {devices} devices times "
            f"accumulate={stage.accumulate}; make it a multiple of {stage.accumulate * devices}"
        )


class Stage:
    """One stage of a run: model, shardings, starts, and what identifies it when it resumes."""

    def __init__(self, run: Run, name: str):
        self.run_, self.name = run, name
        self.recipe, self.mesh = run.recipe, run.mesh
        self.config: StageConfig = run.recipe.stages[name]
        self.directory = run.workdir / name
        self.stop = Stop()
        self.model = make_model(run.recipe, self.config, run.tokenizer.vocab_size)
        _check_batch_size(name, self.config, self.mesh.size)
        self.abstract = abstract_params(self.model, self.mesh)
        self.image_size = image_size(self.model)
        self.starts = handover.plan(run.recipe, self.config, run.workdir, self.abstract)

    # -- parameters ----------------------------------------------------------------------------

    @property
    def _encoder(self) -> str:
        return self.model.encoder

    def load_params(self, *, resumed: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """(trained, frozen) parameters as the hand-over decided; frozen ones in compute dtype.

        Args:
          resumed: the trained ones come from a checkpoint: leave them out.
        """
        starts = {
            n: s for n, s in self.starts.items() if not (resumed and n in trained(self.config))
        }
        names = [n for n, s in starts.items() if s.fresh or s.source == "random"]
        rng = jax.random.fold_in(jax.random.key(self.recipe.seed), component_seed(self.name))
        make = lambda key: {n: nn.meta.unbox(init_params(self.model, key))[n] for n in names}  # noqa: E731
        where = {n: jax.tree.map(lambda x: x.sharding, self.abstract[n]) for n in names}
        initial = jit(make, out_shardings=where)(rng)
        params = {
            name: handover.load(start, self.abstract[name], initial.get(name))
            for name, start in starts.items()
        }
        return self.divide(params)

    def divide(self, params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits components into trained and frozen, the latter cast to the compute dtype."""
        learnt, frozen = split(params, tuple(n for n in trained(self.config) if n in params))
        dtype = DTYPES[self.recipe.dtype]
        return learnt, jax.tree.map(lambda x: x.astype(dtype), frozen)

    def abstract_state(self, tx: optax.GradientTransformation) -> Any:
        """Shapes and shardings of the train state; optimizer moments lie as their parameters."""
        learnt = {n: self.abstract[n] for n in trained(self.config)}
        state = jax.eval_shape(lambda p: init_state(p, tx), learnt)
        whole = replicated(self.mesh)
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)  # noqa: E731
        opt = optax.tree_utils.tree_map_params(
            tx,
            lambda x, p: put(x, p.sharding),
            state.opt_state,
            learnt,
            transform_non_params=lambda x: put(x, whole),
        )
        return state.replace(
            params=learnt,
            opt_state=opt,
            step=put(state.step, whole),
            skipped=put(state.skipped, whole),
        )

    # -- identity ------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint of this stage to be resumed.

        Data and starts count by their content, wherever they lie.
        """
        without = lambda group, keys: {k: v for k, v in plain(group).items() if k not in keys}  # noqa: E731
        names = components(self.config)
        return {
            "stage": self.name,
            "config": without(self.config, (*StageConfig.FREE, "start")),
            "components": {n: without(self.recipe.components[n], ("weights",)) for n in names},
            "data": {n: without(self.recipe.data[n], ("source",)) for n in self.config.data},
            "fingerprints": {n: self.run_.source(n).fingerprint() for n in self.config.data},
            "tokenizer": self.run_.tokenizer.digest,
            "start": {n: self.starts[n].digest for n in names},
            "seed": self.recipe.seed,
            "dtype": self.recipe.dtype,
        }

    # -- running -------------------------------------------------------------------------------

    def run(self, stop: Stop) -> None:
        """Trains the stage to its end, from its newest checkpoint if there is one."""
        self.stop, identity = stop, self.identity()
        if (self.directory / handover.DONE).is_file():
            before = handover.finished(self.directory)["identity"]
            if diff := differences(before, plain(identity)):
                raise CheckpointError(
                    f"{self.directory} was finished with another configuration:\n"
                    + diff_table(diff)
                    + "\nUse another --workdir, or remove that directory to train it again."
                )
            print(f"{self.name}: done before", flush=True)
            return
        c = self.config
        tx = make_optimizer(c.optim, c.steps)
        rate = learning_rate(c.optim, c.steps)
        checkpointer = Checkpointer(self.directory / "checkpoints", keep=c.keep)
        began = time.monotonic()
        with Writer(self.directory, self.name, c.steps) as writer:
            writer.say(
                f"{c.kind}, {c.steps} steps of {c.batch}, mesh {dict(self.mesh.shape)}\n"
                + handover.report(self.starts, c, self.abstract)
            )
            restored = checkpointer.restore(self.abstract_state(tx), expect=identity)
            self.run_.record()
            learnt, frozen = self.load_params(resumed=restored is not None)
            if restored is None:
                make = jit(
                    lambda p: init_state(p, tx),
                    out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_state(tx)),
                )
                state = make(learnt)
            else:
                state = restored[0]
                writer.say(f"resumed at step {int(state.step)}")
            del learnt
            self.evaluator = Evaluator(self, frozen)  # compiled once, for the looks on the way too
            digests = {name: combined(tree_digests(tree)) for name, tree in frozen.items()}
            try:
                state = self._steps(state, frozen, tx, rate, checkpointer, identity, writer)
            except BaseException:
                with contextlib.suppress(CheckpointError):  # the first error is the one to tell
                    checkpointer.close()
                raise
            checkpointer.close()
            for name, tree in frozen.items():
                if combined(tree_digests(tree)) != digests[name]:
                    raise CheckpointError(
                        f"{self.name}: {name} is frozen but changed during training: the result is "
                        f"worth nothing. Move {self.directory} away and train it again; if this "
                        "comes back, suspect the memory."
                    )
            self._finish(state, frozen, identity, writer, time.monotonic() - began)

    def _steps(self, state, frozen, tx, rate, checkpointer, identity, writer):
        c, stop, start = self.config, self.stop, int(state.step)
        objective = (
            CocaObjective(self.model)
            if isinstance(self.model, CoCa)
            else CaptionObjective(self.model, c.chunk_rows)
        )
        step_fn = jit(
            make_train_step(
                objective, tx, seed=self.recipe.seed, accumulate=c.accumulate, dropout=c.dropout
            ),
            donate_argnums=0,
        )
        streams = {n: (*self.stream(n, frozen), w) for n, w in c.data.items()}
        loader = make_loader(
            streams,
            global_batch=c.batch,
            seed=self.recipe.seed,
            start_step=start,
            num_steps=c.steps,
            host_index=jax.process_index(),
            host_count=jax.process_count(),
            workers=self.recipe.workers,
        )
        drawn = lambda step: Schedule(c.data)(step - 1)[0]  # noqa: E731
        journal = Journal(
            writer, self.name, c, rate,
            lambda step, i: describe(drawn(step), self.run_.source(drawn(step)), i),
        )  # fmt: skip
        evaluator = self.evaluator
        due = lambda step: c.eval_every and step % c.eval_every == 0 and 0 < step < c.steps  # noqa: E731

        def look(step: int) -> None:
            began = time.monotonic()
            writer.write(step, evaluator(state.params, c.eval_limit), loud=True)
            journal.paused(time.monotonic() - began)

        if due(start) and not writer.evaluated(start):
            look(start)
        fault(self.name, "begin")
        shapes = set()
        for step, batch in enumerate(loader, start + 1):
            shape = str({k: v.shape for k, v in batch.items()})
            if new := shape not in shapes:
                shapes.add(shape)
                check_batch(batch, self.run_.tokenizer.vocab_size)
                journal.flush()
            began = time.monotonic()
            state, metrics = step_fn(state, frozen, to_mesh(batch, self.mesh))
            if new:
                journal.compiled(time.monotonic() - began)
            journal.add(step, metrics, batch["id"][batch["bad"]])
            if new:
                journal.flush()
            fault(self.name, "step", step)
            if step % c.save_every == 0 or step == c.steps:
                journal.flush()
                checkpointer.save(step, state, identity)
                fault(self.name, "saving", step)
            if due(step) and not stop.signal:
                journal.flush()
                with contextlib.suppress(Preempted):  # told below, once the state is saved
                    look(step)
            if stop.signal:
                journal.flush()
                checkpointer.save(step, state, identity)
                checkpointer.close()
                stop.check(f"{self.name}, step {step}, saved")
        journal.flush()
        return state

    def stream(self, name: str, frozen: dict[str, Any]) -> tuple[Any, Any]:
        """(items, transform) of a data set; with `cache`, over tokens of the frozen encoder."""
        config, source = self.recipe.data[name], self.run_.source(name)
        if config.cache and STAGES[self.config.kind].visual and self._encoder in frozen:
            source = self.features(name, frozen)
        return make_stream(name, config, source, self.run_.tokenizer, image_size=self.image_size)

    def features(self, name: str, frozen: dict[str, Any]) -> Any:
        """The data set's source with the frozen encoder's tokens in place of its pictures."""
        config = self.recipe.data[name]
        return cached(
            self.run_.source(name),
            self.run_.workdir / "features",
            encode=self.model.modules[self._encoder],
            params=frozen[self._encoder],
            digest=self.starts[self._encoder].digest,
            size=config.size or self.image_size,
            frames=config.frames if self.run_.source(name).kind == "clip" else 1,
            fit=config.fit,
            flip=config.flip,
            mesh=self.mesh,
            watch=lambda batches: self.stop.watch(batches, self.name, "features"),
        )

    def _finish(self, state, frozen, identity, writer, seconds):
        fault(self.name, "finish")
        scores = self.evaluator(state.params, 0, self.directory / "eval")
        if scores:
            writer.write(self.config.steps, scores, loud=True)
        store = ComponentStore(self.run_.workdir / handover.STORE)
        digests = {n: store.put(n, state.params[n]) for n in trained(self.config)}
        record = {"components": digests, "identity": plain(identity), "scores": scores,
                  "steps": self.config.steps, "seconds": round(seconds, 1)}  # fmt: skip
        fault(self.name, "stored")
        write_json(self.directory / handover.DONE, record)


class Evaluator:
    """The stage's losses and evaluations, compiled once."""

    def __init__(self, stage: Stage, frozen: dict[str, Any]):
        self.stage, self.frozen = stage, frozen
        if not isinstance(stage.model, CoCa):
            self.decoder = _Watched(stage.model, stage.run_.tokenizer, stage.mesh, self._watch)
            self.control = jit(make_control(stage.model))

    def _watch(self, batches: Iterator[Any]) -> Iterator[Any]:
        return self.stage.stop.watch(batches, self.stage.name, "evaluate")

    def __call__(self, learnt: Any, limit: int, directory: Path | None = None) -> dict[str, float]:
        """Scores by name, `<data set>/<metric>`; predictions go to `directory` if given."""
        stage, c = self.stage, self.stage.config
        if isinstance(stage.model, CoCa):
            return {}
        params = {**self.frozen, **learnt}
        scores: dict[str, float] = {}
        for name in c.loss:
            items, transform = stage.stream(name, self.frozen)
            batches = self._watch(eval_batches(items, transform, c.batch))
            sums = [
                jax.device_get(self.control(params, to_mesh(b, stage.mesh)))
                for b, _ in zip(batches, range(c.loss_batches), strict=False)
            ]
            scores |= {f"{name}/{k}": v for k, v in control_scores(sums).items()}
        for name in c.evals:
            spec = stage.recipe.evals[name]
            config = stage.recipe.data[spec.data]
            source = stage.run_.source(spec.data)
            frames = config.frames if source.kind == "clip" else 1
            if config.cache:
                source = stage.features(spec.data, self.frozen)
            result = evaluate(
                self.decoder, params, source, task=config.task, max_new=spec.max_new,
                batch=-(-spec.batch // stage.mesh.size) * stage.mesh.size,
                limit=_least(limit, spec.limit), frames=frames,
                size=config.size or stage.image_size, fit=config.fit,
            )  # fmt: skip
            scores |= {f"{name}/{k}": v for k, v in result.scores.items()}
            if directory is not None:
                save_result(directory / name, result, spec)
        return scores


class _Watched(Decoder):
    """A decoder that a signal stops between two batches."""

    def __init__(self, model: Any, tokenizer: Any, mesh: Any, watch: Callable[[Any], Any]):
        super().__init__(model, tokenizer, mesh)
        self._watch = watch

    def texts(self, params: Any, batches: Iterator[Any], max_new: int) -> Iterator[Any]:
        """As in `Decoder`."""
        return super().texts(params, self._watch(batches), max_new)


def _least(*limits: int) -> int:
    return min((n for n in limits if n), default=0)


def save_result(directory: Path, result: Any, spec: Any) -> None:
    """Writes predictions.jsonl and score.json of an evaluation."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "predictions.jsonl", "w", encoding="utf-8") as file:
        for row in result.rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    write_json(directory / "score.json", {"scores": result.scores, "eval": plain(spec)})


def diff_table(rows: list[tuple[str, Any, Any]], limit: int = 12) -> str:
    """Differences as lines `key | there | here`."""
    lines = [f"  {'key':<40} | there | here"]
    lines += [f"  {key:<40} | {there} | {here}" for key, there, here in rows[:limit]]
    return "\n".join(lines + ([f"  … {len(rows) - limit} more"] if len(rows) > limit else []))


def environment() -> dict[str, Any]:
    """Versions, devices and command line, for the record."""
    return {
        "vadapter": __version__,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
        "devices": [str(d) for d in jax.devices()],
        "command": sys.argv,
    }
