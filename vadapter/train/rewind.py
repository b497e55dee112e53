"""Back to an earlier checkpoint of a stage that is not finished, to train on from there."""

from pathlib import Path

from vadapter.checkpoints.manager import put_aside, steps
from vadapter.config import nearest
from vadapter.errors import CheckpointError, ConfigError
from vadapter.io import storage
from vadapter.io.lock import run_lock
from vadapter.stages.initialization import DONE
from vadapter.stages.restore import read_run


def rewind(workdir: Path, step: int, stage: str | None = None) -> tuple[str, int, list[int]]:
    """Puts the checkpoints after a step aside; the next `vadapter train` goes on before them.

    Args:
      workdir: of a run that is stopped.
      step: the newest that stays is the last up to it.
      stage: its name; by default the first of the chain that is not finished.

    Returns:
      The stage, the step that it goes on from, and the steps that lie in `quarantine/` now.

    Raises:
      CheckpointError: no run, no such step, or the stage is finished.
      ConfigError: an unknown stage, or the run is still going on.
    """
    workdir = storage.absolute(workdir)
    chain = read_run(workdir).chain
    if stage is not None and stage not in chain:
        raise ConfigError(f"--stage={stage}: no such stage{nearest(stage, chain)}")
    done = lambda name: (workdir / name / DONE).is_file()  # noqa: E731
    stage = stage or next((name for name in chain if not done(name)), chain[-1])
    with run_lock(workdir):
        if done(stage):
            raise CheckpointError(
                f"{workdir / stage} is finished, and what follows starts from its result: there is "
                "no way back. Train in another --workdir"
            )
        directory = workdir / stage / "checkpoints"
        found = steps(directory)
        stay = [one for one in found if one <= step]
        if not stay:
            raise CheckpointError(f"no step up to {step} in {directory}; steps there: {found}")
        later = found[len(stay) :]
        put_aside(directory, later)
    return stage, stay[-1], later
