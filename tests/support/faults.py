"""Faults at chosen points of a run: the process kills, stops or hangs itself there.

    with faults.injected("TERM:decoder:step:4"):
        train(recipe, workdir)

    FAULT=KILL:llm:saving:4 python -m support.faults train --config=…  # like python -m vadapter

Faults: KILL, TERM, INT and STOP send that signal to the process, RAISE is an error that nobody
expects, HANG waits forever. Points:
  STAGE:begin       before the first step of a process
  STAGE:step:N      after step N, before it is saved
  STAGE:saving:N    while step N is being saved
  STAGE:evaluate:I, STAGE:features:I   before batch I of an evaluation, of a feature cache
  STAGE:finish      before the evaluation at the end
  STAGE:stored      after the components are stored, before done.json is written
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

VARIABLE = "FAULT"
SETATTR: Callable[..., None] = setattr


def fault(name: str, point: str) -> None:
    """Do what a fault does."""
    if name == "RAISE":
        raise RuntimeError(f"injected at {point}")
    if name == "HANG":
        while True:
            time.sleep(3600)
    os.kill(os.getpid(), signal.Signals[f"SIG{name}"])


def install(text: str | None = None, patch: Callable[..., None] = SETATTR) -> None:
    """Let this process meet a fault, `KILL:llm:step:5`; default: of the variable FAULT."""
    name, _, point = (os.environ.get(VARIABLE, "") if text is None else text).partition(":")
    if name:
        at(point, lambda: fault(name, point), patch)


@contextlib.contextmanager
def injected(text: str) -> Iterator[None]:
    """The fault for the code within."""
    with pytest.MonkeyPatch.context() as patch:
        install(text, patch.setattr)
        yield


def at(point: str, action: Callable[[], Any], patch: Callable[..., None] = SETATTR) -> None:
    """Call `action` the first time that a run comes to a point."""
    done = []

    def reach(*names: Any) -> None:
        if not done and ":".join(map(str, names)) == point:
            done.append(point)
            action()

    kind = point.split(":")[1]
    {"begin": _begin, "step": _step, "saving": _saving, "finish": _finish, "stored": _stored}.get(
        kind, _batches
    )(reach, patch)


def _batches(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.distributed.preemption import Stop

    watch = Stop.watch

    def watched(self: Stop, items: Any, *point: str) -> Any:
        def met() -> Iterator[Any]:
            for i, item in enumerate(items):
                reach(*point, i)
                yield item

        return watch(self, met(), *point)

    patch(Stop, "watch", watched)


def _begin(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.train.supervisor import Supervisor

    steps = Supervisor.steps

    def begun(self: Supervisor, *args: Any) -> Any:
        reach(self.stage.name, "begin")
        return steps(self, *args)

    patch(Supervisor, "steps", begun)


def _step(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.train.supervisor import Supervisor

    after = Supervisor.after

    def done(self: Supervisor, step: int, metrics: Any) -> None:
        after(self, step, metrics)
        reach(self.stage.name, "step", step)

    patch(Supervisor, "after", done)


def _saving(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.train import loop

    class Checkpointer(loop.Checkpointer):
        def __init__(self, directory: Any, **options: Any):
            super().__init__(directory, **options)
            self.stage = directory.parent.name

        def save(self, step: int, *args: Any) -> bool:
            saved = super().save(step, *args)
            reach(self.stage, "saving", step)
            return saved

    patch(loop, "Checkpointer", Checkpointer)


def _finish(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.evaluate import evaluator

    class Evaluator(evaluator.Evaluator):
        def __call__(self, trainable: Any, limit: int, directory: Any = None) -> Any:
            if directory is not None:
                reach(self.stage.name, "finish")
            return super().__call__(trainable, limit, directory)

    patch(evaluator, "Evaluator", Evaluator)


def _stored(reach: Callable[..., None], patch: Callable[..., None]) -> None:
    from vadapter.train import loop

    write = loop.write_json

    def written(path: Any, value: Any) -> None:
        if path.name == loop.initialization.DONE:
            reach(path.parent.name, "stored")
        write(path, value)

    patch(loop, "write_json", written)


if __name__ == "__main__":
    from vadapter.cli.main import main

    install()
    sys.exit(main())
