"""The reference session: the eager network with the ring cache, and the logits that files are compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.manifest import Format, Manifest
from gemma3.cache import CacheLayout, cache_layout
from gemma3.checkpoint import check_shapes, empty_model, fill, load_model, open_checkpoint
from gemma3.config import ModelConfig, read_config
from gemma3.images import network_input
from gemma3.model import Gemma3, new_cache
from quant.activations import Activations, with_integer_weights
from quant.integers import IntegerWeight
from quant.recipe import QuantizedWeights
from quant.stored import is_quantized, load_quantized
from runtime_py.accuracy import every_position
from runtime_py.golden import FULL_VOCABULARY, Recorder, Reference, relative_rms
from runtime_py.plan import Plan
from runtime_py.session import (
    Image,
    Logits,
    Piece,
    Pixels,
    Session,
    SoftTokens,
    pieces,
    soft_tokens_of,
)

DRAWS = 4  # of the noise of a small model


class EagerSession:
    """``layout`` must be of the ring style. The model is not copied: several sessions can share one."""

    def __init__(self, model: Gemma3, layout: CacheLayout) -> None:
        vision = model.config.vision
        # A ring that is shorter would lose keys that an image's first tokens still see.
        assert vision is None or layout.chunk >= vision.tokens_per_image
        self.model = model.eval()
        self._layout = layout
        self.context = layout.context
        self.chunk = layout.chunk
        self.vocab_size = model.config.vocab_size
        self.vision = vision
        self.reset()

    def reset(self) -> None:
        self._cache = new_cache(self._layout)
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        for piece in pieces(self, ids, images):
            logits = self.forced(piece)
        self.logits = logits[-1]
        return self.logits

    @torch.inference_mode()
    def forced(self, piece: Piece) -> Logits:
        """Feed ``piece``: float32 [n, V], the logits after each id of a text, after the last alone of an image."""
        tokens = torch.tensor(piece.ids, dtype=torch.int64)[None]
        soft_tokens = None if piece.image is None else torch.from_numpy(soft_tokens_of(self, piece.image))[None]
        logits = self.model(
            tokens, self._cache, self.position, last_only=soft_tokens is not None, soft_tokens=soft_tokens
        )
        self.position += len(piece.ids)
        return np.asarray(logits[0].numpy(), np.float32)

    @torch.inference_mode()
    def encode_image(self, image: Pixels) -> SoftTokens:
        soft_tokens: SoftTokens = self.model.encode_images(torch.from_numpy(network_input(image)))[0].numpy()
        return soft_tokens


def open_eager(checkpoint: Path, context: int, chunk: int) -> EagerSession:
    """The eager model of a float or quantized checkpoint directory, activations float. A chunk holds an image at least.

    Raises BadInput or StoredError for what cannot be loaded, DoesNotFit for a context that the model does not have.
    """
    config = read_config(checkpoint / "config.json")
    tokens_per_image = 1 if config.vision is None else config.vision.tokens_per_image
    layout = cache_layout(config, "ring", context, max(chunk, tokens_per_image))
    if is_quantized(checkpoint):
        return EagerSession(quantized_model(config, load_quantized(checkpoint).weights, "float"), layout)
    return EagerSession(load_model(open_checkpoint(checkpoint)), layout)


def open_own(manifest: Manifest, format: Format, weights: QuantizedWeights) -> EagerSession:
    """The eager model that a bundle's graph was exported from: ``weights``, and the rounding its runtime does."""
    layout = cache_layout(manifest.model, "ring", manifest.context, manifest.chunk)
    activations = manifest.artifacts[format].reference_activations
    return EagerSession(quantized_model(manifest.model, weights, activations), layout)


def quantized_model(config: ModelConfig, weights: QuantizedWeights, activations: Activations) -> Gemma3:
    """The eager model of exactly ``weights``: see ``with_integer_weights`` for ``activations``."""
    check_shapes(config, weights.shapes)
    model = empty_model(config)
    with_integer_weights(model, weights.integers, activations)
    return fill(
        model,
        {
            name: (weight if isinstance(weight, Tensor) else weight.dequantize()).float()
            for name, weight in weights.tensors.items()
            if not isinstance(weight, IntegerWeight)
        },
    )


def record(session: EagerSession, plan: Plan) -> Reference:
    """What ``session`` (at position 0) says along ``plan``, kept at its positions."""
    soft_tokens = encode(session, plan)
    recorder, wanted = Recorder(plan.ids, session.vocab_size), set(plan.positions)
    for position, logits in every_position(session, plan.ids, plan.shown_images(list(soft_tokens))):
        if position in wanted:
            recorder.add(position, logits)
    return recorder.reference(plan.images, soft_tokens)


def encode(session: Session, plan: Plan) -> SoftTokens:
    """[IMAGES, T, E]; [0, 0, 0] without images."""
    encoded = [session.encode_image(image) for image in plan.images]
    return np.stack(encoded) if encoded else np.zeros((0, 0, 0), np.float32)


def with_noise(reference: Reference, session: EagerSession, plan: Plan) -> Reference:
    """``reference`` with its noise: how far it is from ``session`` (the same model, at position 0) when what goes into
    the text model and into the encoder's layers is changed by one unit in the last place. A small model has few
    roundings near their boundary, all of which one draw may miss: its noise is the largest of several draws.
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
            soft_tokens = encode(session, plan)
            changes += (relative_rms(*pair) for pair in zip(soft_tokens, reference.soft_tokens, strict=True))
            compared = (
                reference.compare(position, logits)
                for position, logits in every_position(session, plan.ids, plan.shown_images(list(soft_tokens)))
            )
            draws.append([difference.kl for difference in compared if difference is not None])
    finally:
        for hook in hooks:
            hook.remove()
    return replace(
        reference, noise_kl=np.asarray(max(draws, key=sum), np.float32), soft_noise=np.asarray(changes, np.float32)
    )


def fresh_references(
    manifest: Manifest, plan: Plan, weights: Mapping[Format, QuantizedWeights]
) -> dict[str, Reference]:
    """What each artifact of ``manifest``, made of its ``weights``, is compared with, by its ``reference_activations``.

    No more than one eager model is ever in memory, and none beside a runtime's.
    """
    # Artifacts whose references treat activations alike are made of the same weights.
    formats = {artifact.reference_activations: format for format, artifact in manifest.artifacts.items()}
    return {activations: _fresh(manifest, plan, format, weights[format]) for activations, format in formats.items()}


def _fresh(manifest: Manifest, plan: Plan, format: Format, weights: QuantizedWeights) -> Reference:
    session = open_own(manifest, format, weights)
    reference = record(session, plan)
    if manifest.artifacts[format].reference_activations == "int8":
        session.reset()
        reference = with_noise(reference, session, plan)
    return reference
