"""The proof that an exported file is the model that it claims to be: made for a draft, and repeated for a bundle.

``prove`` writes the plan and the golden vectors into the draft. ``validate`` repeats the proof from these, or computes
the references again from the checkpoint. The repetition for an .onnx works without torch.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.checks import Check
from export.manifest import GOLDEN, MANIFEST, PLAN, Manifest, changed_files, read_manifest
from export.target import FLOAT, Target, references_of
from gemma3.errors import VerificationFailed
from quant.recipe import SCHEMES, Integers
from runtime_py.backends import backend_of, open_session
from runtime_py.proof.golden import ReferenceLogits, load_golden, reference_keys, save_golden
from runtime_py.proof.limits import RESET, Tolerances, limits_of, stricter, tolerances, walk_id
from runtime_py.proof.plan import IMAGES, Plan, make_plan
from runtime_py.proof.plan_file import ProofPlan, ReferenceProof, load_plan, save_plan
from runtime_py.proof.subject import Subject
from runtime_py.proof.walks import advice_on_rounding, check_session

if TYPE_CHECKING:
    from export.bundle import Draft
    from quant.source import Source
    from quant.weights import QuantizedWeights
    from runtime_py.proof.references import FreshReferences

log = logging.getLogger(__name__)


def prove(draft: "Draft") -> list[Check]:
    """Check everything that must hold before a bundle may appear. Writes the draft's plan and golden vectors."""
    from export.integers import check_integers, check_kv_scales
    from runtime_py.proof.references import fresh_references

    manifest = draft.manifest
    targets = targets_of(manifest)
    integers = [
        *check_integers(draft.directory, manifest, draft.weights, targets),
        *check_kv_scales(draft.directory, manifest, draft.weights, targets),
    ]
    if not all(check.passed for check in integers):
        return integers  # with wrong weights, everything else fails too
    plan = make_plan(manifest)
    fresh = fresh_references(manifest, plan, draft.weights, targets)
    golden = {key: reference.at(plan.golden_positions) for key, reference in fresh.golden.items()}
    save_golden(draft.directory / GOLDEN, golden)
    save_plan(draft.directory / PLAN, plan, proofs_of(manifest, plan, golden))
    subjects = subjects_of(draft.directory, manifest, plan, fresh, draft.weights)
    checks = [*integers, *fresh_checks(subjects), *extra_checks(subjects, drafts=True)]
    keep_float = [format for format, artifact in manifest.artifacts.items() if artifact.references == (FLOAT,)]
    for advice in advice_on_rounding(checks, keep_float):
        log.warning("%s", advice)
    return checks


def proofs_of(
    manifest: Manifest, plan: Plan, golden: Mapping[str, ReferenceLogits]
) -> dict[str, dict[str, ReferenceProof]]:
    """What plan.json says about each artifact and each of its references, by their names."""
    return {
        format: {
            name: ReferenceProof(key, limits_of(golden[key], name, 1).reason, tolerances(plan, golden[key], name))
            for name, key in keys.items()
        }
        for format, keys in reference_keys(manifest).items()
    }


def validate(bundle: Path, source: "Source | None" = None) -> list[Check]:
    """Every check of ``bundle``: its files' hashes, and the logits of each graph along the plan.

    Without ``source`` the golden vectors are replayed, judged by the plan's limits and by our own. With the opened
    checkpoint that the bundle was exported from, the references are computed again, every integer is read back from
    the files, and the backends' extra checks run. A comparison that fails does not raise: it is a check that did not
    pass. Raises what ``read_manifest`` raises, VerificationFailed when the proof is damaged or incomplete, and
    BadInput when ``source`` is not the bundle's checkpoint or a graph cannot be opened.
    """
    manifest = read_manifest(bundle)
    check_references(bundle, manifest)
    hashes = check_hashes(bundle, manifest)
    if source is None:
        return [hashes, *_replay(bundle, manifest)] if hashes.passed else [hashes]
    from export.bundle import stored_kv, weights_behind
    from export.integers import check_integers
    from runtime_py.proof.references import fresh_references

    targets = targets_of(manifest)
    weights = weights_behind(manifest, source, targets)
    if not hashes.passed:
        return [hashes]  # the figures of a damaged file mean nothing, and reading it may crash
    integers = check_integers(bundle, manifest, weights, targets)
    weights = stored_kv(bundle, manifest, weights, targets)
    plan = make_plan(manifest)
    fresh = fresh_references(manifest, plan, weights, targets)
    subjects = subjects_of(bundle, manifest, plan, fresh, weights)
    checks = [*integers, hashes, check_companions(manifest, source), *fresh_checks(subjects)]
    if all(check.passed for check in checks):  # a file that failed is not examined further
        checks += extra_checks(subjects, drafts=False)
    return checks


def check_references(bundle: Path, manifest: Manifest) -> None:
    """Raises VerificationFailed unless every artifact has the references that follow from its weights.

    An older version did not know the last of them. Without it a file passes less easily.
    """
    for format, artifact in manifest.artifacts.items():
        integers = {
            name for name, verdict in manifest.weights.items() if isinstance(SCHEMES.get(verdict.scheme), Integers)
        }
        names = integers | artifact.stand_ins.keys()
        expected = references_of(backend_of(format).target, manifest.model, names, artifact.float_activations)
        held = artifact.references
        if not held or held != expected[: len(held)]:
            raise VerificationFailed(
                f"{bundle / MANIFEST}: the references of .{format} are {ascii(held)[:80]}, its weights "
                f"need {', '.join(expected)}; export the bundle again"
            )


def check_companions(manifest: Manifest, source: "Source") -> Check:
    """The check that tokenizer, stop ids, chat template and sampling are the checkpoint's."""
    from export.bundle import tokenizer_info

    equal = (manifest.tokenizer, manifest.sampling) == (tokenizer_info(source), source.generation.sampling)
    name = "tokenizer, stop ids, chat template and sampling are the checkpoint's"
    return Check("bundle", "companions", "equal", name, float(equal), 1.0, equal)


def _replay(bundle: Path, manifest: Manifest) -> list[Check]:
    """Raises VerificationFailed when the bundle's proof does not cover its artifacts."""
    for name in (PLAN, GOLDEN):
        if name not in manifest.files:
            raise VerificationFailed(f"{bundle / name}: is not among the bundle's files; export the bundle again")
    proof, references = _read_plan(bundle, manifest), load_golden(bundle / GOLDEN)
    checks = []
    for format, artifact in manifest.artifacts.items():
        judged = proof.artifacts.get(format, {})
        if judged.keys() != set(artifact.references):
            raise VerificationFailed(f"{bundle / PLAN}: has no proof of .{format}; export the bundle again")
        ways = []
        for name, one in judged.items():
            reference = references.get(one.key)
            if reference is None or not _covers(manifest, proof.plan, one.tolerances, reference):
                raise VerificationFailed(f"{bundle / PLAN}: has no proof of .{format}; export the bundle again")
            # The plan's limits are for any reader. Ours must hold too, so that a forged plan cannot loosen them.
            own = tolerances(proof.plan, reference, name)
            if not all(walk_id(walk) in own for walk in proof.plan.walks):
                raise VerificationFailed(f"{bundle / GOLDEN}: has no logits for every walk; export the bundle again")
            ways.append((reference, stricter(own, one.tolerances)))
        checks += check_walks(bundle, format, proof.plan, ways)
    return checks


def _covers(manifest: Manifest, plan: Plan, within: Tolerances, reference: ReferenceLogits) -> bool:
    """Do plan, limits and golden vectors belong together and to the model, with a limit for every walk?"""
    vision = manifest.model.vision
    shape = (0, 0, 0, 3) if vision is None else (len(reference.images), vision.image_size, vision.image_size, 3)
    largest = max((int(part.max()) for part in (reference.columns, reference.top_columns) if part.size), default=0)
    return (
        reference.ids.tolist() == list(plan.ids)
        and reference.images.shape == shape
        and largest < manifest.model.vocab_size
        and all(0 <= number < len(reference.images) for number in plan.image_numbers)
        and all(within.get(walk_id(walk)) for walk in plan.walks)
        and RESET in within
    )


def _read_plan(bundle: Path, manifest: Manifest) -> ProofPlan:
    """Raises VerificationFailed when the plan is damaged, or cannot be fed to the bundle's model."""
    proof = load_plan(bundle / PLAN)
    plan, vision = proof.plan, manifest.model.vision
    places = plan.image_places
    sound = (
        bool(plan.walks)
        and 0 < len(plan.ids) <= manifest.context
        and all(0 <= token < manifest.model.vocab_size for token in plan.ids)
        and all(lengths and min(lengths) > 0 and sum(lengths) == len(plan.ids) for lengths in plan.walks.values())
        and all(0 <= position < len(plan.ids) for position in plan.landmarks.values())
        and all(key.isascii() and key.isprintable() for key in (*plan.walks, *plan.landmarks))
        and len(plan.image_numbers) == len(places)
        and all(0 <= number < IMAGES for number in plan.image_numbers)
        and list(places) == ([] if vision is None else sorted(set(places)))
    )
    # A shorter plan would be a weaker proof.
    if not sound or plan not in (make_plan(manifest), make_plan(manifest, longer=True)):
        raise VerificationFailed(f"{bundle / PLAN}: cannot be fed to this bundle's model; export the bundle again")
    return proof


def targets_of(manifest: Manifest) -> dict[str, Target]:
    return {format: backend_of(format).target for format in manifest.artifacts}


def check_hashes(bundle: Path, manifest: Manifest) -> Check:
    """The check of every file's sha256."""
    changed = changed_files(bundle, manifest.files)
    name = "sha256 of every file" + (f"; changed: {', '.join(changed)}" if changed else "")
    return Check("bundle", "files", "equal", name, 1 - len(changed) / len(manifest.files), 1.0, not changed)


def subjects_of(
    directory: Path,
    manifest: Manifest,
    plan: Plan,
    fresh: "FreshReferences",
    weights: "Mapping[str, QuantizedWeights]",
) -> list[Subject]:
    """Each artifact with its weights and its fresh references."""
    return [
        Subject(
            directory,
            manifest,
            format,
            weights[format],
            plan,
            {name: fresh.golden[key] for name, key in keys.items()},
            fresh.exact[format],
        )
        for format, keys in reference_keys(manifest).items()
    ]


def fresh_checks(subjects: Sequence[Subject]) -> list[Check]:
    """The checks of the walks of each artifact, with the tolerances that follow from its whole fresh references."""
    checks = []
    for one in subjects:
        ways = [(reference, tolerances(one.plan, reference, name)) for name, reference in one.references.items()]
        checks += check_walks(one.directory, one.format, one.plan, ways)
    return checks


def check_walks(
    bundle: Path, format: str, plan: Plan, ways: Sequence[tuple[ReferenceLogits, Tolerances]]
) -> list[Check]:
    """The logits of one graph in ``bundle`` along every walk, against one of its references.

    Kernels of other processors round activations in another way. So if the file does not agree with its first
    reference, the next is tried. If none agrees, the result is that of the first.
    """
    log.info("validating .%s over %d positions", format, len(plan.ids))
    first: list[Check] = []
    for reference, within in ways:
        checks = check_session(open_session(bundle, format), plan, reference, format, within)
        if all(check.passed for check in checks):
            return checks
        first = first or checks
    return first


def extra_checks(subjects: Sequence[Subject], *, drafts: bool) -> list[Check]:
    """The checks that backends add for their files. With ``drafts`` also those that write into the directory."""
    return [
        check
        for one in subjects
        for extra in backend_of(one.format).extra_checks
        if drafts or not extra.draft_only
        for check in extra.run(one)
    ]
