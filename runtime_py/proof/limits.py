"""How far a file may be from its reference, and why. Every limit follows from what was measured on the reference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checks import Check
from export.target import FLOAT
from runtime_py.proof.golden import ReferenceLogits
from runtime_py.proof.plan import ONE_BY_ONE, Plan, ends

AT_LEAST = ("top1_agreement", "float_equal", "equal")  # metrics whose limit is a minimum
RESET = "reset"
# Check id → metric → limit. A metric that is missing is reported, but has no limit.
Tolerances = Mapping[str, Mapping[str, float]]


# Float activations. File and reference add in different orders. The reference's float error (references.py) shows how
# much that matters in this model. (Measured on 6 to 48 layers of 128 to 3840 channels, with small and with
# trained-looking norms, and with logits of deviation 1 to 8: a file's largest difference was 0.8 to 2.1 times the float
# error.) Where it happens to be tiny, a few units in the last place of the largest logit are allowed.
FLOAT_ERROR = 4.0
UNITS_IN_THE_LAST_PLACE = 16.0

# Rounded activations. Once one int8 activation is rounded the other way, later layers and positions get inputs that
# differ by a whole step, and more values are rounded the other way. So in a deep model any change, however small, ends
# in a difference of about the same size. To measure this size, the reference is run again with its inputs changed by
# one unit in the last place. A file may differ by as much, times a factor for the spread of a mean over a few
# positions, and another for that of a maximum.
NOISE, PEAK_NOISE = 2.0, 4.0
# In a small model the changes may happen to turn no rounding, and the file's own float error may turn one. What that
# can cost follows from what all roundings cost together (``cost_kl``): if every rounding fell out differently, file and
# reference would be at twice that cost from each other. (Measured: up to half.) So the cost also bounds what noise may
# excuse: one draw of it may have an unusual peak.
COST, MOST_COST = 0.5, 4.0
# Whatever the scale of the logits, a KL divergence below these, in nats, changes no prediction.
KL_MEAN, KL_MAX = 1e-5, 1e-4


@dataclass(frozen=True)
class Limits:
    """What a file must keep to, and the reason. None: reported, but without a limit.

    ``kl_max`` finds a fault at one position that the mean would hide. ``soft_rms`` is the root mean square difference
    of an image's soft tokens, as a share of theirs.
    """

    reason: str
    max_abs: float | None = None
    top1_agreement: float | None = None
    kl_mean: float | None = None
    kl_max: float | None = None
    soft_rms: float | None = None


def limits_of(reference: ReferenceLogits, name: str, positions: int) -> Limits:
    """The limits of figures over this number of ``positions``, from what was measured on the ``reference`` itself.

    ``name`` is that of the reference: FLOAT, or a rounding. Of a file with an int8 cache FLOAT rounds keys and values.
    """
    floating = name == FLOAT and not reference.cost_kl.any()
    return float_limits(reference) if floating else rounded_limits(reference, positions)


def float_limits(reference: ReferenceLogits) -> Limits:
    """The limits of a file that rounds no activations: its logits differ by the order of additions alone.

    Its most likely token may differ only where two logits are closer than the limit allows to tell apart.
    """
    units = UNITS_IN_THE_LAST_PLACE * float(np.finfo(np.float32).eps)
    largest = max(float(np.abs(part).max()) for part in (reference.values, reference.top_values) if part.size)
    max_abs = max(FLOAT_ERROR * float(reference.float_error.max()), units * largest)
    ties = int((reference.gaps <= 2 * max_abs).sum())
    return Limits(
        "float32 on both sides, only the order of additions differs: "
        f"{FLOAT_ERROR:g} times the reference's float error",
        max_abs=max_abs,
        top1_agreement=1.0 - ties / len(reference.positions),
        soft_rms=max(FLOAT_ERROR * _largest(reference.soft_noise), units) if len(reference.soft_noise) else None,
    )


def rounded_limits(reference: ReferenceLogits, positions: int) -> Limits:
    """The limits of a file that rounds activations as the reference does.

    The noise has a long tail, so one of a few positions may be at its peak. (On a demo checkpoint after QAT it is
    2.0e-3 at one of the 9 positions of the whole prompt, 4.6e-4 on average over the 9, and 2.1e-4 over all positions.)
    """
    noise, cost = reference.noise_kl, reference.cost_kl
    highest = min(PEAK_NOISE * float(noise.max()), MOST_COST * float(cost.max()))
    average = NOISE * float(noise.mean()) + highest / max(1, positions)
    return Limits(
        "the reference rounds activations as the kernels do; a value within float error of a rounding boundary may "
        "still be rounded the other way, and where that carries further, further",
        kl_mean=max(KL_MEAN, min(average, MOST_COST * float(cost.mean())), COST * float(cost.mean())),
        kl_max=max(KL_MAX, highest, COST * float(cost.max())),
        soft_rms=(
            max(PEAK_NOISE * _largest(reference.soft_noise), math.sqrt(COST) * _largest(reference.soft_cost))
            if len(reference.soft_noise)
            else None
        ),
    )


def _largest(values: NDArray[np.float32]) -> float:
    return float(values.max()) if len(values) else 0.0


def tolerances(plan: Plan, reference: ReferenceLogits, name: str) -> dict[str, dict[str, float]]:
    """Check id → metric → limit, of all checks that replay ``plan`` and compare at the positions of ``reference``.

    ``name`` is that of the reference (see ``limits_of``).
    """
    found: dict[str, dict[str, float]] = {}
    for number in range(len(reference.soft_tokens)):
        found[soft_tokens_id(number)] = _given(limits_of(reference, name, 1), "soft_rms")
    known = set(reference.positions.tolist())
    for walk, lengths in plan.walks.items():
        compared = known.intersection(ends(lengths))
        if not compared:
            continue
        within = limits_of(reference.at(compared), name, len(compared))
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
