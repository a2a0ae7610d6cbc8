"""A session that runs ahead of its caller: it guesses the next ids, and has their logits ready when they come.

``step`` feeds the id it is given together with a draft of the ids after it, in one call that gives the logits after
each of them. As long as the next ids are those of the draft, ``step`` returns logits that are there already. At the
first other id the session goes back to where they differ. So whoever decides on the ids, from these logits, decides as
without drafts, and in the same order: greedy decoding takes the largest logit, and sampling draws from the same
distribution with the same random number.

For a draft without alternatives this is speculative sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen et al.
2023, arXiv 2302.01318). There a drafted id x is accepted with probability min(1, p(x) / q(x)), where q(x) = 1, and
otherwise an id is drawn from max(0, p − q) made to sum to 1, which is p without x. Drawing from p and comparing with x
does the same.

One thing differs: a call of several ids adds float numbers in another order than calls of one id do, as the calls of a
prefill do. docs/speculation.md says how often this shows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma3.config import VisionConfig
from gemma3.images import Pixels
from runtime_py.sessions.protocol import Image, Logits, Rewindable, SoftTokens

# The estimate of the share of drafted ids that are accepted: where it begins, and what it keeps of itself when one more
# draft was right or wrong.
FIRST_ESTIMATE, KEPT = 0.7, 0.8
# When drafts do not seem worth their time, one id is drafted after so many ids, because the text may have changed.
PATIENCE = 32


Ids = NDArray[np.int64]


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    @property
    def cost(self) -> float:
        """What guessing one id takes, as a share of a step of the model."""

    def draft(self, ids: Ids, most: int) -> list[int]:
        """At most ``most`` ids that may follow ``ids``, which are all ids since position 0."""


@dataclass
class Counts:
    """What a session has done since it was made."""

    calls: int = 0  # of the model for ``steps``
    steps: int = 0  # ids that were stepped
    drafted: int = 0
    accepted: int = 0  # drafted ids that were then stepped

    def __str__(self) -> str:
        return f"{self.accepted} of {self.drafted} drafted tokens accepted, {self.steps} tokens in {self.calls} calls"


class SpeculativeSession:
    """A session over ``session``, which nothing else may feed, with the drafts of ``drafter``.

    ``extra_cost`` is what a call of 1 + d ids takes beyond a call of one, as a share of that: (a, b) for a + b · d.
    """

    def __init__(self, session: Rewindable, drafter: Drafter, extra_cost: tuple[float, float]) -> None:
        assert session.position == 0
        self._session, self._drafter, self._extra_cost = session, drafter, extra_cost
        self.counts = Counts()
        self._estimate = FIRST_ESTIMATE
        self._waited = 0  # ids stepped since the last draft
        self._ids: Ids = np.empty(session.context, np.int64)  # all that the caller has fed
        self._ahead: list[int] = []  # what the session was fed after them
        self._rows: list[Logits] = []  # the logits after each of ``_ahead``
        self.position = 0
        self.logits: Logits = np.empty(0, np.float32)

    @property
    def context(self) -> int:
        return self._session.context

    @property
    def chunk(self) -> int:
        return self._session.chunk

    @property
    def vocab_size(self) -> int:
        return self._session.vocab_size

    @property
    def vision(self) -> VisionConfig | None:
        return self._session.vision

    def encode_image(self, image: Pixels) -> SoftTokens:
        return self._session.encode_image(image)

    def reset(self) -> None:
        self._session.reset()
        self._ahead, self._rows, self.position = [], [], 0
        self.logits = np.empty(0, np.float32)

    def can_rewind(self, written: int, position: int) -> bool:
        return self._session.can_rewind(max(written, self._session.position), position)

    def rewind(self, position: int) -> None:
        """As ``Rewindable.rewind``."""
        self._session.rewind(position)
        self._ahead, self._rows, self.position = [], [], position
        self.logits = np.empty(0, np.float32)

    def live(self, position: int) -> dict[str, NDArray[Any]]:
        """As ``Resumable.live``."""
        return self._session.live(position)

    def resume(self, ids: Sequence[int], logits: Logits) -> None:
        """As ``Resumable.resume``. A draft model has not seen ``ids``, and is fed them when it drafts."""
        self._session.resume(ids, logits)
        self._ahead, self._rows, self.position = [], [], 0
        self._add(ids)
        self.logits = logits

    def prefill(self, ids: Sequence[int], images: Sequence[Image] = ()) -> Logits:
        self._go_back()
        self.logits = self._session.prefill(ids, images)
        self._add(ids)
        return self.logits

    def step(self, token: int) -> Logits:
        if self._ahead and self._ahead[0] == token:
            self._learn(right=True)
            self.counts.accepted += 1
            del self._ahead[0]
            self.logits = self._rows.pop(0)
        else:
            if self._ahead:
                self._learn(right=False)
                self._go_back()
            self.logits = self._feed(token)
        self._add([token])
        self.counts.steps += 1
        return self.logits

    def _add(self, ids: Sequence[int]) -> None:
        end = self.position + len(ids)
        self._ids[self.position : end] = ids
        self.position = end

    def _go_back(self) -> None:
        """Let the session hold what the caller has fed, and nothing after it."""
        if self._ahead:
            self._session.rewind(self.position)
            self._ahead, self._rows = [], []

    def _feed(self, token: int) -> Logits:
        """Feed ``token`` and a draft of what follows it. Returns the logits after the token."""
        draft = self._draft(token)
        self.counts.calls += 1
        self.counts.drafted += len(draft)
        self._waited = 0 if draft else self._waited + 1
        if not draft:
            return self._session.step(token)
        rows = self._session.verify([token, *draft])
        self._ahead, self._rows = draft, list(rows[1:])
        return rows[0]

    def _draft(self, token: int) -> list[int]:
        session, end = self._session, self.position + 1
        most = min(session.most_logits, session.context - self.position) - 1
        while most > 0 and not session.can_rewind(end + most, end):
            most -= 1
        most = min(most, self._worthwhile())
        if most < 1 or not 0 <= token < session.vocab_size:
            return []
        self._ids[self.position] = token
        draft = self._drafter.draft(self._ids[:end], most)
        image = None if session.vision is None else session.vision.image_token_id
        usable = [0 <= one < session.vocab_size and one != image for one in draft]
        return draft[: [*usable, False].index(False)]

    def _worthwhile(self) -> int:
        """The length of a draft with the most ids for the time, by the estimate. With d ids they are Σ estimate^i."""
        first, each = self._extra_cost
        ids, best, rate = 1.0, 0, 1.0
        for length in range(1, self._session.most_logits):
            ids += self._estimate**length
            time = 1 + first + (each + self._drafter.cost) * length
            if ids / time > rate:
                best, rate = length, ids / time
        return best or int(self._waited >= PATIENCE)

    def _learn(self, right: bool) -> None:
        self._estimate = KEPT * self._estimate + (1 - KEPT) * right
