"""Errors with messages for users, and the exit codes that a scheduler acts on."""

import contextlib
import errno
from collections.abc import Iterator

# Exit codes. A scheduler restarts a job on any code but 0, NON_FINITE and USER_ERROR.
LOST = 1  # a host hung, died or did not start; also any unexpected error
PREEMPTED = 75  # stopped by a signal, state saved: rerun the same command
NON_FINITE = 77  # the loss or the gradients were not finite several times in a row
USER_ERROR = 78  # configuration, data or checkpoint: restarting will not help


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR
    parts: "tuple[UserError, ...]" = ()  # the errors that this one reports together


class ConfigError(UserError):
    """A configuration key, value or combination that cannot run."""


class DataError(UserError):
    """Missing, empty, corrupt or mismatching data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, corrupt, or of another configuration."""


class RenamedWarning(FutureWarning):
    """The old name of a configuration key, which still works for one release."""


class Problems:
    """Collects user errors, so that all of them are reported at once."""

    def __init__(self):
        # message -> the error, and the places where it occurred
        self._errors: dict[str, tuple[UserError, list[str]]] = {}

    @contextlib.contextmanager
    def gather(self, place: str = "") -> Iterator[None]:
        """Collect a UserError of the block, which ends there; the same message counts once.

        The list has `place` before the message.
        """
        try:
            yield
        except UserError as error:
            for part in error.parts or (error,):
                _, places = self._errors.setdefault(str(part), (part, []))
                places += [place] * (place not in ("", *places))

    def lines(self) -> list[str]:
        """Return each message after the places where it occurred."""
        return [
            f"{', '.join(places)}: {text}" if places else text
            for text, (_, places) in self._errors.items()
        ]

    def settle(self, *, placed: bool = False) -> None:
        """Raise what was collected as one error of the class of the first; does nothing without.

        `parts` are then the errors as they were raised. A list of several has their places, a
        single one has its places only if it is `placed`.
        """
        errors, lines = tuple(error for error, _ in self._errors.values()), self.lines()
        if not errors:
            return
        if len(errors) == 1 and (not placed or lines == [str(errors[0])]):
            raise errors[0]
        several = f"{len(lines)} problems:" + "".join(f"\n- {line}" for line in lines)
        combined = type(errors[0])(lines[0] if len(lines) == 1 else several)
        combined.parts = errors
        raise combined


class NonFiniteError(Exception):
    """Gradients were not finite too many steps in a row; no such update was saved."""

    exit_code = NON_FINITE


class HostError(Exception):
    """A host did not start, or diverged from the others: the whole job ends."""

    exit_code = LOST


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """A signal asked the run to stop; its state has been saved."""

    exit_code = PREEMPTED


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
         errno.ENOTDIR, errno.EEXIST)  # fmt: skip


def one_line(error: BaseException, limit: int | None = 160) -> str:
    """Return an error's type and its message, cut to `limit` characters, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:limit]}"


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Turn errors of a full disk or of missing permissions into a ConfigError."""
    try:
        yield
    except OSError as e:
        if e.errno not in _DISK:
            raise
        raise ConfigError(
            f"{e.filename or 'the disk'}: {e.strerror}. Free space or fix the permissions, then "
            "rerun the same command: saved files are intact."
        ) from e
