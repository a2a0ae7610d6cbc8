"""An .onnx with its integers multiplied in float32: the rounding of activations is then the only difference between
the file and these figures, so float32's limits must hold. Works without torch.
"""

import logging
from dataclasses import replace

from export.checks import Check
from export.onnx.file import VISION_FILE, exact_twin
from gemma3.images import network_input
from runtime_py.proof.golden import FULL_VOCABULARY
from runtime_py.proof.limits import FLOAT_LIMITS, tolerances
from runtime_py.proof.subject import Subject
from runtime_py.proof.walks import Judge, check_session, soft_token_checks
from runtime_py.sessions.onnx import OnnxSession, open_encoder

log = logging.getLogger(__name__)

PREFIX, SUFFIX = "float32/", ", multiplied in float32"


def check_exact_vision(subject: Subject) -> list[Check]:
    """The vision model, of any size: in float32 the largest takes 1.7 GB. Writes into the directory for a moment."""
    if subject.manifest.model.vision is None or subject.limits is FLOAT_LIMITS:
        return []
    log.info("validating .onnx's vision model multiplied in float32")
    reference = subject.reference
    with exact_twin(subject.directory / VISION_FILE) as twin:
        encoder = open_encoder(twin, None)
        inputs = [{"pixels": network_input(image)} for image in reference.images]
        soft_tokens = [encoder.run(["soft_tokens"], pixels)[0][0] for pixels in inputs]
    judge = Judge("onnx", tolerances(subject.plan, reference, FLOAT_LIMITS), PREFIX, SUFFIX)
    return soft_token_checks(judge, reference, soft_tokens)


def check_exact_text(subject: Subject) -> list[Check]:
    """The text model, along one walk. Writes into the directory for a moment.

    Only for vocabularies up to FULL_VOCABULARY: ONNX Runtime then holds the head's table in float32, which for 262 144
    rows takes more memory than the export.
    """
    if subject.manifest.model.vocab_size > FULL_VOCABULARY or subject.limits is FLOAT_LIMITS:
        return []
    first = next(iter(subject.plan.walks))
    plan = replace(subject.plan, walks={first: subject.plan.walks[first]})
    log.info("validating .onnx multiplied in float32")
    reference = subject.reference
    with exact_twin(subject.path) as twin:
        session = OnnxSession(twin, subject.artifact.cache, subject.manifest.model, None)
        within = tolerances(plan, reference, FLOAT_LIMITS)
        return check_session(session, plan, reference, "onnx", within, list(reference.soft_tokens), PREFIX, SUFFIX)
