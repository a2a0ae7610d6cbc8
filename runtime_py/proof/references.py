"""Computes fresh references: the logits of each artifact's quantized eager model along a plan."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.manifest import Artifact, Manifest
from export.target import FLOAT, Target, rounding_of
from gemma3.cache import cache_layout
from gemma3.model import Gemma3
from quant.eager import quantized_model
from quant.weights import QuantizedWeights
from runtime_py.proof.golden import FULL_VOCABULARY, Difference, Recorder, ReferenceLogits, reference_keys, relative_rms
from runtime_py.proof.plan import Plan, plan_images
from runtime_py.sessions.eager import EagerSession
from runtime_py.sessions.protocol import Logits, Session, SoftTokens, every_position

DRAWS = 4  # how many times the noise of a small model is measured, with other changes each time


@dataclass(frozen=True)
class FreshReferences:
    """The references of a bundle's artifacts.

    ``golden`` are by key (see ``reference_keys``). ``exact`` are by format: the same weights with float activations.
    """

    golden: dict[str, ReferenceLogits]
    exact: dict[str, ReferenceLogits]


def fresh_references(
    manifest: Manifest, plan: Plan, weights: Mapping[str, QuantizedWeights], targets: Mapping[str, Target]
) -> FreshReferences:
    """Compute the references of all artifacts. ``weights`` and ``targets`` are by format.

    No more than one eager model is in memory at a time, and none together with a runtime's.
    """
    images = plan_images(manifest)
    golden: dict[str, ReferenceLogits] = {}
    exact: dict[str, ReferenceLogits] = {}
    for format, keys in reference_keys(manifest).items():
        artifact = manifest.artifacts[format]
        twin = next((one for one in exact if manifest.artifacts[one].stand_ins == artifact.stand_ins), None)
        exact[format] = exact[twin] if twin else float_reference(manifest, weights[format], plan, images)
        for name, key in keys.items():
            if key in golden:
                continue
            if name == FLOAT:
                golden[key] = exact[format]
                continue
            session = eager_session(manifest, artifact, weights[format], targets[format], name)
            reference = rounded_reference(session, plan, exact[format])
            # The noise of one rounding is about that of another, so it is measured once for each format.
            first = next((golden[other] for other in keys.values() if other in golden), None)
            if first is None:
                golden[key] = with_noise(reference, session, plan)
            else:
                golden[key] = replace(reference, noise_kl=first.noise_kl, soft_noise=first.soft_noise)
            del session  # before the next model is made
    return FreshReferences(golden, exact)


def eager_session(
    manifest: Manifest,
    artifact: Artifact,
    weights: QuantizedWeights,
    target: Target,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> EagerSession:
    """The quantized eager model of ``artifact``, with its ``weights``. It rounds as its reference ``name`` does."""
    rounding = rounding_of(target, name, artifact.float_activations)
    return _session(manifest, quantized_model(manifest.model, weights, rounding, dtype))


def _session(manifest: Manifest, model: Gemma3) -> EagerSession:
    return EagerSession(model, cache_layout(manifest.model, "ring", manifest.context, manifest.chunk))


def float_reference(
    manifest: Manifest, weights: QuantizedWeights, plan: Plan, images: NDArray[np.uint8]
) -> ReferenceLogits:
    """The reference with float activations. Its float error is measured with the same model in float64."""
    reference = record(_session(manifest, quantized_model(manifest.model, weights)), plan, images)
    wide = _session(manifest, quantized_model(manifest.model, weights, dtype=torch.float64))
    return with_float_error(reference, wide, plan)


def record(session: EagerSession, plan: Plan, images: NDArray[np.uint8] | None = None) -> ReferenceLogits:
    """The logits of ``session``, which must be at position 0, at the plan's positions, and the images' soft tokens."""
    images = np.zeros((0, 0, 0, 3), np.uint8) if images is None else images
    recorder, soft_tokens = Recorder(plan.ids, session.vocab_size), encode(session, images)
    for position, logits in _fed(session, plan, soft_tokens):
        recorder.add(position, logits)
    return recorder.reference(images, soft_tokens)


def with_float_error(reference: ReferenceLogits, wide: EagerSession, plan: Plan) -> ReferenceLogits:
    """``reference`` with its distance from ``wide``, which runs the same model in float64."""
    soft_tokens = encode(wide, reference.images)
    differences = _differences(reference, _fed(wide, plan, soft_tokens))
    return replace(
        reference,
        float_error=np.asarray([one.max_abs for one in differences], np.float32),
        soft_noise=_changes(reference, soft_tokens),
    )


def rounded_reference(session: EagerSession, plan: Plan, exact: ReferenceLogits) -> ReferenceLogits:
    """As ``record``, for a ``session`` that rounds activations, with what that costs against ``exact``."""
    recorder, soft_tokens = Recorder(plan.ids, session.vocab_size), encode(session, exact.images)

    def recorded() -> Iterator[tuple[int, Logits]]:
        for position, logits in _fed(session, plan, soft_tokens):
            recorder.add(position, logits)
            yield position, logits

    costs = np.asarray([one.kl for one in _differences(exact, recorded())], np.float32)
    reference = recorder.reference(exact.images, soft_tokens)
    return replace(reference, cost_kl=costs, soft_cost=_changes(exact, soft_tokens))


def with_noise(reference: ReferenceLogits, session: EagerSession, plan: Plan) -> ReferenceLogits:
    """``reference`` with its noise, measured with ``session``, which runs the same model.

    The noise is the distance between the reference and the same model after the inputs of the text model and of the
    vision model's layers are randomly changed by one unit in the last place. A small model has few values near a
    rounding boundary, and one draw may miss them all, so its noise is the largest of several draws.
    """
    draws: list[list[float]] = []
    changes: list[NDArray[np.float32]] = []
    with nudged(session.model):
        for _ in range(DRAWS if session.vocab_size <= FULL_VOCABULARY else 1):
            session.reset()
            soft_tokens = encode(session, reference.images)
            changes.append(_changes(reference, soft_tokens))
            draws.append([one.kl for one in _differences(reference, _fed(session, plan, soft_tokens))])
    return replace(reference, noise_kl=np.asarray(max(draws, key=sum), np.float32), soft_noise=np.concatenate(changes))


@contextmanager
def nudged(model: Gemma3) -> Iterator[None]:
    """In the block, ``model`` randomly changes its embeddings, and its vision model's, by one unit in the last place.

    Each call draws other changes.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, output.shape, generator=generator)
        return output * (1 + torch.finfo(torch.float32).eps * signs)

    vision = model.config.vision is not None
    embeddings = [model.model.embed_tokens, *([model.vision_tower.vision_model.embeddings] if vision else [])]
    hooks = [module.register_forward_hook(nudge) for module in embeddings]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def encode(session: Session, images: NDArray[np.uint8]) -> SoftTokens:
    """The soft tokens of all ``images`` [I, S, S, 3]: float32 [I, T, E], or [0, 0, 0] without images."""
    encoded = [session.encode_image(image) for image in images]
    return np.stack(encoded) if encoded else np.zeros((0, 0, 0), np.float32)


def _fed(session: EagerSession, plan: Plan, soft_tokens: SoftTokens) -> Iterator[tuple[int, Logits]]:
    """Feed the plan to ``session``, from position 0. Yields (position, logits) at the plan's positions."""
    images = plan.images_to_feed(list(soft_tokens))
    return every_position(session, plan.ids, images, frozenset(plan.positions))


def _differences(reference: ReferenceLogits, fed: Iterable[tuple[int, Logits]]) -> list[Difference]:
    found = (reference.compare(position, logits) for position, logits in fed)
    return [one for one in found if one is not None]


def _changes(reference: ReferenceLogits, soft_tokens: SoftTokens) -> NDArray[np.float32]:
    """float32 [I]: the relative RMS difference of each image's soft tokens."""
    pairs = zip(soft_tokens, reference.soft_tokens, strict=True)
    return np.asarray([relative_rms(*pair) for pair in pairs], np.float32)
