"""Return to an earlier checkpoint of an unfinished stage, to train again from there."""

import bisect
from pathlib import Path

from vadapter.checkpoints.manager import quarantine, steps
from vadapter.config import require_one_of
from vadapter.errors import CheckpointError
from vadapter.io import storage
from vadapter.io.lock import lock
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import read_run


def rewind(workdir: Path, step: int, stage: str | None = None) -> tuple[str, int, list[int]]:
    """Move the checkpoints after a step to `quarantine/`; `vadapter train` resumes before.

    The run must be stopped; the stage is by default the first of the chain that is not finished.
    Returns the stage, the step that it resumes from, and the steps that were moved.

    Raises:
      CheckpointError: no run, no such step, or the stage is finished.
      ConfigError: an unknown stage, or the run is still running.
    """
    workdir = storage.absolute(workdir)
    chain = read_run(workdir).chain
    if stage is not None:
        require_one_of(f"--stage={stage}", stage, chain)
    finished = [name for name in chain if (workdir / name / DONE).is_file()]
    stage = stage or next((name for name in chain if name not in finished), chain[-1])
    with lock(workdir / ".lock"):
        if stage in finished:
            raise CheckpointError(
                f"{stage} is finished; a finished stage cannot be rewound. Train in another "
                "--workdir"
            )
        directory = workdir / stage / "checkpoints"
        saved = steps(directory)
        count = bisect.bisect(saved, step)
        if not count:
            raise CheckpointError(f"no step up to {step} in {directory}; saved steps: {saved}")
        quarantine(directory, saved[count:])
    return stage, saved[count - 1], saved[count:]
