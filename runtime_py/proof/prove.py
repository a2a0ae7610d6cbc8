"""Is an exported file the model it claims to be? The proof of a draft, and its repetition for a bundle.

``prove`` writes the proof into the draft: the plan and the golden vectors. ``validate`` repeats it from these, or
computes the references again from the checkpoint. Repeating it for an .onnx works without torch.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from export.checks import Check
from export.manifest import GOLDEN, PLAN, Manifest, changed_files, read_manifest
from gemma3.errors import VerificationFailed
from runtime_py.backends import backend_of, open_session
from runtime_py.proof.golden import ReferenceLogits, load_golden, save_golden
from runtime_py.proof.limits import Tolerances, limits_for, tolerances
from runtime_py.proof.plan import Plan, make_plan
from runtime_py.proof.plan_file import ArtifactProof, load_plan, save_plan
from runtime_py.proof.subject import Subject
from runtime_py.proof.walks import check_session

if TYPE_CHECKING:
    from export.bundle import Draft
    from quant.source import Source
    from quant.weights import QuantizedWeights

log = logging.getLogger(__name__)


def prove(draft: "Draft") -> list[Check]:
    """Everything that must hold before a bundle may appear. Writes the draft's plan and golden vectors."""
    from export.integers import check_integers
    from runtime_py.proof.references import fresh_references

    manifest = draft.manifest
    backends = {format: backend_of(format) for format in manifest.artifacts}
    targets = {format: backend.target for format, backend in backends.items()}
    integers = check_integers(draft.directory, manifest, draft.weights, targets)
    if not all(check.passed for check in integers):
        return integers  # the wrong weights need no further proof
    plan = make_plan(manifest)
    references = fresh_references(manifest, plan, draft.weights)
    golden = {key: reference.at(plan.golden_positions) for key, reference in references.items()}
    save_golden(draft.directory / GOLDEN, golden)
    proofs = {}
    for format, artifact in manifest.artifacts.items():
        limits = limits_for(manifest, backends[format].integer_limits)
        activations = artifact.reference_activations
        proofs[format] = ArtifactProof(activations, limits, tolerances(plan, golden[activations], limits))
    save_plan(draft.directory / PLAN, plan, proofs)
    return [
        *integers,
        *check_walks(draft.directory, manifest, plan, references, fresh_tolerances(manifest, plan, references)),
        *extra_checks(draft.directory, manifest, plan, references, draft.weights, drafts=True),
    ]


def validate(bundle: Path, source: "Source | None" = None) -> list[Check]:
    """Every check of ``bundle``: its files' hashes, and the logits of each graph along its plan.

    With the opened checkpoint that it was made of, the references are computed again, every integer is read back from
    the files, and the checks of single steps run too. Without it the golden vectors are replayed. Raises what
    ``read_manifest`` raises; a comparison that fails is a check that did not pass.
    """
    manifest = read_manifest(bundle)
    hashes = check_hashes(bundle, manifest)
    if source is None:
        return [hashes, *_replay(bundle, manifest)] if hashes.passed else [hashes]
    from export.bundle import weights_behind
    from export.integers import check_integers
    from runtime_py.proof.references import fresh_references

    targets = {format: backend_of(format).target for format in manifest.artifacts}
    weights = weights_behind(manifest, source, targets)
    if not hashes.passed:
        return [hashes]  # what a damaged file computes means nothing, and its reader may not survive it
    integers = check_integers(bundle, manifest, weights, targets)
    plan = load_plan(bundle / PLAN).plan
    references = fresh_references(manifest, plan, weights)
    checks = [
        *integers,
        hashes,
        *check_walks(bundle, manifest, plan, references, fresh_tolerances(manifest, plan, references)),
    ]
    if all(check.passed for check in checks):  # a file that failed is not examined further
        checks += extra_checks(bundle, manifest, plan, references, weights, drafts=False)
    return checks


def _replay(bundle: Path, manifest: Manifest) -> list[Check]:
    proof, references = load_plan(bundle / PLAN), load_golden(bundle / GOLDEN)
    for format in manifest.artifacts:
        if format not in proof.artifacts or proof.artifacts[format].reference not in references:
            raise VerificationFailed(f"{bundle / PLAN}: has no proof of .{format}; export the bundle again")
    within = {format: one.tolerances for format, one in proof.artifacts.items()}
    return check_walks(bundle, manifest, proof.plan, references, within)


def check_hashes(bundle: Path, manifest: Manifest) -> Check:
    changed = changed_files(bundle, manifest.files)
    name = "sha256 of every file" + (f"; changed: {', '.join(changed)}" if changed else "")
    return Check("bundle", "files", "equal", name, 1 - len(changed) / len(manifest.files), 1.0, not changed)


def fresh_tolerances(
    manifest: Manifest, plan: Plan, references: Mapping[str, ReferenceLogits]
) -> dict[str, Tolerances]:
    """The tolerances of each artifact for its whole reference."""
    return {
        format: tolerances(
            plan,
            references[artifact.reference_activations],
            limits_for(manifest, backend_of(format).integer_limits),
        )
        for format, artifact in manifest.artifacts.items()
    }


def check_walks(
    bundle: Path,
    manifest: Manifest,
    plan: Plan,
    references: Mapping[str, ReferenceLogits],
    within: Mapping[str, Tolerances],
) -> list[Check]:
    """The logits of every graph in ``bundle``. Raises VerificationFailed when a reference is of another plan."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        reference = references[artifact.reference_activations]
        if reference.ids.tolist() != list(plan.ids):
            raise VerificationFailed(f"{bundle / GOLDEN}: its ids are not those of the plan; export the bundle again")
        log.info("validating .%s over %d positions", format, len(plan.ids))
        checks += check_session(open_session(bundle, format), plan, reference, format, within[format])
    return checks


def extra_checks(
    directory: Path,
    manifest: Manifest,
    plan: Plan,
    references: Mapping[str, ReferenceLogits],
    weights: "Mapping[str, QuantizedWeights]",
    *,
    drafts: bool,
) -> list[Check]:
    """The checks that each backend adds for its files; with ``drafts`` also those that write into the directory."""
    checks = []
    for format, artifact in manifest.artifacts.items():
        backend = backend_of(format)
        subject = Subject(
            directory,
            manifest,
            artifact,
            weights[format],
            plan,
            references[artifact.reference_activations],
            limits_for(manifest, backend.integer_limits),
        )
        for extra in backend.extra_checks:
            if drafts or not extra.draft_only:
                checks += extra.run(subject)
    return checks
