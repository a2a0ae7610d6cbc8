"""``proof/plan.json``: the proof of a bundle as data, which Python, Kotlin, C++ or any other program can replay.

docs/bundle.md explains the file, and docs/validation.md how its figures are computed. Works without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma3 import typed_json
from gemma3.errors import BadInput, VerificationFailed
from gemma3.host.files import parse_json, read_text
from runtime_py.proof.limits import AT_LEAST
from runtime_py.proof.plan import Plan

SCHEMA_VERSION = 2  # 2: several references for an artifact, limits that follow from them


@dataclass(frozen=True)
class ReferenceProof:
    """How an artifact is judged against one of its references, whose arrays in golden.safetensors begin with ``key``.

    ``tolerances`` are the limits by check id and metric. A metric without one is information. ``reason`` explains them.
    """

    key: str
    reason: str
    tolerances: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ProofPlan:
    """The plan, and how each artifact is judged. A value of a metric in ``at_least`` passes from its limit upwards,
    one of any other metric up to its limit. NaN never passes.

    ``artifacts`` has the references of each artifact by name. Kernels of different processors round activations in
    different ways, so an artifact passes if it keeps to the limits of one of them.
    """

    schema_version: int
    plan: Plan
    at_least: tuple[str, ...]
    artifacts: dict[str, dict[str, ReferenceProof]]


def save_plan(path: Path, plan: Plan, artifacts: Mapping[str, dict[str, ReferenceProof]]) -> None:
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
