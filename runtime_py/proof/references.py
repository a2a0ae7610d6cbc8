"""Fresh references: what the quantized eager model of each artifact computes along a plan."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.manifest import Artifact, Manifest
from gemma3.cache import cache_layout
from quant.eager import quantized_model
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import FULL_VOCABULARY, Recorder, ReferenceLogits, relative_rms
from runtime_py.proof.plan import Plan, plan_images
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Session, SoftTokens, every_position

DRAWS = 4  # how often the noise of a small model is drawn


def fresh_references(
    manifest: Manifest, plan: Plan, weights: Mapping[str, QuantizedWeights]
) -> dict[str, ReferenceLogits]:
    """The references of a bundle's artifacts, which are made of ``weights``, by ``reference_activations``.

    No more than one eager model is in memory at a time, and none together with a runtime's.
    """
    # Artifacts whose references treat activations alike are made of the same weights.
    formats = {artifact.reference_activations: format for format, artifact in manifest.artifacts.items()}
    images = plan_images(manifest)
    return {
        activations: _fresh(manifest, manifest.artifacts[format], plan, images, weights[format])
        for activations, format in formats.items()
    }


def _fresh(
    manifest: Manifest, artifact: Artifact, plan: Plan, images: NDArray[np.uint8], weights: QuantizedWeights
) -> ReferenceLogits:
    session = eager_session(manifest, artifact, weights)
    reference = record(session, plan, images)
    if artifact.reference_activations == "int8":
        session.reset()
        reference = with_noise(reference, session, plan)
    return reference


def eager_session(manifest: Manifest, artifact: Artifact, weights: QuantizedWeights) -> EagerSession:
    """The eager model that ``artifact`` was exported from: its weights, and its runtime's rounding of activations."""
    layout = cache_layout(manifest.model, "ring", manifest.context, manifest.chunk)
    return EagerSession(quantized_model(manifest.model, weights, artifact.reference_activations), layout)


def record(session: EagerSession, plan: Plan, images: NDArray[np.uint8] | None = None) -> ReferenceLogits:
    """The logits of ``session`` (at position 0) along ``plan``, at the plan's positions."""
    images = np.zeros((0, 0, 0, 3), np.uint8) if images is None else images
    soft_tokens = encode(session, images)
    recorder, wanted = Recorder(plan.ids, session.vocab_size), set(plan.positions)
    for position, logits in every_position(session, plan.ids, plan.images_to_feed(list(soft_tokens))):
        if position in wanted:
            recorder.add(position, logits)
    return recorder.reference(images, soft_tokens)


def encode(session: Session, images: NDArray[np.uint8]) -> SoftTokens:
    """The soft tokens of all images, [IMAGES, T, E]; [0, 0, 0] without images."""
    encoded = [session.encode_image(image) for image in images]
    return np.stack(encoded) if encoded else np.zeros((0, 0, 0), np.float32)


def with_noise(reference: ReferenceLogits, session: EagerSession, plan: Plan) -> ReferenceLogits:
    """``reference`` with its noise, measured with ``session`` (the same model, at position 0).

    The noise is the distance between the reference and the same model after the inputs of the text model and of the
    vision model's layers are changed by one unit in the last place. A small model has few values near a rounding
    boundary, and one draw may miss them all, so its noise is the largest of several draws.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, output.shape, generator=generator)
        return output * (1 + torch.finfo(torch.float32).eps * signs)

    model = session.model
    nudged = [model.model.embed_tokens, *([model.vision_tower.vision_model.embeddings] if session.vision else [])]
    hooks = [module.register_forward_hook(nudge) for module in nudged]
    draws: list[list[float]] = []
    changes: list[float] = []
    try:
        for _ in range(DRAWS if session.vocab_size <= FULL_VOCABULARY else 1):
            session.reset()
            soft_tokens = encode(session, reference.images)
            changes += (relative_rms(*pair) for pair in zip(soft_tokens, reference.soft_tokens, strict=True))
            compared = (
                reference.compare(position, logits)
                for position, logits in every_position(session, plan.ids, plan.images_to_feed(list(soft_tokens)))
            )
            draws.append([difference.kl for difference in compared if difference is not None])
    finally:
        for hook in hooks:
            hook.remove()
    return replace(
        reference, noise_kl=np.asarray(max(draws, key=sum), np.float32), soft_noise=np.asarray(changes, np.float32)
    )
