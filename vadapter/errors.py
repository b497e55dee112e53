"""Errors written for the person who meets them, and the exit codes a scheduler acts on."""

import contextlib
import errno
from collections.abc import Iterator

# Exit codes. A scheduler restarts a job on any code but 0, NON_FINITE and USER_ERROR.
LOST = 1  # a host hung, died or did not come; also any error that is not foreseen
PREEMPTED = 75  # stopped by a signal, state saved: run the same command again
NON_FINITE = 77  # the loss or the gradients were not finite several times in a row
USER_ERROR = 78  # configuration, data or checkpoint: restarting will not help


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR
    parts: "tuple[UserError, ...]" = ()  # the errors that this one tells together


class ConfigError(UserError):
    """A configuration key, value or combination that cannot run."""


class DataError(UserError):
    """Missing, empty, corrupt or mismatching data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


class Problems:
    """Gathers what there is to mend, so that all of it can be told at once.

    Attributes:
      found: message -> the error, and where it was met.
    """

    def __init__(self):
        self.found: dict[str, tuple[UserError, list[str]]] = {}

    @contextlib.contextmanager
    def gather(self, where: str = "") -> Iterator[None]:
        """Keeps a UserError of the block, which ends there; the same one twice is one."""
        try:
            yield
        except UserError as error:
            for part in error.parts or (error,):
                _, places = self.found.setdefault(str(part), (part, []))
                places += [where] * (where not in ("", *places))

    def lines(self) -> list[str]:
        """Each problem, behind the places where it was met."""
        at = lambda places: f"{', '.join(places)}: " if places else ""  # noqa: E731
        return [at(places) + text for text, (_, places) in self.found.items()]

    def settle(self) -> None:
        """Raises the error that was gathered, or all of them as one, if there are any.

        Raises:
          UserError: of the class of the first.
        """
        errors = tuple(error for error, _ in self.found.values())
        if len(errors) == 1:
            raise errors[0]
        if errors:
            lines = "".join(f"\n- {line}" for line in self.lines())
            whole = type(errors[0])(f"{len(errors)} problems:{lines}")
            whole.parts = errors
            raise whole


class NonFiniteError(Exception):
    """Training met non-finite gradients too many steps in a row; nothing poisoned was saved."""

    exit_code = NON_FINITE


class HostError(Exception):
    """A host of several did not come, or did something else: the job ends as a whole."""

    exit_code = LOST


class Preempted(Exception):  # noqa: N818 - an event, not an error
    """A signal asked the run to stop; its state has been saved."""

    exit_code = PREEMPTED


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
         errno.ENOTDIR, errno.EEXIST)  # fmt: skip


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk or a forbidden file, wherever it is met, is something to mend.

    Raises:
      ConfigError: names the file.
    """
    try:
        yield
    except OSError as e:
        if e.errno not in _DISK:
            raise
        raise ConfigError(
            f"{e.filename or 'the disk'}: {e.strerror}. Free space or mend the permissions, then "
            "run the same command again: what was saved is intact."
        ) from e
