"""The reference session: the eager network with the ring cache, and the logits that files are compared with."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from gemma3.model import Gemma3, new_cache
from quant.activations import Activations, with_integer_weights
from quant.integers import IntegerWeight
from quant.recipe import QuantizedWeights
from quant.stored import is_quantized, load_quantized
from runtime_py.golden import Recorder, Reference
from runtime_py.session import Logits, Piece, Pixels, SoftTokens, network_input, pieces
from runtime_py.validate import Plan

# Logits of a 262 144 vocabulary take a megabyte a position.
RECORDED_ROWS = 32


class EagerSession:
    """``layout`` must be of the ring style. The model is not copied: several sessions can share one."""

    def __init__(self, model: Gemma3, layout: CacheLayout) -> None:
        self.model = model.eval()
        self._layout = layout
        self.context = layout.context
        self.chunk = layout.chunk
        self.vocab_size = model.config.vocab_size
        self.vision = model.config.vision
        self.reset()

    def reset(self) -> None:
        self._cache = new_cache(self._layout)
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Pixels] = ()) -> Logits:
        for piece in pieces(self, ids, images):
            logits = self.forced(piece)
        self.logits = logits[-1]
        return self.logits

    @torch.inference_mode()
    def forced(self, piece: Piece) -> Logits:
        """Feed ``piece``: float32 [n, V], the logits after each id of a text, after the last alone of an image."""
        tokens = torch.tensor(piece.ids, dtype=torch.int64)[None]
        image = piece.image
        soft_tokens = None if image is None else torch.from_numpy(self.encode_image(image))[None]
        logits = self.model(tokens, self._cache, self.position, last_only=image is not None, soft_tokens=soft_tokens)
        self.position += len(piece.ids)
        return np.asarray(logits[0].numpy(), np.float32)

    @torch.inference_mode()
    def encode_image(self, image: Pixels) -> SoftTokens:
        soft_tokens: SoftTokens = self.model.encode_images(torch.from_numpy(network_input(image)))[0].numpy()
        return soft_tokens


def open_eager(checkpoint: Path, context: int, chunk: int) -> EagerSession:
    """The eager model of a float or quantized checkpoint directory, activations float.

    Raises BadInput or StoredError for what cannot be loaded, DoesNotFit for a context that the model does not have.
    """
    config = read_config(checkpoint / "config.json")
    layout = cache_layout(config, "ring", context, chunk)
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


def record(session: EagerSession, ids: Sequence[int], positions: Iterable[int]) -> Reference:
    """The logits of ``session`` (at position 0) after ``ids``, kept at ``positions``."""
    recorder, wanted = Recorder(ids, session.vocab_size), set(positions)
    for position, logits in every_logit(session, ids):
        if position in wanted:
            recorder.add(position, logits)
    return recorder.reference()


def every_logit(session: EagerSession, ids: Sequence[int]) -> Iterator[tuple[int, Logits]]:
    """(position, logits) after each of ``ids``."""
    for piece in pieces(session, ids, text_chunk=min(session.chunk, RECORDED_ROWS)):
        rows = session.forced(piece)
        yield from enumerate(rows, session.position - len(rows))


def with_noise(reference: Reference, session: EagerSession) -> Reference:
    """``reference`` with its ``noise_kl``: how far it is from ``session`` (the same model, at position 0) when the
    embeddings are changed by one unit in the last place.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: torch.nn.Module, __: Any, output: Tensor) -> Tensor:
        signs = torch.randint(-1, 2, output.shape, generator=generator)
        return output * (1 + torch.finfo(torch.float32).eps * signs)

    hook = session.model.model.embed_tokens.register_forward_hook(nudge)
    try:
        ids = reference.ids.tolist()
        compared = (reference.compare(position, logits) for position, logits in every_logit(session, ids))
        noise = [difference.kl for difference in compared if difference is not None]
    finally:
        hook.remove()
    return replace(reference, noise_kl=np.asarray(noise, np.float32))


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
    reference = record(session, plan.ids, plan.positions)
    if manifest.artifacts[format].reference_activations == "int8":
        session.reset()
        reference = with_noise(reference, session)
    return reference
