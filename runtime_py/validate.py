"""Is an exported file the model it claims to be? Its logits against its own quantized eager model.

The plan's sequence (runtime_py/plan.py) is fed in several ways, each time after a reset, and the logits after every
piece are compared with the reference's at that position. The soft tokens that the file itself makes of the plan's
images go in, and are compared too; one walk is fed the images as pixels.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from export.manifest import GOLDEN, Check, Manifest, changed_files, read_manifest
from export.onnx_file import VISION_FILE, exact_twin
from gemma3.errors import VerificationFailed
from gemma3.images import network_input
from runtime_py.golden import FULL_VOCABULARY, Difference, Reference, load_golden, relative_rms
from runtime_py.plan import ONE_BY_ONE, Plan, make_plan
from runtime_py.report import table
from runtime_py.session import Image, Logits, Session, SoftTokens, import_runtime, open_session

log = logging.getLogger(__name__)

METRICS = (
    *("equal", "soft_rms", "max_abs", "mean_abs", "relative_rms"),
    *("kl_mean", "kl_median", "kl_max", "kl_worst_position", "float_equal", "top1_agreement", "decibels"),
)
AT_LEAST = ("top1_agreement", "equal")  # metrics whose limit is a minimum


@dataclass(frozen=True)
class Limits:
    """What a file must keep to, and why that much. None: reported, not limited."""

    reason: str  # and kl_max, ten times the mean's limit, keeps a fault at one position from drowning in the mean
    max_abs: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    soft_rms: float | None = None  # of an image's soft tokens: root mean square difference, as a share of theirs


FLOAT_LIMITS = Limits(
    "float32 on both sides: only the order of additions differs", max_abs=1e-4, top1_agreement=1.0, soft_rms=1e-5
)
# By format, for files with integer weights.
INTEGER_LIMITS = {
    "pte": Limits(
        "the reference rounds activations as XNNPACK does; a value within float error of a rounding boundary may "
        "still go the other way, so where that carries further (NOISE), further",
        kl_mean=1e-5,
        kl_max=1e-4,
        soft_rms=1e-2,  # what the rounding itself does to them, in towers of 4 and of 27 layers: 0.5 to 1 %
    ),
    "onnx": Limits(
        "MatMulNBits at accuracy level 4 rounds activations to int8 by block, the reference keeps them float",
        kl_mean=1e-3,
        kl_max=1e-2,
        soft_rms=3e-2,
    ),
}

# Once one int8 activation has gone the other way, later layers and positions see inputs that differ by its step, and
# more go the other way: in a deep model any change, however small, ends in a difference of the same size. How large
# is measured on the reference itself, which is nudged by one unit in the last place (``Reference.noise_kl``). Two
# such runs of one model differ by that much, so a file may, with factors for the spread of a mean over a few
# positions and of a maximum (demo checkpoint: the nudged reference 1.2e-4 and 8e-4, the .pte 1.8e-4 and 1.3e-3).
NOISE, PEAK_NOISE = 2.0, 4.0


def with_noise_limits(limits: Limits, reference: Reference, positions: int) -> Limits:
    """``limits`` for the figures of so many positions, raised to what the reference's own noise explains.

    The noise has a long tail: of any few positions one may be at its peak (QAT's demo checkpoint: 2.0e-3 at one of the
    9 of a whole prompt, whose mean is 4.6e-4; 2.1e-4 over all).
    """
    if limits.kl_mean is None or limits.kl_max is None:
        return limits
    mean, peak = float(reference.noise_kl.mean()), float(reference.noise_kl.max())
    highest = PEAK_NOISE * peak
    average = NOISE * mean + highest / max(1, positions)
    raised = replace(limits, kl_mean=max(limits.kl_mean, average), kl_max=max(limits.kl_max, highest))
    if limits.soft_rms is None or not len(reference.soft_noise):
        return raised
    return replace(raised, soft_rms=max(limits.soft_rms, PEAK_NOISE * float(reference.soft_noise.max())))


def limits_for(manifest: Manifest, format: str) -> Limits:
    exact = all(verdict.startswith("float32") for verdict in manifest.weights.values())
    return FLOAT_LIMITS if exact else INTEGER_LIMITS[format]


def check_bundle(bundle: Path, references: Mapping[str, Reference] | None = None) -> list[Check]:
    """Every check of ``bundle``: its files' hashes, and each graph's logits.

    ``references`` by activations (``Artifact.reference_activations``), as ``fresh_references`` computes them from
    the checkpoint; without them the bundle's golden vectors are replayed. Raises what ``read_manifest`` raises;
    a comparison that fails is a Check that did not pass.
    """
    manifest = read_manifest(bundle)
    hashes = check_hashes(bundle, manifest)
    if not hashes.passed:
        return [hashes]  # what a damaged file computes means nothing, and its reader may not survive it
    return [hashes, *check_logits(bundle, manifest, references or load_golden(bundle / GOLDEN))]


def check_hashes(bundle: Path, manifest: Manifest) -> Check:
    changed = changed_files(bundle, manifest.files)
    name = "sha256 of every file" + (f"; changed: {', '.join(changed)}" if changed else "")
    return Check("bundle", name, "equal", 1 - len(changed) / len(manifest.files), 1.0, not changed)


def check_logits(bundle: Path, manifest: Manifest, references: Mapping[str, Reference]) -> list[Check]:
    """The logits of every graph in ``bundle``. Raises VerificationFailed when its reference is not there."""
    plan = make_plan(manifest)
    checks = []
    for format, artifact in manifest.artifacts.items():
        reference = references.get(artifact.reference_activations)
        if reference is None or not is_of(plan, reference):
            raise VerificationFailed(f"{bundle / GOLDEN}: no vectors for .{format} as it is now; export it again")
        log.info("validating .%s over %d positions", format, len(plan.ids))
        session = open_session(bundle, format)
        checks += check_session(session, plan, reference, format, limits_for(manifest, format))
    return checks


def is_of(plan: Plan, reference: Reference) -> bool:
    return np.array_equal(reference.ids, plan.ids) and np.array_equal(reference.images, plan.images)


def check_exact_encoder(bundle: Path, manifest: Manifest, references: Mapping[str, Reference]) -> list[Check]:
    """The .onnx's image encoder with its integers multiplied in float32, as ``check_exact_twin`` does with the rest.

    For any size: in float32 the largest takes 1.7 GB. Writes into ``bundle`` for a moment too.
    """
    artifact = manifest.artifacts.get("onnx")
    if artifact is None or manifest.model.vision is None or limits_for(manifest, "onnx") is FLOAT_LIMITS:
        return []
    from runtime_py.onnx_session import open_encoder

    reference = references[artifact.reference_activations]
    log.info("validating .onnx's image encoder multiplied in float32")
    with exact_twin(bundle / VISION_FILE) as twin:
        encoder = open_encoder(twin, None)
        inputs = [{"pixels": network_input(image)} for image in reference.images]
        soft_tokens = [encoder.run(["soft_tokens"], pixels)[0][0] for pixels in inputs]
    return soft_token_checks("onnx", reference, soft_tokens, FLOAT_LIMITS, ", multiplied in float32")


def check_exact_twin(bundle: Path, manifest: Manifest, references: Mapping[str, Reference]) -> list[Check]:
    """The .onnx with its integers multiplied in float32, one walk: the rounding of activations is the only thing
    that keeps the file itself from float32's limits.

    Only up to FULL_VOCABULARY: ONNX Runtime then holds the head's table in float32, which for 262 144 rows takes
    more memory than the export. Writes into ``bundle`` for a moment, so it is for a bundle that is being made.
    """
    artifact = manifest.artifacts.get("onnx")
    small = manifest.model.vocab_size <= FULL_VOCABULARY
    if artifact is None or not small or limits_for(manifest, "onnx") is FLOAT_LIMITS:
        return []
    plan = make_plan(manifest)
    first = next(iter(plan.walks))
    plan = replace(plan, walks={f"{first}, multiplied in float32": plan.walks[first]})
    log.info("validating .onnx multiplied in float32")
    with exact_twin(bundle / artifact.file) as twin:
        session = import_runtime("onnx")(twin, artifact.cache, manifest.model, None)
        reference = references[artifact.reference_activations]
        return check_session(session, plan, reference, "onnx", FLOAT_LIMITS, list(reference.soft_tokens))


def check_session(
    session: Session,
    plan: Plan,
    reference: Reference,
    artifact: str,
    limits: Limits,
    given: Sequence[SoftTokens] | None = None,
) -> list[Check]:
    """Walk a new ``session`` through ``plan``; the first walk comes again at the end, after a reset.

    ``given`` soft tokens of the plan's images are fed instead of its own, and these are not looked at.
    """
    checks = noise_checks(artifact, reference)
    soft_tokens = given
    if soft_tokens is None:
        soft_tokens = [session.encode_image(image) for image in plan.images]
        checks += soft_token_checks(
            artifact, reference, soft_tokens, with_noise_limits(limits, reference, len(soft_tokens))
        )
    first = next(iter(plan.walks))

    def shown(name: str) -> list[Image]:
        return plan.shown_images(soft_tokens, as_pixels=name == first and given is None)

    fresh: dict[int, Logits] = {}
    for name, pieces in plan.walks.items():
        differences = []
        for position, logits in walk(session, plan, pieces, shown(name)):
            if name == first:
                fresh[position] = logits.copy()
            difference = reference.compare(position, logits)
            if difference is not None:
                differences.append(difference)
        within = with_noise_limits(limits, reference, len(differences))
        checks += summarize(artifact, name, differences, within)
        if name == ONE_BY_ONE:
            checks += at_landmarks(artifact, plan, differences, within)
    again = walk(session, plan, plan.walks[first], shown(first))
    change = max(float(np.abs(logits - fresh[position]).max()) for position, logits in again)
    return [*checks, Check(artifact, f"{first} again after a reset", "max_abs", change, 0.0, change == 0.0)]


def soft_token_checks(
    artifact: str, reference: Reference, soft_tokens: Sequence[SoftTokens], limits: Limits, how: str = ""
) -> list[Check]:
    """Of the plan's images one by one."""
    return [
        limited(artifact, f"soft tokens of image {index + 1}{how}", "soft_rms", relative_rms(seen, expected), limits)
        for index, (seen, expected) in enumerate(zip(soft_tokens, reference.soft_tokens, strict=True))
    ]


def noise_checks(artifact: str, reference: Reference) -> list[Check]:
    """The reference against itself nudged, for information."""
    if not reference.noise_kl.any():
        return []
    name = "the reference against itself, nudged by one unit in the last place"
    figures = {"kl_mean": float(reference.noise_kl.mean()), "kl_max": float(reference.noise_kl.max())}
    if len(reference.soft_noise):
        figures["soft_rms"] = float(reference.soft_noise.max())
    return [Check(artifact, name, metric, value, None, True) for metric, value in figures.items()]


def walk(session: Session, plan: Plan, pieces: Iterable[int], images: Sequence[Image]) -> Iterator[tuple[int, Logits]]:
    """Feed the plan's ids from position 0 in ``pieces``, ``images`` at its places: (position, logits) of the last id
    of each piece.
    """
    if session.position:
        session.reset()
    end = 0
    for size in pieces:
        start, end = end, end + size
        yield end - 1, session.prefill(plan.ids[start:end], images[plan.places_in(start, end)])


def summarize(artifact: str, name: str, differences: Sequence[Difference], limits: Limits) -> list[Check]:
    """The figures over all compared positions of one walk."""
    if not differences:
        return []
    count = sum(difference.count for difference in differences)
    squares = sum(difference.sum_squares for difference in differences)
    worst = max(differences, key=lambda difference: difference.kl)
    name = f"{name} ({len(differences)} positions)"
    figures = {
        "max_abs": max(difference.max_abs for difference in differences),
        "mean_abs": sum(difference.sum_abs for difference in differences) / count,
        "relative_rms": math.sqrt(squares / sum(difference.reference_squares for difference in differences)),
        "kl_mean": sum(difference.kl for difference in differences) / len(differences),
        "kl_max": worst.kl,
        "kl_worst_position": float(worst.position),
        "top1_agreement": sum(difference.same_top for difference in differences) / len(differences),
    }
    return [limited(artifact, name, metric, value, limits) for metric, value in figures.items()]


def at_landmarks(artifact: str, plan: Plan, differences: Sequence[Difference], limits: Limits) -> list[Check]:
    """Each landmark's own figures: a fault at one position must not drown in a mean."""
    by_position = {difference.position: difference for difference in differences}
    return [
        limited(artifact, f"{ONE_BY_ONE}, at {name} ({position})", metric, value, limits)
        for name, position in plan.landmarks.items()
        if (difference := by_position.get(position))
        for metric, value in (("max_abs", difference.max_abs), ("kl_max", difference.kl))
    ]


def limited(artifact: str, name: str, metric: str, value: float, limits: Limits) -> Check:
    limit: float | None = getattr(limits, metric, None)
    if limit is None:
        return Check(artifact, name, metric, value, None, True)
    passed = value >= limit if metric in AT_LEAST else value <= limit
    return Check(artifact, name, metric, value, limit, passed)  # NaN compares false: it does not pass


def stepped_figures(checks: Sequence[Check], artifact: str) -> dict[str, float]:
    """By metric, what the walk over single positions showed of ``artifact``."""
    walk_name = f"{ONE_BY_ONE} ("
    return {one.metric: one.value for one in checks if one.artifact == artifact and one.name.startswith(walk_name)}


def validation_table(checks: Sequence[Check]) -> str:
    """One row a check, its figures side by side; a figure over its limit is marked. Below, the limits."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    limits: dict[str, set[str]] = {}
    for check in checks:
        shown = f"{check.value:.3g}" + ("" if check.passed else " FAILED")
        rows.setdefault((check.artifact, check.name), {})[check.metric] = shown
        if check.limit is not None:
            sign = "≥" if check.metric in AT_LEAST else "≤"
            limits.setdefault(check.artifact, set()).add(f"{check.metric} {sign} {check.limit:.3g}")
    metrics = sorted({check.metric for check in checks}, key=METRICS.index)
    figures = table(
        ("artifact", "check", *metrics),
        [(*key, *(values.get(metric, "") for metric in metrics)) for key, values in rows.items()],
        left=2,
    )
    notes = [f"{artifact} must keep {', '.join(sorted(kept))}" for artifact, kept in limits.items()]
    return "\n".join((figures, "", *notes))
