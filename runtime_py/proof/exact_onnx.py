"""Checks of an .onnx with its integers multiplied in float32, as its reference multiplies them.

The file itself rounds activations to int8. Without this rounding it must keep to FLOAT_LIMITS, which shows that nothing
else differs from the reference. Works without torch.
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
    """Check the soft tokens of the vision model. Writes a temporary graph into the subject's directory.

    Returns no checks for a text-only model and for float weights. In float32 the largest vision model takes 1.7 GB.
    """
    if subject.manifest.model.vision is None or subject.limits is FLOAT_LIMITS:
        return []
    log.info("validating .%s's vision model multiplied in float32", subject.format)
    reference = subject.reference
    with exact_twin(subject.directory / VISION_FILE) as twin:
        encoder = open_encoder(twin, None)
        inputs = [{"pixels": network_input(image)} for image in reference.images]
        soft_tokens = [encoder.run(["soft_tokens"], pixels)[0][0] for pixels in inputs]
    judge = Judge(subject.format, tolerances(subject.plan, reference, FLOAT_LIMITS), PREFIX, SUFFIX)
    return soft_token_checks(judge, reference, soft_tokens)


def check_exact_text(subject: Subject) -> list[Check]:
    """Check the text model along one walk. Writes a temporary graph into the subject's directory.

    Returns no checks for float weights and for a vocabulary over FULL_VOCABULARY: ONNX Runtime then holds the head's
    table in float32, which for 262 144 rows takes more memory than the export.
    """
    if subject.manifest.model.vocab_size > FULL_VOCABULARY or subject.limits is FLOAT_LIMITS:
        return []
    first = next(iter(subject.plan.walks))
    plan = replace(subject.plan, walks={first: subject.plan.walks[first]})
    log.info("validating .%s multiplied in float32", subject.format)
    reference = subject.reference
    with exact_twin(subject.path) as twin:
        session = OnnxSession(twin, subject.artifact.cache, subject.manifest.model, None)
        within = tolerances(plan, reference, FLOAT_LIMITS)
        return check_session(
            session, plan, reference, subject.format, within, list(reference.soft_tokens), PREFIX, SUFFIX
        )
