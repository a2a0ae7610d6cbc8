"""The eager network as a session, with the ring cache."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.target import most_logits
from gemma3.cache import CacheLayout, cache_layout
from gemma3.checkpoint import load_model
from gemma3.config import SLIDING
from gemma3.images import Pixels, network_input
from gemma3.model import Gemma3, new_cache
from quant.eager import quantized_model
from quant.source import QuantizedCheckpoint, Source
from runtime_py.sessions.protocol import Call, Image, Logits, SoftTokens, calls, soft_tokens_of


class EagerSession:
    """A session over the eager ``model``, in float32 or float64. ``layout`` must be of the ring style.

    The model is not copied, so several sessions can share one.
    """

    def __init__(self, model: Gemma3, layout: CacheLayout) -> None:
        vision = model.config.vision
        # A shorter ring would lose keys that an image's first positions still attend to.
        assert vision is None or layout.chunk >= vision.tokens_per_image
        self.model = model.eval()
        self._layout = layout
        self.context = layout.context
        self.chunk = layout.chunk
        self.most_logits = most_logits(layout)
        self.vocab_size = model.config.vocab_size
        self.vision = vision
        self._dtype = model.model.norm.weight.dtype
        self.reset()

    def reset(self) -> None:
        self._cache = new_cache(self._layout, self._dtype)
        self.position = self._written = 0
        self.logits: Logits = np.empty(0, np.float32)

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        return {
            f"layers.{index}.{part}": (buffer if layer.kind == SLIDING else buffer[:, :, :position]).numpy()
            for index, (layer, cache) in enumerate(zip(self._layout.layers, self._cache, strict=True))
            for part, buffer in (("keys", cache.keys), ("values", cache.values))
        }

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        self.position = self._written = len(ids)
        self.logits = logits

    def can_rewind(self, written: int, position: int) -> bool:
        return self._layout.can_rewind(max(written, self._written), position, self.model.config.sliding_window)

    def rewind(self, position: int) -> None:
        assert self.can_rewind(self.position, position)
        self._written = max(self._written, self.position)
        self.position = position
        self.logits = np.empty(0, np.float32)

    def verify(self, ids: Sequence[int]) -> Logits:
        assert len(ids) <= self.most_logits
        (call,) = calls(self, ids)
        rows = np.stack([logits for _, logits in self.call(call)])
        self.logits = rows[-1]
        return rows

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        split = calls(self, ids, images)
        last = self.position + len(ids) - 1
        for call in split:
            logits = self.call(call, (last,))
        ((_, self.logits),) = logits
        return self.logits

    @torch.inference_mode()
    def call(self, call: Call, wanted: Collection[int] | None = None) -> list[tuple[int, Logits]]:
        """Feed ``call``. Returns (position, float32 logits [V]) after each id of text, or after an image.

        Only the logits at the positions ``wanted`` are computed (None: all).
        """
        tokens = torch.tensor(call.ids, dtype=torch.int64)[None]
        soft_tokens = None if call.image is None else torch.from_numpy(soft_tokens_of(self, call.image))[None]
        hidden = self.model.hidden(tokens, self._cache, self.position, soft_tokens)
        start, self.position = self.position, self.position + len(call.ids)
        places = range(start, self.position) if soft_tokens is None else [self.position - 1]
        places = [place for place in places if wanted is None or place in wanted]
        if not places:
            return []
        logits = self.model.lm_head(hidden[0, [place - start for place in places]])
        return list(zip(places, np.asarray(logits.numpy(), np.float32), strict=True))

    @torch.inference_mode()
    def encode_image(self, image: Pixels) -> SoftTokens:
        pixels = torch.from_numpy(network_input(image)).to(self._dtype)
        soft_tokens: SoftTokens = self.model.encode_images(pixels)[0].float().numpy()
        return soft_tokens


def open_eager(source: Source, context: int, chunk: int) -> EagerSession:
    """A session over the eager model of an opened checkpoint, with float activations.

    The chunk is raised to an image's tokens if it is smaller. Raises DoesNotFit and BadInput as ``cache_layout`` does.
    """
    config = source.config
    tokens_per_image = 1 if config.vision is None else config.vision.tokens_per_image
    layout = cache_layout(config, "ring", context, max(chunk, tokens_per_image))
    if isinstance(source, QuantizedCheckpoint):
        return EagerSession(quantized_model(config, source.weights), layout)
    return EagerSession(load_model(source), layout)
