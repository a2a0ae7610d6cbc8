"""Compares a session with its reference, along every walk of a plan.

The plan's sequence is fed in several ways, each after a reset, and the logits after every call are compared with the
reference's at that position. The soft tokens that the file computes from the images are compared too, and then fed. In
the first walk, an image's first occurrence is fed as pixels.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np

from export.checks import Check
from gemma3.host.progress import Progress
from runtime_py.proof.golden import Difference, ReferenceLogits, relative_rms
from runtime_py.proof.limits import RESET, Tolerances, judged, landmark_id, soft_tokens_id, walk_id
from runtime_py.proof.plan import MEASURED, ONE_BY_ONE, Plan, beginning
from runtime_py.sessions.protocol import Image, Logits, Session, SoftTokens


def check_session(
    session: Session,
    plan: Plan,
    reference: ReferenceLogits,
    artifact: str,
    tolerances: Tolerances,
    given: Sequence[SoftTokens] | None = None,
    prefix: str = "",
    suffix: str = "",
) -> list[Check]:
    """Feed every walk of ``plan`` to a new ``session``, then the first one's beginning again, with equal logits.

    If soft tokens of the plan's images are ``given``, they are fed instead of the session's own, which are then not
    compared. The id of every check begins with ``prefix``, and its name ends with ``suffix``. The ids in ``tolerances``
    have no prefix.
    """
    judge = Judge(artifact, tolerances, prefix, suffix)
    checks = [*noise_checks(judge, reference), *cost_checks(judge, reference)]
    soft_tokens = given
    if soft_tokens is None:
        soft_tokens = [session.encode_image(image) for image in reference.images]
        checks += soft_token_checks(judge, reference, soft_tokens)
    first = next(iter(plan.walks))

    def to_feed(walk: str) -> list[Image]:
        return plan.images_to_feed(soft_tokens, list(reference.images) if walk == first and given is None else ())

    fresh: dict[int, Logits] = {}
    fed = 0
    again = beginning(plan.walks[first], MEASURED)
    with closing(Progress(len(plan.ids) * len(plan.walks) + sum(again))) as progress:
        for walk, lengths in plan.walks.items():
            differences = []
            for position, logits in follow(session, plan, lengths, to_feed(walk)):
                if walk == first:
                    fresh[position] = logits.copy()
                difference = reference.compare(position, logits)
                if difference is not None:
                    differences.append(difference)
                progress.show(fed + position, f"positions of .{artifact}")
            fed += len(plan.ids)
            checks += summarize(judge, walk, differences)
            if walk == ONE_BY_ONE:
                checks += at_landmarks(judge, plan, differences)
        changes = []
        for position, logits in follow(session, plan, again, to_feed(first)):
            changes.append(float(np.abs(logits - fresh[position]).max()))
            progress.show(fed + position, f"positions of .{artifact}")
    change = _largest(changes)
    return [*checks, judge.check(RESET, f"{title(first)} again after a reset", "max_abs", change)]


ACTIVATIONS = "activations"
TOO_MUCH = 0.01  # nats: about what rounding the demo's weights to int4 costs (docs/benchmarks.md)


class Judge:
    """Makes the checks of one artifact. ``tolerances`` has their limits, by ids without ``prefix``."""

    def __init__(self, artifact: str, tolerances: Tolerances, prefix: str = "", suffix: str = "") -> None:
        self._artifact, self._tolerances, self._prefix, self._suffix = artifact, tolerances, prefix, suffix

    def check(self, id: str, name: str, metric: str, value: float) -> Check:
        limit = self._tolerances.get(id, {}).get(metric)
        return judged(self._artifact, self._prefix + id, name + self._suffix, metric, value, limit)

    def checks(self, id: str, name: str, figures: Mapping[str, float]) -> list[Check]:
        return [self.check(id, name, metric, value) for metric, value in figures.items()]


def title(walk: str) -> str:
    """A walk's id in words."""
    return walk.replace("-", " ")


def soft_token_checks(judge: Judge, reference: ReferenceLogits, soft_tokens: Sequence[SoftTokens]) -> list[Check]:
    """The checks of the soft tokens [T, E] of each golden image."""
    return [
        judge.check(soft_tokens_id(number), f"soft tokens of image {number + 1}", "soft_rms", relative_rms(*pair))
        for number, pair in enumerate(zip(soft_tokens, reference.soft_tokens, strict=True))
    ]


def noise_checks(judge: Judge, reference: ReferenceLogits) -> list[Check]:
    """The reference against itself after a change of its inputs (see ``references``). The figures have no limits."""
    if not reference.noise_kl.any():
        return []
    figures = {"kl_mean": float(reference.noise_kl.mean()), "kl_max": float(reference.noise_kl.max())}
    if len(reference.soft_noise):
        figures["soft_rms"] = float(reference.soft_noise.max())
    name = "the reference against itself, inputs changed by one unit in the last place"
    return judge.checks("noise", name, figures)


def cost_checks(judge: Judge, reference: ReferenceLogits) -> list[Check]:
    """What rounding costs: the reference against itself without it. The figures have no limits.

    It is the rounding of activations, or of the ``float`` reference of a file with int8 caches, of keys and values.
    """
    if not reference.cost_kl.any():
        return []
    figures = {"kl_mean": float(reference.cost_kl.mean()), "kl_max": float(reference.cost_kl.max())}
    if len(reference.soft_cost):
        figures["soft_rms"] = float(reference.soft_cost.max())
    return judge.checks(ACTIVATIONS, "what rounding costs: the reference against itself without it", figures)


def advice_on_rounding(checks: Sequence[Check], keep_float: Collection[str] = ()) -> list[str]:
    """A line for each artifact in whose ``checks`` rounding costs more than TOO_MUCH.

    Those of ``keep_float`` round no activations, so it is the rounding of keys and values.
    """
    activations = (
        "rounding activations to int8 costs a KL divergence of {:.2g} nats on average; "
        "in a .onnx --activations float avoids it (slower); qat --activations int8 trains the weights for it"
    )
    cache = (
        "an int8 KV cache costs a KL divergence of {:.2g} nats on average; --kv float32 avoids it, "
        "and --kv-data with text like yours may lower it"
    )
    return [
        f".{check.artifact}: " + (cache if check.artifact in keep_float else activations).format(check.value)
        for check in checks
        if (check.id, check.metric) == (ACTIVATIONS, "kl_mean") and check.value > TOO_MUCH
    ]


def follow(
    session: Session, plan: Plan, lengths: Iterable[int], images: Sequence[Image]
) -> Iterator[tuple[int, Logits]]:
    """Feed the plan's ids from position 0 in calls of ``lengths``, with ``images`` at their places.

    Yields (position, logits [V]) of the last id of each call.
    """
    if session.position:
        session.reset()
    end = 0
    for length in lengths:
        start, end = end, end + length
        yield end - 1, session.prefill(plan.ids[start:end], images[plan.images_between(start, end)])


def summarize(judge: Judge, walk: str, differences: Sequence[Difference]) -> list[Check]:
    """The checks of the figures over all compared positions of one walk."""
    if not differences:
        return []
    count = sum(difference.count for difference in differences)
    squares = sum(difference.sum_squares for difference in differences)
    worst = max(differences, key=lambda difference: difference.kl)
    figures = {
        "max_abs": _largest([difference.max_abs for difference in differences]),
        "mean_abs": sum(difference.sum_abs for difference in differences) / count,
        "relative_rms": math.sqrt(squares / sum(difference.reference_squares for difference in differences)),
        "kl_mean": sum(difference.kl for difference in differences) / len(differences),
        "kl_max": _largest([difference.kl for difference in differences]),
        "kl_worst_position": float(worst.position),
        "top1_agreement": sum(difference.same_top for difference in differences) / len(differences),
    }
    return judge.checks(walk_id(walk), f"{title(walk)} ({len(differences)} positions)", figures)


def at_landmarks(judge: Judge, plan: Plan, differences: Sequence[Difference]) -> list[Check]:
    """The checks of the figures at each landmark, because a mean can hide a fault at one position."""
    by_position = {difference.position: difference for difference in differences}
    return [
        check
        for landmark, position in plan.landmarks.items()
        if (difference := by_position.get(position))
        for check in judge.checks(
            landmark_id(landmark),
            f"{title(ONE_BY_ONE)}, at {landmark} ({position})",
            {"max_abs": difference.max_abs, "kl_max": difference.kl},
        )
    ]


def _largest(values: Sequence[float]) -> float:
    """The largest of ``values``, or NaN if one of them is NaN, which the built-in ``max`` may pass over."""
    return float(np.max(values))


def figures_of(checks: Sequence[Check], artifact: str, id: str) -> dict[str, float]:
    """The figures of the check ``id`` of ``artifact``, by metric."""
    return {check.metric: check.value for check in checks if (check.artifact, check.id) == (artifact, id)}
