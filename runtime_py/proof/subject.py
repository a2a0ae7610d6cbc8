"""What a backend's extra check is, and what it gets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from export.checks import Check
from export.manifest import Artifact, Manifest
from export.target import FLOAT
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.plan import Plan

if TYPE_CHECKING:
    from quant.weights import QuantizedWeights


@dataclass(frozen=True)
class Subject:
    """One artifact of a bundle in ``directory``, the weights that it was made of, and its fresh references.

    ``references`` are by name. ``exact`` is the one with float activations, whether or not it is among them.
    """

    directory: Path
    manifest: Manifest
    format: str
    weights: "QuantizedWeights"
    plan: Plan
    references: dict[str, ReferenceLogits]
    exact: ReferenceLogits

    @property
    def artifact(self) -> Artifact:
        return self.manifest.artifacts[self.format]

    @property
    def rounds(self) -> bool:
        """Do its kernels round activations here? (Those of another processor may not.)"""
        return next(iter(self.references)) != FLOAT

    @property
    def path(self) -> Path:
        return self.directory / self.artifact.file


@dataclass(frozen=True)
class ExtraCheck:
    """A check of one backend, in addition to the walks, which all backends have in common.

    It runs at export and with ``validate --checkpoint``. With ``draft_only`` it runs only at export, because it writes
    a temporary file into the bundle's directory.
    """

    run: Callable[[Subject], list[Check]]
    draft_only: bool = False
