"""Sessions that need no file, for the tests."""

from collections.abc import Callable, Sequence

import numpy as np

from gemma3.config import VisionConfig
from gemma3.images import Pixels
from runtime_py.sessions.protocol import Image, Logits, SoftTokens, calls


class FunctionSession:
    """Logits are a function of the ids fed so far."""

    def __init__(self, function: Callable[[list[int]], Sequence[float]], vocab_size: int, context: int = 64) -> None:
        self._function = function
        self.vocab_size = vocab_size
        self.context = context
        self.chunk = 4
        self.vision: VisionConfig | None = None
        self.fed: list[int] = []
        self.logits: Logits = np.empty(0, np.float32)

    @property
    def position(self) -> int:
        return len(self.fed)

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        for call in calls(self, ids, images):
            self.fed += call.ids
        self.logits = np.asarray(self._function(self.fed), np.float32)
        return self.logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def reset(self) -> None:
        self.fed = []

    def encode_image(self, image: Pixels) -> SoftTokens:
        raise AssertionError("a text-only session")


def counting(vocab_size: int, context: int = 64) -> FunctionSession:
    """A session that predicts n + 1 after n, and 0 after the last id of the vocabulary."""
    return FunctionSession(
        lambda fed: [10.0 * (token == (fed[-1] + 1) % vocab_size) for token in range(vocab_size)], vocab_size, context
    )
