"""What an extra check of a backend looks at."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.checks import Check
from export.manifest import Artifact, Manifest
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.limits import Limits
from runtime_py.proof.plan import Plan

if TYPE_CHECKING:
    from quant.weights import QuantizedWeights


@dataclass(frozen=True)
class Subject:
    """One artifact of a bundle in ``directory``, with the weights that it was made of and its fresh reference."""

    directory: Path
    manifest: Manifest
    artifact: Artifact
    weights: "QuantizedWeights"
    plan: Plan
    reference: ReferenceLogits
    limits: Limits

    @property
    def path(self) -> Path:
        return self.directory / self.artifact.file


@dataclass(frozen=True)
class ExtraCheck:
    """A check beyond the walks, which all backends have in common.

    It runs at export and with ``validate --checkpoint``; with ``draft_only`` at export alone, because it writes into
    the bundle's directory for a moment.
    """

    run: Callable[[Subject], list[Check]]
    draft_only: bool = False
