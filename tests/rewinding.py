"""What the tests of every session ask about calls with several logits, and about going back."""

from collections.abc import Callable, Sequence

import numpy as np

from runtime_py.sessions.protocol import Image, Rewindable


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


def assert_guesses_after_an_image_are_checked_as_by_single_steps(
    several: Rewindable, single: Rewindable, ids: list[int], images: Sequence[Image]
) -> None:
    """The last 12 of ``ids`` are text, and are verified in fours after a guess that was wrong."""
    start = len(ids) - 12
    assert np.array_equal(several.prefill(ids[:start], images), single.prefill(ids[:start], images))
    several.verify([5, 4, 3])
    several.rewind(start)
    rows = [row for place in range(start, len(ids), 4) for row in several.verify(ids[place : place + 4])]
    for row, token in zip(rows, ids[start:], strict=True):
        assert np.abs(row - single.step(token)).max() <= 1e-4
