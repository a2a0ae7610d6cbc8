"""The errors that a user can cause. Each has the exit code with which the command line ends.

The text of an error is one line: what was wrong, the value found, and what to do about it.
"""


class UserError(Exception):
    """The base class. ``cli.main`` prints the error's line and exits with ``exit_code``."""

    exit_code = 3


class BadInput(UserError, ValueError):
    """A checkpoint, configuration, recipe, prompt or file that cannot be used as it is."""

    exit_code = 3


class DoesNotFit(UserError):
    """More context, memory or disk than this model or this host has."""

    exit_code = 4


class DeviceError(UserError):
    """No phone that this host can use, or a phone or app that failed while it was used."""

    exit_code = 4


class VerificationFailed(UserError):
    """An artifact that does not agree with the eager model, or whose bytes are not what its manifest says."""

    exit_code = 5


def counted(number: int, noun: str) -> str:
    """The number with its noun, for messages: "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
