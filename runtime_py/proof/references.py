"""Computes fresh references: the logits of each artifact's quantized eager model along a plan."""

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
from runtime_py.proof.golden import FULL_VOCABULARY, Recorder, ReferenceLogits, reference_keys, relative_rms
from runtime_py.proof.plan import Plan, plan_images
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Session, SoftTokens, every_position

DRAWS = 4  # how many times the noise of a small model is measured, with other changes each time


def fresh_references(
    manifest: Manifest, plan: Plan, weights: Mapping[str, QuantizedWeights]
) -> dict[str, ReferenceLogits]:
    """The references of a bundle's artifacts, by key (see ``reference_keys``). ``weights`` are by format.

    No more than one eager model is in memory at a time, and none together with a runtime's.
    """
    images = plan_images(manifest)
    found: dict[str, ReferenceLogits] = {}
    for format, key in reference_keys(manifest).items():
        if key not in found:
            found[key] = _fresh(manifest, manifest.artifacts[format], plan, images, weights[format])
    return found


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
    """The quantized eager model of ``artifact``, with its ``weights`` and its reference's rounding of activations."""
    layout = cache_layout(manifest.model, "ring", manifest.context, manifest.chunk)
    return EagerSession(quantized_model(manifest.model, weights, artifact.reference_activations), layout)


def record(session: EagerSession, plan: Plan, images: NDArray[np.uint8] | None = None) -> ReferenceLogits:
    """The logits of ``session``, which must be at position 0, at the plan's positions, and the images' soft tokens."""
    images = np.zeros((0, 0, 0, 3), np.uint8) if images is None else images
    soft_tokens = encode(session, images)
    recorder, wanted = Recorder(plan.ids, session.vocab_size), set(plan.positions)
    for position, logits in every_position(session, plan.ids, plan.images_to_feed(list(soft_tokens))):
        if position in wanted:
            recorder.add(position, logits)
    return recorder.reference(images, soft_tokens)


def encode(session: Session, images: NDArray[np.uint8]) -> SoftTokens:
    """The soft tokens of all ``images`` [I, S, S, 3]: float32 [I, T, E], or [0, 0, 0] without images."""
    encoded = [session.encode_image(image) for image in images]
    return np.stack(encoded) if encoded else np.zeros((0, 0, 0), np.float32)


def with_noise(reference: ReferenceLogits, session: EagerSession, plan: Plan) -> ReferenceLogits:
    """``reference`` with its noise, measured with ``session``, which runs the same model.

    The noise is the distance between the reference and the same model after the inputs of the text model and of the
    vision model's layers are randomly changed by one unit in the last place. A small model has few values near a
    rounding boundary, and one draw may miss them all, so its noise is the largest of several draws.
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
