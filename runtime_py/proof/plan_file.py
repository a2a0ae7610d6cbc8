"""``proof/plan.json``: the proof of a bundle as data, which Python, Kotlin, C++ or any other program can replay.

docs/bundle.md explains the file, and docs/validation.md how its figures are computed. Works without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma3 import typed_json
from gemma3.errors import BadInput, VerificationFailed
from gemma3.host.files import parse_json, read_text
from runtime_py.proof.limits import AT_LEAST, Limits
from runtime_py.proof.plan import Plan

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class ArtifactProof:
    """How one artifact is judged against the golden vectors.

    ``reference`` is the prefix of its arrays in golden.safetensors. ``limits`` and their reason hold for this kind of
    file; ``tolerances`` are the resulting limits by check id and metric. A metric without one is information.
    """

    reference: str
    limits: Limits
    tolerances: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ProofPlan:
    """The plan, and how each artifact is judged. A value of a metric in ``at_least`` passes from its limit upwards,
    one of any other metric up to its limit. NaN never passes.
    """

    schema_version: int
    plan: Plan
    at_least: tuple[str, ...]
    artifacts: dict[str, ArtifactProof]


def save_plan(path: Path, plan: Plan, artifacts: Mapping[str, ArtifactProof]) -> None:
    proof = ProofPlan(SCHEMA_VERSION, plan, AT_LEAST, dict(artifacts))
    path.write_text(typed_json.encode(proof, indent=None), encoding="utf-8")


def load_plan(path: Path) -> ProofPlan:
    """Raises VerificationFailed when the file is damaged or of another version."""
    try:
        data = parse_json(read_text(path, "export the bundle again"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BadInput(f"schema_version is {ascii(version)[:60]}, this program reads {SCHEMA_VERSION}")
        return typed_json.decode(ProofPlan, data, "plan")
    except BadInput as error:
        raise VerificationFailed(f"{path}: not the plan of a proof ({error}); export the bundle again") from None
