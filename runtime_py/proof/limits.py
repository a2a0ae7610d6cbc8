"""How far a file may be from its reference, and why: limits for a kind of file, and the tolerances of every check."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from export.checks import Check
from export.manifest import Manifest
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.plan import ONE_BY_ONE, Plan, ends

AT_LEAST = ("top1_agreement", "equal")  # metrics whose limit is a minimum
RESET = "reset"
# Check id → metric → limit. A metric that is missing is reported, but has no limit.
Tolerances = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Limits:
    """What a file must keep to, and the reason. None: reported, but without a limit.

    ``kl_max``, ten times the limit of the mean, finds a fault at one position that the mean would hide. ``soft_rms``
    is the root mean square difference of an image's soft tokens, as a share of theirs.
    """

    reason: str
    max_abs: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    soft_rms: float | None = None


FLOAT_LIMITS = Limits(
    "float32 on both sides: only the order of additions differs", max_abs=1e-4, top1_agreement=1.0, soft_rms=1e-5
)

# Once one int8 activation is rounded the other way, later layers and positions get inputs that differ by a whole step,
# and more values are rounded the other way. So in a deep model any change, however small, ends in a difference of about
# the same size. To measure this size, the reference is run again with its inputs changed by one unit in the last place
# (``ReferenceLogits.noise_kl``). A file may differ by as much, times a factor for the spread of a mean over a few
# positions, and another for that of a maximum. (Mean and maximum on the demo checkpoint: 1.2e-4 and 8e-4 for the
# changed reference, 1.8e-4 and 1.3e-3 for the .pte.)
NOISE, PEAK_NOISE = 2.0, 4.0


def with_noise_limits(limits: Limits, reference: ReferenceLogits, positions: int) -> Limits:
    """``limits`` for figures over this number of ``positions``, raised to what the reference's own noise explains.

    The noise has a long tail, so one of a few positions may be at its peak. (On QAT's demo checkpoint it is 2.0e-3 at
    one of the 9 positions of the whole prompt, and 4.6e-4 on average over the 9, but 2.1e-4 over all positions.)
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


def limits_for(manifest: Manifest, quantized_limits: Limits) -> Limits:
    """The limits of a bundle's files: ``quantized_limits`` unless every weight is kept in float32."""
    exact = all(verdict.scheme == "float32" for verdict in manifest.weights.values())
    return FLOAT_LIMITS if exact else quantized_limits


def tolerances(plan: Plan, reference: ReferenceLogits, limits: Limits) -> dict[str, dict[str, float]]:
    """Check id → metric → limit, of all checks that replay ``plan`` and compare at the positions of ``reference``."""
    found: dict[str, dict[str, float]] = {}
    for number in range(len(reference.soft_tokens)):
        found[soft_tokens_id(number)] = _given(with_noise_limits(limits, reference, 1), "soft_rms")
    known = set(reference.positions.tolist())
    for walk, lengths in plan.walks.items():
        compared = known.intersection(ends(lengths))
        if not compared:
            continue
        within = with_noise_limits(limits, reference, len(compared))
        found[walk_id(walk)] = _given(within, "max_abs", "kl_mean", "kl_max", "top1_agreement")
        if walk == ONE_BY_ONE:
            for landmark, position in plan.landmarks.items():
                if position in compared:
                    found[landmark_id(landmark)] = _given(within, "max_abs", "kl_max")
    found[RESET] = {"max_abs": 0.0}
    return found


def stricter(one: Tolerances, other: Tolerances) -> dict[str, dict[str, float]]:
    """For every check and metric that has a limit in either, the stricter of the two."""
    found = {id: dict(limits) for id, limits in one.items()}
    for id, limits in other.items():
        mine = found.setdefault(id, {})
        for metric, limit in limits.items():
            strictest = max if metric in AT_LEAST else min
            mine[metric] = strictest(mine.get(metric, limit), limit)
    return found


def _given(limits: Limits, *metrics: str) -> dict[str, float]:
    values = {metric: getattr(limits, metric) for metric in metrics}
    return {metric: value for metric, value in values.items() if value is not None}


def walk_id(walk: str) -> str:
    return f"walk/{walk}"


def landmark_id(landmark: str) -> str:
    return f"landmark/{landmark}"


def soft_tokens_id(number: int) -> str:
    return f"soft-tokens/image-{number + 1}"


def judged(artifact: str, id: str, name: str, metric: str, value: float, limit: float | None) -> Check:
    """The check of one figure. Without a limit it passes; NaN does not keep to any limit."""
    if limit is None:
        return Check(artifact, id, metric, name, value, None, True)
    passed = value >= limit if metric in AT_LEAST else value <= limit
    return Check(artifact, id, metric, name, value, limit, passed)
