"""The errors a user can cause. Each carries the exit code that the command line ends with.

Its text is one line: what was wrong, the value seen, and what to do about it.
"""


class UserError(Exception):
    """The base of the family; ``cli.main`` prints its line and exits with ``exit_code``."""

    exit_code = 3


class BadInput(UserError, ValueError):
    """A checkpoint, configuration, recipe, prompt or file that cannot be used as it is."""

    exit_code = 3


class DoesNotFit(UserError):
    """More context, memory or disk than this model or this host has."""

    exit_code = 4


class VerificationFailed(UserError):
    """An artifact that does not agree with the eager model, or whose bytes are not what its manifest says."""

    exit_code = 5


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images": for messages."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
