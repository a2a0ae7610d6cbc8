"""From logits to token ids: sampling, and generation as a stream."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gemma3.errors import BadInput
from runtime_py.sessions.protocol import Image, Logits, Session

StopReason = Literal["stop token", "length", "context"]


@dataclass
class Sampler:
    """Draws ids from logits: by temperature, from the ``top_k`` most likely ids, then from the ``top_p`` nucleus.

    The nucleus is the smallest set of most likely ids whose probabilities sum to ``top_p``. Temperature 0 is greedy;
    ``top_k`` 0 and ``top_p`` 1 keep every id. The same seed draws the same ids. Raises BadInput for settings outside
    their range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    _random: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if self.top_k < 0:
            raise BadInput(f"top-k is {self.top_k}; use 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"top-p is {self.top_p}; use more than 0 and at most 1 (off)")
        if self.seed < 0:
            raise BadInput(f"seed is {self.seed}; use 0 or more")
        self._random = np.random.default_rng(self.seed)

    def distribution(self, logits: Logits) -> NDArray[np.float64]:
        """The probabilities float64 [V] from which the next id is drawn, for ``logits`` [V]."""
        if self.temperature == 0:
            chosen = np.zeros(logits.shape, np.float64)
            chosen[np.argmax(logits)] = 1.0
            return chosen
        below = logits.astype(np.float64) - logits.max()
        with np.errstate(over="ignore"):  # a tiny temperature takes everything below the maximum to minus infinity
            probabilities = np.exp(below / self.temperature)
        # A stable order: of equal logits, the ones with the highest ids are cut first.
        order = np.argsort(-logits.astype(np.float64), kind="stable")
        if self.top_k:
            probabilities[order[self.top_k :]] = 0.0
        probabilities /= probabilities.sum()
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= self.top_p]] = 0.0
        kept: NDArray[np.float64] = probabilities / probabilities.sum()
        return kept

    def sample(self, logits: Logits) -> int:
        if self.temperature == 0:
            return int(np.argmax(logits))
        return int(self._random.choice(len(logits), p=self.distribution(logits)))


class Generation:
    """Generates the ids that follow what was fed to ``session``, and feeds them. Iterate over it once.

    An image token is never drawn, because no image belongs to it. Afterwards ``reason`` says why the generation ended,
    and ``unfed`` holds the id that was drawn last but not fed: the stop token, or the last id. A full context ends the
    generation and is not an error. Raises BadInput for a ``max_new_tokens`` below 1.
    """

    def __init__(
        self, session: Session, sampler: Sampler, *, stop_ids: Collection[int], max_new_tokens: int | None = None
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise BadInput(f"the number of new tokens is {max_new_tokens}; use 1 or more")
        self._session = session
        self._sampler = sampler
        self._stop_ids = frozenset(stop_ids)
        self._limit = max_new_tokens
        self.reason: StopReason | None = None
        self.unfed: list[int] = []

    def __iter__(self) -> Iterator[int]:
        session, count = self._session, 0
        while True:
            token = self._sampler.sample(self._drawable(session.logits))
            self.unfed = [token]
            if token in self._stop_ids:
                self.reason = "stop token"
                return
            yield token
            count += 1
            if count == self._limit:
                self.reason = "length"
                return
            if session.position == session.context:
                self.reason = "context"
                return
            session.step(token)
            self.unfed = []

    def _drawable(self, logits: Logits) -> Logits:
        vision = self._session.vision
        if vision is None:
            return logits
        drawable = logits.copy()
        drawable[vision.image_token_id] = -np.inf
        return drawable


def generate(
    session: Session,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    images: Sequence[Image] = (),
    stop_ids: Collection[int],
    max_new_tokens: int | None = None,
) -> Generation:
    """Feed ``prompt`` and its ``images`` after what the session holds. Iterate over the result to continue it.

    Raises what ``Session.prefill`` raises, and BadInput for a ``max_new_tokens`` below 1.
    """
    generation = Generation(session, sampler, stop_ids=stop_ids, max_new_tokens=max_new_tokens)
    session.prefill(prompt, images)
    return generation
