"""Guesses of how a sequence goes on: what followed the same ids before, or what a smaller model would say.

They are for ``runtime_py.sessions.speculative``, which holds them against the model.
"""

import numpy as np

from runtime_py.sessions.protocol import Logits, Rewindable
from runtime_py.sessions.speculative import Ids

# A guess is made when the last ids have occurred before, at least so many of them. Of several such places the one
# counts where the most ids before it are equal, but no more than so many are compared.
SHORTEST_MATCH, LONGEST_MATCH = 3, 16


class PromptLookup:
    """Guesses that what followed the last ids before follows them again. It needs no second model."""

    cost = 0.0

    def draft(self, ids: Ids, most: int) -> list[int]:
        """The ids after the latest of the longest matches; if these are too few, over and over."""
        found = match(ids)
        if found is None:
            return []
        period = len(ids) - found
        return [int(ids[found + index % period]) for index in range(most)]


def match(ids: Ids) -> int | None:
    """Where the ids end that are equal to the last ones: the longest such match, and of equally long ones the latest.

    At least SHORTEST_MATCH ids must be equal, and more than LONGEST_MATCH do not count. None if there is no such place.
    """
    ends = np.flatnonzero(ids[:-1] == ids[-1:]) + 1
    found = None
    length = 1  # so many ids are equal before each of ``ends``
    while len(ends):
        if length >= SHORTEST_MATCH:
            found = int(ends[-1])
        ends = ends[ends > length]
        if length == LONGEST_MATCH or not len(ends):
            break
        ends = ends[ids[ends - length - 1] == ids[-length - 1]]
        length += 1
    return found


class DraftModel:
    """Guesses what a smaller model with the same vocabulary would say: its most likely ids.

    Nothing else may feed ``session``. ``cost`` is the time of one of its steps, as a share of the larger model's.
    """

    def __init__(self, session: Rewindable, cost: float) -> None:
        self._session = session
        self.cost = cost
        self._fed: Ids = np.empty(0, np.int64)

    def draft(self, ids: Ids, most: int) -> list[int]:
        session = self._session
        # Images are not encoded for this model: it guesses from the text. (A text-only one has no rows for their ids.)
        ids = ids[ids < session.vocab_size]
        if session.vision is not None:
            ids = ids[ids != session.vision.image_token_id]
        most = min(most, session.context - len(ids))
        while most > 1 and not session.can_rewind(len(ids) + most - 1, len(ids)):
            most -= 1
        if most < 1:
            return []
        logits = self._catch_up(ids)
        draft = [int(np.argmax(logits))]
        while len(draft) < most:
            draft.append(int(np.argmax(session.step(draft[-1]))))
        self._fed = np.concatenate([ids, np.array(draft[:-1], np.int64)])
        return draft

    def _catch_up(self, ids: Ids) -> Logits:
        """Feed what the session does not hold of ``ids``. Returns the logits after the last one."""
        session, fed = self._session, self._fed
        shorter = min(len(fed), len(ids) - 1)
        differing = np.flatnonzero(fed[:shorter] != ids[:shorter])
        same = int(differing[0]) if len(differing) else shorter
        if same < len(fed):
            if session.can_rewind(len(fed), same):
                session.rewind(same)
            else:
                session.reset()
                same = 0
        return session.prefill(ids[same:].tolist())
