"""Errors written for the person who meets them, and the exit codes a scheduler acts on."""

# Exit codes. A scheduler restarts a job on any code but OK, NON_FINITE and USER_ERROR.
OK = 0
WATCHDOG = 1
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
