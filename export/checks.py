"""What a proof measures: figures, each with its limit and whether it passed. Works without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from gemma3.errors import VerificationFailed


@dataclass(frozen=True)
class Check:
    """One figure that validation measured. Artifact, id and metric identify it; ``name`` is for people.

    Without a limit it is information, and always passes. docs/validation.md lists ids and metrics.
    """

    artifact: str
    id: str
    metric: str
    name: str
    value: float
    limit: float | None
    passed: bool


def require_passed(checks: Sequence[Check]) -> None:
    """Raises VerificationFailed naming the first check that did not pass."""
    failed = [check for check in checks if not check.passed]
    if failed:
        first, more = failed[0], f" (and {len(failed) - 1} more failed)" if len(failed) > 1 else ""
        raise VerificationFailed(
            f".{first.artifact}, {first.name}: {first.metric} is {first.value:.3g}, the limit is "
            f"{first.limit:.3g}{more}; do not use this file"
        )
