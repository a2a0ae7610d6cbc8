"""Sessions that need no file, for the tests."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        self.most_logits = 4
        self.page = context  # it can go back within a page of so many positions
        self.calls = 0
        self.logits: Logits = np.empty(0, np.float32)

    @property
    def position(self) -> int:
        return len(self.fed)

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        for call in calls(self, ids, images):
            self.fed += call.ids
            self.calls += 1
        self.logits = np.asarray(self._function(self.fed), np.float32)
        return self.logits

    def step(self, token: int) -> Logits:
        return self.prefill([token])

    def verify(self, ids: Sequence[int]) -> Logits:
        assert 1 <= len(ids) <= self.most_logits
        (call,) = calls(self, ids)
        rows = []
        for token in call.ids:
            self.fed.append(token)
            rows.append(np.asarray(self._function(self.fed), np.float32))
        self.logits = rows[-1]
        self.calls += 1
        return np.stack(rows)

    def can_rewind(self, written: int, position: int) -> bool:
        return position == 0 or written // self.page == position // self.page

    def rewind(self, position: int) -> None:
        assert self.can_rewind(self.position, position)
        self.fed = self.fed[:position]
        self.logits = np.empty(0, np.float32)

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        """It has no caches."""
        return {}

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        self.fed, self.logits = list(ids), logits

    def reset(self) -> None:
        self.fed = []

    def encode_image(self, image: Pixels) -> SoftTokens:
        raise AssertionError("a text-only session")


def counting(vocab_size: int, context: int = 64) -> FunctionSession:
    """A session that predicts n + 1 after n, and 0 after the last id of the vocabulary."""
    return FunctionSession(
        lambda fed: [10.0 * (token == (fed[-1] + 1) % vocab_size) for token in range(vocab_size)], vocab_size, context
    )
