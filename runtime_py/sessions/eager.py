"""The eager network as a session, with the ring cache."""

from collections.abc import Sequence

import numpy as np
import torch

from gemma3.cache import CacheLayout, cache_layout
from gemma3.checkpoint import load_model
from gemma3.images import Pixels, network_input
from gemma3.model import Gemma3, new_cache
from quant.eager import quantized_model
from quant.source import QuantizedCheckpoint, Source
from runtime_py.sessions.protocol import Call, Image, Logits, SoftTokens, calls, soft_tokens_of


class EagerSession:
    """A session over the eager ``model``. ``layout`` must be of the ring style.

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
        for call in calls(self, ids, images):
            logits = self.call(call)
        self.logits = logits[-1]
        return self.logits

    @torch.inference_mode()
    def call(self, call: Call) -> Logits:
        """Feed ``call``. Returns float32 [n, V], the logits after each id of text, or after an image (n = 1)."""
        tokens = torch.tensor(call.ids, dtype=torch.int64)[None]
        soft_tokens = None if call.image is None else torch.from_numpy(soft_tokens_of(self, call.image))[None]
        logits = self.model(
            tokens, self._cache, self.position, last_only=soft_tokens is not None, soft_tokens=soft_tokens
        )
        self.position += len(call.ids)
        return np.asarray(logits[0].numpy(), np.float32)

    @torch.inference_mode()
    def encode_image(self, image: Pixels) -> SoftTokens:
        soft_tokens: SoftTokens = self.model.encode_images(torch.from_numpy(network_input(image)))[0].numpy()
        return soft_tokens


def open_eager(source: Source, context: int, chunk: int) -> EagerSession:
    """A session over the eager model of an opened checkpoint, with float activations.

    The chunk is raised to an image's tokens if it is smaller. Raises DoesNotFit and BadInput as ``cache_layout`` does.
    """
    config = source.config
    tokens_per_image = 1 if config.vision is None else config.vision.tokens_per_image
    layout = cache_layout(config, "ring", context, max(chunk, tokens_per_image))
    if isinstance(source, QuantizedCheckpoint):
        return EagerSession(quantized_model(config, source.weights, "float"), layout)
    return EagerSession(load_model(source), layout)
