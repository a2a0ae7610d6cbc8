"""The errors a user can cause. Each carries the exit code the command line ends with."""


class UserError(Exception):
    """One line: what was wrong, the value seen, and what to do about it."""

    exit_code = 3


class BadInput(UserError, ValueError):
    """A checkpoint, configuration, prompt or file that cannot be used as it is."""

    exit_code = 3


class DoesNotFit(UserError):
    """More context, memory or disk than this model or this host has."""

    exit_code = 4


class VerificationFailed(UserError):
    """An artifact that does not agree with the eager model, or whose bytes are not what its manifest says."""

    exit_code = 5
