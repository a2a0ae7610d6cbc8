"""Checks of an .onnx with its integers multiplied in float32, as its exact reference multiplies them.

The file itself rounds activations to int8. Without this rounding it must be as close to its reference as a float32 file
is, which shows that nothing else differs. Works without torch.
"""

import logging
from dataclasses import replace

from export.checks import Check
from export.onnx.file import VISION_FILE, exact_twin
from export.target import FLOAT
from gemma3.images import network_input
from runtime_py.proof.golden import FULL_VOCABULARY
from runtime_py.proof.limits import tolerances
from runtime_py.proof.subject import Subject
from runtime_py.proof.walks import Judge, check_session, soft_token_checks
from runtime_py.sessions.onnx import OnnxSession, open_encoder

log = logging.getLogger(__name__)

PREFIX, SUFFIX = "float32/", ", multiplied in float32"


def check_exact_vision(subject: Subject) -> list[Check]:
    """Check the soft tokens of the vision model. Writes a temporary graph into the subject's directory.

    Returns no checks for a text-only model and if nothing is rounded. In float32 the largest vision model takes 1.7 GB.
    """
    if subject.manifest.model.vision is None or not subject.rounds:
        return []
    log.info("validating .%s's vision model multiplied in float32", subject.format)
    reference = subject.exact
    with exact_twin(subject.directory / VISION_FILE) as twin:
        encoder = open_encoder(twin, None)
        inputs = [{"pixels": network_input(image)} for image in reference.images]
        soft_tokens = [encoder.run(["soft_tokens"], pixels)[0][0] for pixels in inputs]
    judge = Judge(subject.format, tolerances(subject.plan, reference, FLOAT), PREFIX, SUFFIX)
    return soft_token_checks(judge, reference, soft_tokens)


def check_exact_text(subject: Subject) -> list[Check]:
    """Check the text model along one walk. Writes a temporary graph into the subject's directory.

    Returns no checks if nothing is rounded. Of a vocabulary over FULL_VOCABULARY only the golden columns are computed:
    multiplied in float32, a table of 262 144 rows takes more memory than the export.
    """
    if not subject.rounds:
        return []
    walk = next(iter(subject.plan.walks))
    plan = replace(subject.plan, walks={walk: subject.plan.walks[walk]})
    log.info("validating .%s multiplied in float32", subject.format)
    reference, columns = subject.exact, None
    if subject.manifest.model.vocab_size > FULL_VOCABULARY:
        reference, columns = reference.only_columns(), reference.columns
    with exact_twin(subject.path, columns) as twin:
        session = OnnxSession(twin, subject.artifact.cache, subject.manifest.model, None, logits=len(reference.columns))
        within = tolerances(plan, reference, FLOAT)
        return check_session(
            session, plan, reference, subject.format, within, list(reference.soft_tokens), PREFIX, SUFFIX
        )
