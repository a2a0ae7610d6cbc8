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
from statistics import mean, median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.checks import Check
from export.executorch.target import PTE
from export.target import FLOAT
from gemma3.model import Gemma3, LayerKV
from runtime_py.proof.golden import FULL_VOCABULARY, Difference, Recorder, ReferenceLogits
from runtime_py.proof.limits import COST, KL_MAX, KL_MEAN, NOISE, PEAK_NOISE, judged, limits_of
from runtime_py.proof.plan import GOLDEN_NEAR, Plan, near
from runtime_py.proof.references import eager_session
from runtime_py.proof.subject import Subject
from runtime_py.sessions.protocol import Call, Logits, calls
from runtime_py.sessions.pte import PteSession

log = logging.getLogger(__name__)

# The share of agreeing results may be lower than that of the reference in float64 by this factor, because a kernel's
# float error may be larger than the reference's, and by so many standard deviations of a mean over a few steps.
AGREEING, SPREAD = 0.5, 2.0
FEW = 3  # so many of the steps may turn a rounding where the reference in float64 turns none
# Keys and values agree if the root mean square of their difference is at most this share of theirs. Float errors are
# ten times smaller, the step of an int8 rounding ten times larger.
SAME = 2e-5


@dataclass(frozen=True)
class Step:
    """One step of the file, and of the reference in float64, both compared with the reference's from the same cache.

    ``file_layers`` and ``wide_layers`` say for each layer whether its new keys and values agree with the reference's.
    """

    file: Difference
    wide: Difference
    file_layers: tuple[bool, ...]
    wide_layers: tuple[bool, ...]


def check_single_steps(subject: Subject) -> list[Check]:
    """The checks of single steps of a .pte that rounds activations; no checks for another .pte.

    A step has results on the way: the new keys and values of each layer, and at the end the logits. Up to the first
    value that lies near a rounding boundary they must agree as in float32. How far that is, is measured on the
    reference itself, in float64. A fault that changes every step shows from the first layer it concerns, however far
    roundings carry further on. The steps past the window are also counted by themselves, because many faults show only
    there.

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
    model, wide = (
        eager_session(manifest, subject.artifact, subject.weights, PTE, name, dtype).model
        for dtype in (torch.float32, torch.float64)
    )
    found = list(steps(session, model, wide, plan, compared, reference.images))
    agreement = limits_of(subject.exact, FLOAT, 1).max_abs
    assert agreement is not None
    mean_limit, max_limit = step_limits([step.wide.kl for step in found], reference)
    kl = [step.file.kl for step in found]
    title = f"one by one, each from the file's own cache ({len(kl)} positions)"
    checks = [
        judged(subject.format, "single-steps", title, *one)
        for one in (
            ("kl_mean", sum(kl) / len(kl), mean_limit),
            ("kl_median", median(kl), None),
            ("kl_max", float(np.max(kl)), max_limit),
            ("float_equal", *agreeing(found, agreement)),
        )
    ]
    past = [step for step in found if step.file.position >= manifest.model.sliding_window]
    if past:
        title = f"one by one, each from the file's own cache, past the window ({len(past)} positions)"
        checks.append(
            judged(subject.format, "single-steps/past-window", title, "float_equal", *agreeing(past, agreement))
        )
    return checks


def step_limits(wide: Sequence[float], reference: ReferenceLogits) -> tuple[float, float]:
    """The limits of the mean and the maximum KL divergence of single steps.

    They follow from ``wide``, that of the reference in float64 in the same steps. Where the reference's float error
    happened to turn no rounding, the file's may still turn a few.
    """
    one = COST * float(reference.cost_kl.max())
    noise = NOISE * sum(wide) / len(wide) + PEAK_NOISE * max(wide) / len(wide)
    return max(KL_MEAN, noise + FEW * one / len(wide)), max(KL_MAX, PEAK_NOISE * max(wide), one)


def agreeing(found: Sequence[Step], agreement: float) -> tuple[float, float]:
    """The share of results on which file and reference agree, over all steps, and the least to expect.

    Logits agree if none differs by more than ``agreement``.
    """
    file = [mean((*step.file_layers, step.file.max_abs <= agreement)) for step in found]
    wide = [mean((*step.wide_layers, step.wide.max_abs <= agreement)) for step in found]
    expected = mean(wide)
    deviation = math.sqrt(expected * (1 - expected) / len(found))
    return mean(file), max(0.0, AGREEING * (expected - SPREAD * deviation))


def steps(
    session: PteSession,
    model: Gemma3,
    wide: Gemma3,
    plan: Plan,
    compared: Collection[int],
    images: NDArray[np.uint8] | tuple[()] = (),
) -> Iterator[Step]:
    """Feed ``plan`` to a new ``session``, text one id at a time. Yields the steps at the positions ``compared``.

    There ``model`` and ``wide``, the same in float64, make the same step from copies of the file's cache. All are fed
    the soft tokens that the file computes from ``images``.
    """
    to_feed = plan.images_to_feed([session.encode_image(image) for image in images])
    for call in calls(session, plan.ids, to_feed, text_chunk=1):
        given = () if call.image is None else (call.image,)
        last = session.position + len(call.ids) - 1
        if last not in compared:
            session.prefill(call.ids, given)
            continue
        logits, rows = eager_step(model, session, call)
        wide_logits, wide_rows = eager_step(wide, session, call)
        recorder = Recorder(plan.ids, session.vocab_size)
        recorder.add(last, logits)
        reference = recorder.reference()
        file = reference.compare(last, session.prefill(call.ids, given))
        in_float64 = reference.compare(last, wide_logits)
        assert file is not None
        assert in_float64 is not None
        file_rows = rows_at(file_cache(session, model.config.num_layers), last)
        yield Step(file, in_float64, same(file_rows, rows), same(wide_rows, rows))


@torch.inference_mode()
def eager_step(model: Gemma3, session: PteSession, call: Call) -> tuple[Logits, list[Tensor]]:
    """The logits [V] of ``model`` after ``call``, fed to a copy of the session's cache, and ``rows_at`` its end.

    All are float32.
    """
    cache = file_cache(session, model.config.num_layers, model.model.norm.weight.dtype)
    soft_tokens = None if call.image is None else torch.from_numpy(call.image[None])
    logits = model(torch.tensor([call.ids]), cache, session.position, last_only=True, soft_tokens=soft_tokens)
    last: Logits = logits[0, 0].float().numpy()
    return last, rows_at(cache, session.position + len(call.ids) - 1)


def rows_at(cache: Sequence[LayerKV], position: int) -> list[Tensor]:
    """The keys and values of each layer at ``position``, which must be the last one fed: float32 [2 · K · D]."""
    parts = ((part[0, :, position % part.shape[2]] for part in (kv.keys, kv.values)) for kv in cache)
    return [torch.cat([part.flatten() for part in pair]).float() for pair in parts]


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[bool, ...]:
    """For each layer, do the keys and values agree (see SAME)?"""
    return tuple(
        bool(torch.linalg.vector_norm(one - other) <= SAME * torch.linalg.vector_norm(other))
        for one, other in zip(found, expected, strict=True)
    )


def file_cache(session: PteSession, layers: int, dtype: torch.dtype = torch.float32) -> list[LayerKV]:
    """Copies of the file's caches, in the shape in which gemma3.model keeps them: [1, K, slots, D]."""
    pairs = (session.cache(layer) for layer in range(layers))
    return [LayerKV(*(torch.from_numpy(one).transpose(1, 2).to(dtype).contiguous() for one in pair)) for pair in pairs]
