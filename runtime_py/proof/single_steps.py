"""Compares single steps of a .pte with steps of the reference that begin with a copy of the file's cache.

A file that multiplies in int8 and its reference drift apart once a value is rounded the other way, because the change
stays in the cache and makes more values round the other way. In a single step from the same cache there is no such
history. Unless one of the step's own values lies within float error of a rounding boundary, file and reference agree as
well as in float32. So these figures show whether anything else differs.
"""

import logging
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from export.checks import Check
from export.executorch.target import PTE
from export.target import FLOAT
from gemma3.model import Gemma3, LayerKV
from runtime_py.proof.golden import FULL_VOCABULARY, Difference, Recorder, ReferenceLogits
from runtime_py.proof.limits import COST, KL_MAX, KL_MEAN, NOISE, PEAK_NOISE, Limits, judged, limits_of
from runtime_py.proof.plan import GOLDEN_NEAR, Plan, near
from runtime_py.proof.references import eager_session, nudged
from runtime_py.proof.subject import Subject
from runtime_py.sessions.protocol import Call, Logits, calls
from runtime_py.sessions.pte import PteSession

log = logging.getLogger(__name__)

AGREEING = 0.75  # of the expected share: the file's float error is a few units in the last place, the change is one
FEW = 3.0
SPREAD = 3.0  # standard deviations by which a share over a few steps may be lower than expected


@dataclass(frozen=True)
class Step:
    """One step of the file, and of the reference with its embeddings changed by one unit in the last place.

    Both are compared with the step of the unchanged reference from the same cache.
    """

    file: Difference
    changed: Difference


def check_single_steps(subject: Subject) -> list[Check]:
    """The checks of single steps of a .pte that rounds activations; no checks for another .pte.

    In some steps no value lies near a rounding boundary, and the file must agree as well as in float32. How often this
    happens is measured on the reference itself, after a change of its embeddings in the last place. So a fault that
    changes every step is found, however far the roundings carry. The steps past the window are also counted by
    themselves, because many faults show only there.

    A small model is compared after every id. A large one is compared only around the plan's landmarks, because each
    comparison takes two steps of the eager model.
    """
    if not subject.rounds:
        return []
    plan, manifest = subject.plan, subject.manifest
    compared = set(range(len(plan.ids)))
    if manifest.model.vocab_size > FULL_VOCABULARY:
        compared = set(near(plan.landmarks.values(), GOLDEN_NEAR, len(plan.ids)))
    log.info("validating .%s from its own cache at %d positions", subject.format, len(compared))
    session = PteSession(subject.path, subject.artifact.cache, manifest.model, None)
    (name, reference), *_ = subject.references.items()
    model = eager_session(manifest, subject.artifact, subject.weights, PTE, name).model
    found = list(steps(session, model, plan, compared, reference.images))
    agreement = limits_of(subject.exact, FLOAT, 1).max_abs
    assert agreement is not None
    limits = step_limits([step.changed.kl for step in found], reference)
    kl = [step.file.kl for step in found]
    title = f"one by one, each from the file's own cache ({len(kl)} positions)"
    checks = [
        judged(subject.format, "single-steps", title, *one)
        for one in (
            ("kl_mean", sum(kl) / len(kl), limits.kl_mean),
            ("kl_median", median(kl), None),
            ("kl_max", max(kl), limits.kl_max),
            ("float_equal", *share(found, agreement)),
        )
    ]
    past = [step for step in found if step.file.position >= manifest.model.sliding_window]
    if past:
        title = f"one by one, each from the file's own cache, past the window ({len(past)} positions)"
        checks.append(judged(subject.format, "single-steps/past-window", title, "float_equal", *share(past, agreement)))
    return checks


def step_limits(changed: Sequence[float], reference: ReferenceLogits) -> Limits:
    """The limits of the KL divergence of single steps, from that of the changed reference in the same steps.

    Where the change happened to turn no rounding, the file's float error may still turn a few.
    """
    one = COST * float(reference.cost_kl.max())
    noise = NOISE * sum(changed) / len(changed) + PEAK_NOISE * max(changed) / len(changed)
    return Limits(
        "single steps: twice the changed reference's divergence",
        kl_mean=max(KL_MEAN, noise + FEW * one / len(changed)),
        kl_max=max(KL_MAX, PEAK_NOISE * max(changed), one),
    )


def share(found: Sequence[Step], agreement: float) -> tuple[float, float]:
    """The share of steps in which no logit of the file differs by more than ``agreement``, and the least to expect."""
    agreed = sum(step.file.max_abs <= agreement for step in found) / len(found)
    expected = sum(step.changed.max_abs <= agreement for step in found) / len(found)
    deviation = math.sqrt(expected * (1 - expected) / len(found))
    return agreed, max(0.0, AGREEING * expected - SPREAD * deviation)


def steps(
    session: PteSession,
    model: Gemma3,
    plan: Plan,
    compared: Collection[int],
    images: NDArray[np.uint8] | tuple[()] = (),
) -> Iterator[Step]:
    """Feed ``plan`` to a new ``session``, text one id at a time. Yields the steps at the positions ``compared``.

    There ``model`` makes the same step from a copy of the file's cache. Both are fed the soft tokens that the file
    computes from ``images``.
    """
    to_feed = plan.images_to_feed([session.encode_image(image) for image in images])
    for call in calls(session, plan.ids, to_feed, text_chunk=1):
        given = () if call.image is None else (call.image,)
        last = session.position + len(call.ids) - 1
        if last not in compared:
            session.prefill(call.ids, given)
            continue
        recorder = Recorder(plan.ids, session.vocab_size)
        recorder.add(last, eager_step(model, session, call))
        reference = recorder.reference()
        with nudged(model, seed=last):
            changed = reference.compare(last, eager_step(model, session, call))
        file = reference.compare(last, session.prefill(call.ids, given))
        assert file is not None
        assert changed is not None
        yield Step(file, changed)


@torch.inference_mode()
def eager_step(model: Gemma3, session: PteSession, call: Call) -> Logits:
    """The logits [V] of ``model`` after ``call``, fed to a copy of the session's cache."""
    cache = file_cache(session, model.config.num_layers)
    soft_tokens = None if call.image is None else torch.from_numpy(call.image[None])
    tokens = torch.tensor([call.ids])
    logits: Logits = model(tokens, cache, session.position, last_only=True, soft_tokens=soft_tokens)[0, 0].numpy()
    return logits


def file_cache(session: PteSession, layers: int) -> list[LayerKV]:
    """Copies of the file's caches, in the shape in which gemma3.model keeps them: [1, K, slots, D]."""
    pairs = (session.cache(layer) for layer in range(layers))
    return [LayerKV(*(torch.from_numpy(part).transpose(1, 2).contiguous() for part in pair)) for pair in pairs]
