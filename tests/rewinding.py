"""What the tests of every session ask about calls with several logits, and about going back."""

from collections.abc import Callable

import numpy as np

from runtime_py.sessions.protocol import Rewindable


def assert_rows_are_those_of_single_steps(
    open_session: Callable[[], Rewindable], ids: list[int], within: float
) -> None:
    steps, rows = open_session(), open_session()
    expected = np.stack([steps.step(token) for token in ids])
    lengths = [*range(1, rows.most_logits + 1)] * len(ids)
    start = 0
    for length in lengths:
        part = ids[start : start + length]
        if not part:
            break
        found = rows.verify(part)
        assert found.shape == (len(part), rows.vocab_size)
        assert np.array_equal(rows.logits, found[-1])
        assert np.abs(found - expected[start : start + length]).max() <= within
        start += length
        assert rows.position == min(start, len(ids))


def assert_a_rewound_session_equals_one_that_never_went_on(
    open_session: Callable[[], Rewindable], ids: list[int], most: int
) -> None:
    """Bit for bit, at every position, after ``verify`` of 2 to ``most`` wrong ids, where the session can go back."""
    drafting, plain = open_session(), open_session()
    tried = 0
    for index, token in enumerate(ids[:-1]):
        length = 2 + index % (most - 1)
        position = drafting.position
        assert position == plain.position == index
        if position + length <= drafting.context and drafting.can_rewind(position + length, position):
            wrong = [(one + 1) % drafting.vocab_size for one in ids[index : index + length]]
            drafting.verify((wrong + [0] * length)[:length])
            drafting.rewind(position)
            tried += 1
        assert np.array_equal(drafting.step(token), plain.step(token)), index
    assert tried > len(ids) // 2
