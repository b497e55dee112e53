"""Errors written for the person who meets them, and the exit codes a scheduler acts on."""

import contextlib
import errno
from collections.abc import Iterator

# Exit codes. A scheduler restarts a job on any code but 0, NON_FINITE and USER_ERROR.
PREEMPTED = 75  # stopped by a signal, state saved: run the same command again
NON_FINITE = 77  # the loss or the gradients were not finite several times in a row
USER_ERROR = 78  # configuration, data or checkpoint: restarting will not help


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with `exit_code`.
    """

    exit_code = USER_ERROR


class ConfigError(UserError):
    """A configuration key, value or combination that cannot run."""


class DataError(UserError):
    """Missing, empty, corrupt or mismatching data."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or belongs to another configuration."""


class NonFiniteError(Exception):
    """Training met non-finite gradients too many steps in a row; nothing poisoned was saved."""

    exit_code = NON_FINITE


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
