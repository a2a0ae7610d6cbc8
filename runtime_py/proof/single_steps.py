"""Compares single steps of a .pte with steps of the reference that begin with a copy of the file's cache.

A file that multiplies in int8 and its reference drift apart once a value is rounded the other way, because the change
stays in the cache and makes more values round the other way. In a single step from the same cache there is no such
history. Unless one of the step's own values lies within float error of a rounding boundary, file and reference agree as
well as in float32. So these figures show whether anything else differs.
"""

import logging
from collections.abc import Collection, Iterator
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray

from export.checks import Check
from gemma3.model import Gemma3, LayerKV
from runtime_py.proof.golden import FULL_VOCABULARY, Difference, Recorder
from runtime_py.proof.limits import judged, with_noise_limits
from runtime_py.proof.plan import GOLDEN_NEAR, Plan, near
from runtime_py.proof.references import eager_session
from runtime_py.proof.subject import Subject
from runtime_py.sessions.protocol import calls
from runtime_py.sessions.pte import PteSession

log = logging.getLogger(__name__)

FLOAT_AGREEMENT = 1e-4  # if no logit differs by more, no value of the step was rounded the other way


def check_single_steps(subject: Subject) -> list[Check]:
    """The checks of single steps of a .pte that multiplies in int8; no checks for another .pte.

    A small model is compared after every id. A large one is compared only around the plan's landmarks, because each
    comparison takes a step of the eager model.
    """
    if subject.artifact.reference_activations != "int8":
        return []
    plan, manifest = subject.plan, subject.manifest
    compared = set(range(len(plan.ids)))
    if manifest.model.vocab_size > FULL_VOCABULARY:
        compared = set(near(plan.landmarks.values(), GOLDEN_NEAR, len(plan.ids)))
    log.info("validating .%s from its own cache at %d positions", subject.format, len(compared))
    session = PteSession(subject.path, subject.artifact.cache, manifest.model, None)
    model = eager_session(manifest, subject.artifact, subject.weights).model
    differences = list(steps(session, model, plan, compared, subject.reference.images))
    limits = with_noise_limits(subject.limits, subject.reference, len(differences))
    kl = [difference.kl for difference in differences]
    agree = sum(difference.max_abs <= FLOAT_AGREEMENT for difference in differences) / len(differences)
    name = f"one by one, each from the file's own cache ({len(kl)} positions)"
    return [
        judged(subject.format, "single-steps", name, metric, value, limit)
        for metric, value, limit in (
            ("kl_mean", sum(kl) / len(kl), limits.kl_mean),
            ("kl_median", median(kl), None),
            ("kl_max", max(kl), limits.kl_max),
            ("float_equal", agree, None),
        )
    ]


def steps(
    session: PteSession,
    model: Gemma3,
    plan: Plan,
    compared: Collection[int],
    images: NDArray[np.uint8] | tuple[()] = (),
) -> Iterator[Difference]:
    """Feed ``plan`` to a new ``session``, text one id at a time. Yields the differences at the positions ``compared``.

    There ``model`` makes the same step from a copy of the file's cache. Both are fed the soft tokens that the file
    computes from ``images``.
    """
    to_feed = plan.images_to_feed([session.encode_image(image) for image in images])
    for call in calls(session, plan.ids, to_feed, text_chunk=1):
        given = () if call.image is None else (call.image,)
        start, last = session.position, session.position + len(call.ids) - 1
        if last not in compared:
            session.prefill(call.ids, given)
            continue
        cache = file_cache(session, model.config.num_layers)
        soft_tokens = torch.from_numpy(np.stack(given)) if given else None
        with torch.inference_mode():
            tokens = torch.tensor([call.ids])
            expected = model(tokens, cache, start, last_only=True, soft_tokens=soft_tokens)[0, 0].numpy()
        recorder = Recorder(plan.ids, session.vocab_size)
        recorder.add(last, expected)
        difference = recorder.reference().compare(last, session.prefill(call.ids, given))
        assert difference is not None
        yield difference


def file_cache(session: PteSession, layers: int) -> list[LayerKV]:
    """Copies of the file's caches, in the shape in which gemma3.model keeps them: [1, K, slots, D]."""
    pairs = (session.cache(layer) for layer in range(layers))
    return [LayerKV(*(torch.from_numpy(part).transpose(1, 2).contiguous() for part in pair)) for pair in pairs]
