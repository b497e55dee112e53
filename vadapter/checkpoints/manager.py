"""The checkpoints of a stage: saved in the background, verified when restored.

Each checkpoint is a directory `<step>/`, see `array_io`. Three things can go wrong:

    it does not fit this run       an error with a table of the differences
    it is corrupt                  a warning; the previous one is restored
    it could not be written        a warning; training continues, until too many fail in a row

No run ever starts from the beginning because of a bad file.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vadapter.checkpoints import array_io
from vadapter.checkpoints.array_io import CorruptError
from vadapter.distributed import hosts
from vadapter.errors import CheckpointError, ConfigError, one_line
from vadapter.io import storage

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

PyTree = Any

QUARANTINE = "quarantine"
MAX_FAILURES = 2  # saves in a row that may fail before the run stops

log = logging.getLogger(__name__)


def steps(directory: Path) -> list[int]:
    """Return the committed steps, ascending.

    Orbax commits a checkpoint by an atomic rename to its number; in a bucket, by a marker. It may
    still be corrupt: an interrupted copy of a run directory looks committed.
    """
    return sorted(int(p.name) for p in _numbered(directory) if storage.committed(p))


def _numbered(directory: Path) -> list[Path]:
    """Return the directories of steps, committed or not."""
    if not storage.is_folder(directory):
        return []
    return [path for path in directory.iterdir() if path.name.isdecimal()]


class Checkpointer:
    """The checkpoints of one stage in a directory: the newest `keep` are kept.

    There is one writer per directory (see `io.lock`), so that leftovers of interrupted saves are
    removed at once. On several hosts all make the same calls, with the directory on a shared file
    system.
    """

    def __init__(self, directory: Path, *, keep: int):
        if keep < 1:
            raise ConfigError(f"cannot keep {keep} checkpoints: keep at least 1")
        self._directory = storage.absolute(directory)
        self._keep = keep
        self._manager: ocp.CheckpointManager | None = None
        self._in_flight: int | None = None
        self._own: set[int] = set()  # steps this object has saved or restored
        self._failures = 0  # in a row
        self._remove_leftovers()

    def save(self, step: int, state: PyTree, meta: Mapping[str, Any]) -> bool:
        """Start to save a state, and the JSON values that a resume needs and checks.

        The arrays are copied before it returns, so that they may be donated. Returns False if this
        object has saved or restored the step before, or if the save failed at once.

        Raises:
          CheckpointError: too many saves failed in a row, or a checkpoint of a later step exists;
            on several hosts also if the save could not begin.
          HostError: other hosts save another step, or none.
        """
        hosts.exchange("", f"saving step {step}")  # if one host is missing, Orbax waits forever
        self._settle()
        if step in self._own:
            return False
        if step <= (newest := max(steps(self._directory), default=-1)):
            raise CheckpointError(
                f"{self._directory} already has step {newest}, so step {step} cannot be saved: "
                "resume that run, or choose another run directory"
            )
        from vadapter.checkpoints import orbax_io

        orbax_io.quiet_orbax()
        args = orbax_io.items(state, {**meta, "step": step})
        try:
            self._manager = self._manager or orbax_io.make_manager(self._directory, self._keep)
            self._manager.save(step, args=args, force=True)
        except Exception as e:
            if hosts.count() > 1:  # the others may be waiting inside Orbax
                raise CheckpointError(
                    f"could not save step {step} in {self._directory} ({one_line(e)})"
                ) from e
            self._failed(step, e)
            return False
        self._own.add(step)
        self._in_flight = step
        return True

    def committed(self) -> list[int]:
        """Return the steps on disk, ascending, without a save that is still in progress."""

        def complete(folder: Path) -> bool:
            return storage.is_folder(folder / "state") and storage.is_folder(folder / "meta")

        return [n for n in steps(self._directory) if complete(self._directory / str(n))]

    def wait(self) -> int | None:
        """Wait for the save in progress; return the newest committed step, None if there is none.

        Raises:
          CheckpointError: too many saves failed in a row.
        """
        self._settle()
        return max(self.committed(), default=None)

    def close(self) -> None:
        """Wait for the save in progress and release the threads.

        Raises:
          CheckpointError: the last save failed, so the end of the run is not on disk.
        """
        self._settle()
        self._drop_manager()
        if self._failures:
            newest = max(self.committed(), default=None)
            kept = f"the newest checkpoint in {self._directory} is that of step {newest}"
            if newest is None:
                kept = f"there is no checkpoint in {self._directory}"
            raise CheckpointError(
                f"the last save failed; {kept}. Free space, then rerun the same command."
            )

    def restore(
        self, abstract_state: PyTree, *, expect: Mapping[str, Any] | None = None,
        upgrade: array_io.Upgrade = dict,
    ) -> tuple[PyTree, dict[str, Any]] | None:  # fmt: skip
        """Restore the newest intact checkpoint, and move later ones to `quarantine/`.

        Returns state and meta, see `array_io.load`; None if there are no checkpoints.

        Raises:
          CheckpointError: the newest intact one does not fit this run, or all are corrupt.
        """
        self._settle()
        # The steps that the first host sees: a network file system may show others fewer.
        committed = hosts.of_first(steps(self._directory), f"steps in {self._directory.name}")
        if not committed:
            return None
        reasons = []
        for step in reversed(committed):
            path = self._directory / str(step)
            try:
                state, meta = array_io.load(path, abstract_state, expect=expect, upgrade=upgrade)
                if meta["step"] != step:
                    raise CorruptError(f"{path}: contains step {meta['step']}")
            except CorruptError as e:
                log.warning("skipped a corrupt checkpoint: %s", e)
                reasons.append(str(e))
                continue
            self._drop_manager()
            if later := [number for number in committed if number > step]:
                if hosts.first():
                    quarantine(self._directory, later)
                    folder = self._directory / QUARANTINE
                    log.warning("moved the later steps %s to %s", later, folder)
                hosts.exchange("", "checkpoints quarantined")
            self._own = {step}
            return state, meta
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {self._directory} can be used:\n  "
            + "\n  ".join(reasons[:3])
            + "\nRestore one from a backup, or move them away to start from the beginning."
        )

    def _settle(self) -> None:
        """Wait for the save in progress and record whether it succeeded on all hosts."""
        if self._in_flight is None or self._manager is None:
            return
        step, self._in_flight = self._in_flight, None
        error = None
        try:
            self._manager.wait_until_finished()
            if hosts.first() and step not in steps(self._directory):
                raise OSError("no such directory afterwards")
        except Exception as e:
            error = e
        failures = hosts.exchange(error and one_line(error), f"saved step {step}")
        for host, failure in enumerate(failures):
            if error is None and failure is not None:
                error = OSError(f"host {host}: {failure}")
        if error is None:
            self._failures = 0
        else:
            self._own.discard(step)
            self._failed(step, error)

    def _failed(self, step: int, e: Exception) -> None:
        """Count a failed save; raise CheckpointError if too many failed in a row."""
        self._failures += 1
        self._drop_manager()  # Orbax assumes that the step exists
        self._remove_leftovers()  # otherwise a full disk would stay full
        message = f"could not save step {step} in {self._directory} ({one_line(e)})"
        if self._failures > MAX_FAILURES:
            raise CheckpointError(
                f"{message}; {self._failures} saves in a row failed, the newest checkpoint is that "
                f"of step {max(self.committed(), default=None)}. Free space, then rerun the same "
                "command."
            ) from e
        count = f"{self._failures} of at most {MAX_FAILURES} failures in a row"
        log.warning("%s; training continues without it (%s)", message, count)

    def _drop_manager(self) -> None:
        manager, self._manager = self._manager, None
        if manager is not None:
            try:
                manager.close()
            except Exception as e:
                log.debug("closing after a failed save: %s", one_line(e))

    def _remove_leftovers(self) -> None:
        """Remove the directories of interrupted saves."""
        if not hosts.first():
            return
        if storage.remote(self._directory):
            paths = [p for p in _numbered(self._directory) if not storage.committed(p)]
        else:
            paths = list(self._directory.glob(f"*{array_io.TMP}*"))
        for path in paths:
            storage.remove_tree(path)


def quarantine(directory: Path, numbers: list[int]) -> None:
    """Move steps to `quarantine/`, without overwriting those of the same number there."""
    for step in numbers:
        target = directory / QUARANTINE / str(step)
        copy = 0
        while target.exists():
            target = target.with_name(f"{step}.{(copy := copy + 1)}")
        storage.move_tree(directory / str(step), target)
