"""Is an exported file the model it claims to be? Its logits against its own quantized eager model.

One token sequence is fed in several ways ("walks"), each time after a reset, and the logits after every piece
are compared with the reference's at that position. The sequence crosses the sliding window W (W − 1, W, W + 1,
2W) and several wraps of the bounded caches.
"""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from export.manifest import GOLDEN, Check, Manifest, changed_files, read_manifest
from export.onnx_file import exact_twin
from gemma3.cache import CacheLayout
from gemma3.config import SLIDING
from gemma3.errors import VerificationFailed
from runtime_py.golden import FULL_VOCABULARY, Difference, Reference, load_golden
from runtime_py.report import table
from runtime_py.session import Logits, Session, import_runtime, open_session

log = logging.getLogger(__name__)

# How far the sequence goes: this many windows past the first wrap of the larger bounded cache, and over this many
# turns of it; never over the context.
WINDOWS_PAST_THE_WRAP = 4
TURNS = 3
# Up to here every position is stepped over one by one; a longer sequence is fed in chunks up to NEAR positions
# before a landmark and stepped over it.
STEP_EVERYTHING = 1024
NEAR = 16
# Golden vectors keep the positions this near to a landmark.
GOLDEN_NEAR = 1
SEED = 20_250_312

ONE_BY_ONE = "one by one"
METRICS = (
    *("equal", "max_abs", "mean_abs", "relative_rms"),
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


FLOAT_LIMITS = Limits("float32 on both sides: only the order of additions differs", max_abs=1e-4, top1_agreement=1.0)
# By format, for files with integer weights.
INTEGER_LIMITS = {
    "pte": Limits(
        "the reference rounds activations as XNNPACK does; a value within float error of a rounding boundary may "
        "still go the other way, so where that carries further (NOISE), further",
        kl_mean=1e-5,
        kl_max=1e-4,
    ),
    "onnx": Limits(
        "MatMulNBits at accuracy level 4 rounds activations to int8 by block, the reference keeps them float",
        kl_mean=1e-3,
        kl_max=1e-2,
    ),
}

# Once one int8 activation has gone the other way, later layers and positions see inputs that differ by its step, and
# more go the other way: in a deep model any change, however small, ends in a difference of the same size. How large
# is measured on the reference itself, which is nudged by one unit in the last place (``Reference.noise_kl``). Two
# such runs of one model differ by that much, so a file may, with factors for the spread of a mean over a few
# positions and of a maximum (demo checkpoint: the nudged reference 1.2e-4 and 8e-4, the .pte 1.8e-4 and 1.3e-3).
NOISE, PEAK_NOISE = 2.0, 4.0


def with_noise_limits(limits: Limits, reference: Reference) -> Limits:
    """``limits``, raised to what the reference's own noise explains."""
    if limits.kl_mean is None or limits.kl_max is None:
        return limits
    mean, peak = float(reference.noise_kl.mean()), float(reference.noise_kl.max())
    return replace(limits, kl_mean=max(limits.kl_mean, NOISE * mean), kl_max=max(limits.kl_max, PEAK_NOISE * peak))


def limits_for(manifest: Manifest, format: str) -> Limits:
    exact = all(verdict.startswith("float32") for verdict in manifest.weights.values())
    return FLOAT_LIMITS if exact else INTEGER_LIMITS[format]


@dataclass(frozen=True)
class Plan:
    """What is fed and where it is looked at."""

    ids: tuple[int, ...]
    landmarks: dict[str, int]  # name → position
    walks: dict[str, tuple[int, ...]]  # name → lengths of the pieces, in order

    @property
    def positions(self) -> list[int]:
        """Every position whose logits some walk shows: the last of each piece."""
        return sorted({end for pieces in self.walks.values() for end in _ends(pieces)})

    @property
    def golden_positions(self) -> list[int]:
        """Around the landmarks, and whatever the walks in larger pieces show."""
        pieces = {end for name, walk in self.walks.items() if name != ONE_BY_ONE for end in _ends(walk)}
        return sorted(pieces.union(near(self.landmarks.values(), GOLDEN_NEAR, len(self.ids))))


def make_plan(manifest: Manifest) -> Plan:
    """The plan for a bundle depends on its configuration, cache layouts, context and chunk alone."""
    layouts = [artifact.cache for artifact in manifest.artifacts.values()]
    window, chunk = manifest.model.sliding_window, manifest.chunk
    wraps = sorted({local_slots(layout) for layout in layouts})
    past_the_wrap = wraps[-1] + WINDOWS_PAST_THE_WRAP * window
    length = min(manifest.context, max(past_the_wrap, TURNS * wraps[-1] + NEAR))
    landmarks = {"first": 0, "chunk end": chunk - 1, "W−1": window - 1, "W": window, "W+1": window + 1}
    landmarks |= {f"{count}W": count * window for count in range(2, WINDOWS_PAST_THE_WRAP + 1)}
    for slots in wraps:
        landmarks |= {f"wrap {turn} of {slots} slots": turn * slots for turn in range(1, TURNS + 1)}
    landmarks["last"] = length - 1
    landmarks = {name: position for name, position in landmarks.items() if position < length}
    stepped = range(length) if length <= STEP_EVERYTHING else near(landmarks.values(), NEAR, length)
    odd = itertools.cycle((1, 2, 3, 5, 7, 11, 13, 1, chunk, max(1, chunk - 1), chunk + 1, 2 * chunk + 3))
    tail = min(8, length - 1)
    return Plan(
        ids=tuple(probe_ids(manifest, length)),
        landmarks=landmarks,
        walks={
            "odd sizes": _fill(odd, length),
            ONE_BY_ONE: _pieces_ending_at(stepped, length),
            "chunks": _fill(itertools.repeat(chunk), length),
            "whole prompt": (length - tail, *[1] * tail),
        },
    )


def local_slots(layout: CacheLayout) -> int:
    """Slots of the sliding layers' cache (the context where there are none)."""
    return min((layer.slots for layer in layout.layers if layer.kind == SLIDING), default=layout.context)


def probe_ids(manifest: Manifest, length: int) -> list[int]:
    """BOS, then ids drawn evenly from the whole vocabulary: every row of the table may come up.

    Text hides faults. On the demo checkpoint a window off by one costs a mean KL divergence of 2.8e-3 over these ids
    and 2.7e-4 over held-out text, which is within the noise of int8 activations.
    """
    random = np.random.default_rng(SEED)
    return [manifest.tokenizer.bos_id, *random.integers(manifest.model.vocab_size, size=length - 1).tolist()]


def _ends(pieces: Iterable[int]) -> list[int]:
    return [end - 1 for end in itertools.accumulate(pieces)]


def near(landmarks: Iterable[int], distance: int, length: int) -> list[int]:
    around = {mark + offset for mark in landmarks for offset in range(-distance, distance + 1)}
    return sorted(position for position in around if 0 <= position < length)


def _pieces_ending_at(positions: Iterable[int], length: int) -> tuple[int, ...]:
    ends = [0, *(position + 1 for position in positions)]
    if ends[-1] != length:
        ends.append(length)
    return tuple(after - before for before, after in itertools.pairwise(ends))


def _fill(sizes: Iterable[int], length: int) -> tuple[int, ...]:
    pieces: list[int] = []
    for size in sizes:
        pieces.append(min(size, length - sum(pieces)))
        if sum(pieces) == length:
            break
    return tuple(pieces)


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
        if reference is None or not np.array_equal(reference.ids, plan.ids):
            raise VerificationFailed(f"{bundle / GOLDEN}: no vectors for .{format} as it is now; export it again")
        log.info("validating .%s over %d positions", format, len(plan.ids))
        session = open_session(bundle, format)
        checks += check_session(session, plan, reference, format, limits_for(manifest, format))
    return checks


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
        return check_session(session, plan, references[artifact.reference_activations], "onnx", FLOAT_LIMITS)


def check_session(session: Session, plan: Plan, reference: Reference, artifact: str, limits: Limits) -> list[Check]:
    """Walk a new ``session`` through ``plan``; the first walk comes again at the end, after a reset."""
    limits = with_noise_limits(limits, reference)
    checks = noise_checks(artifact, reference)
    first = next(iter(plan.walks))
    fresh: dict[int, Logits] = {}
    for name, pieces in plan.walks.items():
        differences = []
        for position, logits in walk(session, plan.ids, pieces):
            if name == first:
                fresh[position] = logits.copy()
            difference = reference.compare(position, logits)
            if difference is not None:
                differences.append(difference)
        checks += summarize(artifact, name, differences, limits)
        if name == ONE_BY_ONE:
            checks += at_landmarks(artifact, plan, differences, limits)
    again = walk(session, plan.ids, plan.walks[first])
    change = max(float(np.abs(logits - fresh[position]).max()) for position, logits in again)
    return [*checks, Check(artifact, f"{first} again after a reset", "max_abs", change, 0.0, change == 0.0)]


def noise_checks(artifact: str, reference: Reference) -> list[Check]:
    """The reference against itself nudged, for information."""
    if not reference.noise_kl.any():
        return []
    name = "the reference against itself, nudged by one unit in the last place"
    figures = {"kl_mean": float(reference.noise_kl.mean()), "kl_max": float(reference.noise_kl.max())}
    return [Check(artifact, name, metric, value, None, True) for metric, value in figures.items()]


def walk(session: Session, ids: Sequence[int], pieces: Iterable[int]) -> Iterator[tuple[int, Logits]]:
    """Feed ``ids`` from position 0 in ``pieces``: (position, logits) of the last id of each."""
    if session.position:
        session.reset()
    end = 0
    for size in pieces:
        logits = session.prefill(ids[end : end + size])
        end += size
        yield end - 1, logits


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
